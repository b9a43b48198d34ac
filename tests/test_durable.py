"""The save protocol: killed at every step, on a full disk, and with every bit flipped."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prottrans_hpc import durable, errors

CRASH_AT = Path(__file__).with_name("crash_at.py")
OLD = b"old" * 7


def saved_folder(final: Path, files: dict[str, bytes]) -> Path:
    with durable.new_folder(final) as temporary:
        for name, content in files.items():
            (temporary / name).write_bytes(content)
    return final


@pytest.fixture
def world(tmp_path):
    """An earlier state: a file, and a sealed folder."""
    durable.write_bytes(tmp_path / "state.json", OLD)
    saved_folder(tmp_path / "step-1", {"a.bin": b"1" * 100})
    return tmp_path


def crash(step: int, scenario: str, folder: Path, checkout: Path) -> bool:
    """Run a scenario that dies before its step; whether it died."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run([sys.executable, str(CRASH_AT), str(step), scenario, str(folder)], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) in ((-signal.SIGKILL, ""), (0, "alive\n")), done.stderr
    return done.returncode != 0


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not durable.is_temporary(path)}


def check_after_crash(scenario: str, folder: Path) -> str:
    """The state is the old one or the new one; which."""
    if scenario == "replace_file":
        content = (folder / "state.json").read_bytes()
        assert content in (OLD, b"new" * 1000)
        return "old" if content == OLD else "new"
    assert (folder / "state.json").read_bytes() == OLD
    for path in folder.glob("step-*"):
        assert durable.folder_problems(path) == []
    if scenario == "new_folder":
        assert "step-1" in visible(folder)
        return "new" if "step-2" in visible(folder) else "old"
    return "old" if "step-1" in visible(folder) else "new"


@pytest.mark.parametrize("scenario", ["replace_file", "new_folder", "remove_folder"])
def test_killed_before_any_step_the_state_is_the_old_or_the_new_one(world, repository, scenario, tmp_path_factory):
    seen = []
    for step in range(1, 60):
        folder = tmp_path_factory.mktemp("crash") / "run"
        shutil.copytree(world, folder)
        died = crash(step, scenario, folder, repository)
        seen.append(check_after_crash(scenario, folder))
        if not died:
            break
    assert not died, "the scenario has more steps than were tried"
    assert len(seen) >= 4  # else the hook saw nothing
    assert seen == sorted(seen, key=["old", "new"].index)
    assert (seen[0], seen[-1]) == ("old", "new")


STRACE = shutil.which("strace")


@pytest.mark.skipif(STRACE is None, reason="STRACE IS NOT INSTALLED: kills inside system calls go untested (apt-get install strace)")
@pytest.mark.parametrize("syscall", ["fsync", "rename", "write"])
def test_killed_inside_a_system_call_the_state_is_the_old_or_the_new_one(world, repository, syscall, tmp_path_factory):
    seen = []
    for count in range(1, 20):
        folder = tmp_path_factory.mktemp("strace") / "run"
        shutil.copytree(world, folder)
        inject = f"inject={syscall}:signal=SIGKILL:when={count}"
        argv = [STRACE, "-f", "-qq", "-o", "/dev/null", "-e", f"trace={syscall}", "-e", inject, sys.executable, str(CRASH_AT), "0", "new_folder", str(folder)]
        done = subprocess.run(argv, env=os.environ | {"PYTHONPATH": str(repository), "PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, text=True)
        if "ptrace" in done.stderr or "PTRACE" in done.stderr:
            pytest.skip(f"STRACE MAY NOT TRACE HERE: {done.stderr.strip()}")
        seen.append(check_after_crash("new_folder", folder))
        if done.returncode == 0:
            break
        assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), done.stderr
    assert done.returncode == 0, "the scenario has more such calls than were tried"
    assert len(seen) >= 2
    assert seen == sorted(seen, key=["old", "new"].index)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_an_error_at_any_step_leaves_the_old_state_and_no_litter(world, monkeypatch, function):
    before = visible(world)
    real = getattr(os, function)

    def fail(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    for fails_at in range(1, 20):
        calls = 0

        def counted(*arguments, at=fails_at):
            nonlocal calls
            calls += 1
            return fail() if calls == at else real(*arguments)

        monkeypatch.setattr(os, function, counted)
        try:
            saved_folder(world / "step-2", {"a.bin": b"x" * 10, "b.bin": b""})
        except OSError as error:
            assert errors.exit_code(error) == errors.IO_ERROR
            # Past the rename the new state is whole already; before it nothing of it is to be seen.
            assert visible(world) in (before, before | {"step-2"})
            assert not [path for path in world.iterdir() if durable.is_temporary(path)]
            if (world / "step-2").exists():
                assert durable.folder_problems(world / "step-2") == []
                shutil.rmtree(world / "step-2")
        else:
            break
    assert fails_at > 1
    assert durable.folder_problems(world / "step-2") == []


def test_a_full_disk_leaves_the_old_file_and_is_a_cannot_write(tmp_path):
    final = tmp_path / "state.json"
    durable.write_bytes(final, OLD)
    with pytest.raises(OSError, match="No space left on device") as caught, durable.new_file(final) as temporary:
        temporary.symlink_to("/dev/full")  # the kernel's own full disk
        temporary.write_bytes(b"x" * 100_000)
    assert errors.exit_code(caught.value) == errors.CANNOT_WRITE
    assert final.read_bytes() == OLD
    assert visible(tmp_path) == {"state.json"} == {path.name for path in tmp_path.iterdir()}


def test_a_write_that_the_limit_of_the_file_size_stops_leaves_nothing(tmp_path):
    def write_past_the_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        saved_folder(tmp_path / "step-1", {"a.bin": b"x" * 100_000})

    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            write_past_the_limit()
        except OSError as error:
            os._exit(errors.exit_code(error))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == errors.CANNOT_WRITE
    assert list(tmp_path.iterdir()) == []


def test_every_flipped_bit_of_a_sealed_folder_is_found(tmp_path):
    folder = saved_folder(tmp_path / "step-1", {"tensors.bin": bytes(range(64)), "state.json": b'{"step": 1}'})
    assert durable.folder_problems(folder) == []
    missed = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for bit in range(8 * len(content)):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            if not durable.folder_problems(folder):
                missed.append((path.name, bit))
        path.write_bytes(content)
    assert missed == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "a.bin").unlink(), "a.bin is missing"),
        (lambda folder: (folder / "a.bin").write_bytes(b"1"), "a.bin has 1 bytes, 3 were written"),
        (lambda folder: (folder / "a.bin").write_bytes(b"xyz"), "a.bin is damaged"),
        (lambda folder: (folder / "extra").write_bytes(b""), "extra is not in the manifest"),
        (lambda folder: (folder / durable.MANIFEST).unlink(), "the save did not finish"),
        (lambda folder: (folder / durable.MANIFEST).write_bytes(b"{"), "damaged"),
        (lambda folder: (folder / durable.MANIFEST).write_bytes(b"[]"), "damaged"),
        (lambda folder: (folder / durable.MANIFEST).write_bytes(b'{"files": {"a.bin": 3}}'), "damaged"),
        (shutil.rmtree, "the save did not finish"),
    ],
)
def test_damage_is_named(tmp_path, damage, said):
    folder = saved_folder(tmp_path / "step-1", {"a.bin": b"abc"})
    damage(folder)
    problems = durable.folder_problems(folder)
    assert len(problems) == 1
    assert said in problems[0]
    assert str(folder) in problems[0]


def test_a_temporary_name_is_a_hidden_sibling(tmp_path):
    final = tmp_path / "step-1"
    temporary = durable.temporary_sibling(final)
    assert temporary.parent == final.parent
    assert durable.is_temporary(temporary)
    assert not durable.is_temporary(final)
    assert temporary != durable.temporary_sibling(final)


def test_json_round_trip_keeps_order_and_gives_equal_bytes(tmp_path):
    value = {"b": [1, 2.5, None], "a": {"x": "y"}}
    durable.write_json(tmp_path / "a.json", value)
    durable.write_json(tmp_path / "b.json", json.loads((tmp_path / "a.json").read_bytes()))
    assert list(durable.read_json(tmp_path / "a.json")) == ["b", "a"]
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_json_file_is_named(tmp_path, content):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(errors.DataError, match=r"run\.json is damaged"):
        durable.read_json(path)


def test_not_a_number_never_reaches_a_json_file(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        durable.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_fsync_of_a_file_that_fails_is_an_error_but_a_directory_may_refuse(tmp_path, monkeypatch):
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    durable.fsync_path(tmp_path)
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(OSError, match="Invalid argument"):
        durable.fsync_path(tmp_path / "a")


def test_the_folders_above_an_output_are_made(tmp_path):
    durable.write_bytes(tmp_path / "a" / "b" / "c.json", b"new")
    assert (tmp_path / "a" / "b" / "c.json").read_bytes() == b"new"
    saved_folder(tmp_path / "d" / "step-1", {"a.bin": b"1"})
    assert durable.folder_problems(tmp_path / "d" / "step-1") == []


@pytest.mark.parametrize(
    ("name", "hindrance"),
    [("q.fa/x", "{}/q.fa is no folder"), ("q.fa/y/x", "{}/q.fa is no folder"), ("dangling/x", "{}/dangling is no folder"), ("x" * 300, "File name too long")],
)
@pytest.mark.parametrize("write", [lambda path: durable.write_bytes(path, b"new"), lambda path: saved_folder(path, {"a.bin": b"1"})])
def test_an_output_that_cannot_be_there_is_a_cannot_write_that_names_it(tmp_path, name, hindrance, write):
    (tmp_path / "q.fa").write_bytes(b">1\nMK\n")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "else")
    before = visible(tmp_path)
    with pytest.raises(errors.OutputError) as caught:
        write(tmp_path / name)
    assert str(caught.value) == f"{tmp_path / name} cannot be written: {hindrance.format(tmp_path)}. Choose another place"
    assert errors.exit_code(caught.value) == errors.CANNOT_WRITE
    assert errors.explain(caught.value) == str(caught.value)
    assert isinstance(caught.value, OSError), "who survives a full disk survives this"
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_file_that_is_to_be_where_a_folder_is_is_a_cannot_write(tmp_path):
    (tmp_path / "plots").mkdir()
    with pytest.raises(errors.OutputError, match="plots cannot be written: a folder of this name is there"):
        durable.write_bytes(tmp_path / "plots", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["plots"]


def test_an_input_that_is_missing_stays_one(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, durable.new_file(tmp_path / "copy"):
        (tmp_path / "original").read_bytes()
    assert errors.exit_code(caught.value) == errors.NO_INPUT
