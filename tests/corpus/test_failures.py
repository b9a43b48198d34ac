"""What dies, and what is full: the command ends with the right code, and the next one gives what an undisturbed one gives."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prottrans_hpc import stage
from prottrans_hpc.corpus import pool, workplace
from prottrans_hpc.corpus.index import INDEX
from prottrans_hpc.corpus.pool import LocalProcesses, deal
from prottrans_hpc.errors import ResourceError, exit_code, explain

from .conftest import Records, fasta_text, folder_bytes, preprocess_request

_PROGRAM = """
import json, os, sys
from prottrans_hpc import errors, stage
from prottrans_hpc.corpus import pool, scan
pool.SMALL, scan.MIN_RANGE_BYTES = 0.0, 100_000
if __name__ == "__main__":
    try:
        stage.run_stage("preprocess", json.loads(sys.argv[1]))
    except Exception as error:
        print("error:", errors.explain(error), file=sys.stderr)
        sys.exit(errors.exit_code(error))
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A file that runs the stage as the command line does; spawned workers import it, so it has to be a file."""
    path = tmp_path / "program.py"
    path.write_text(_PROGRAM)
    return path


@pytest.fixture
def fasta(tmp_path: Path, proteins: Records) -> Path:
    """Some megabytes, so that there is time to be killed."""
    path = tmp_path / "in.fasta"
    path.write_bytes(b"".join(fasta_text([(b"%d-%s" % (k, name), residues) for name, residues in proteins]) for k in range(12)))
    return path


@pytest.fixture
def clean(tmp_path: Path, fasta: Path) -> dict[str, bytes]:
    """What an undisturbed run gives."""
    out = tmp_path / "clean"
    stage.run_stage("preprocess", request(fasta, out))
    return folder_bytes(out)


def request(fasta: Path, out: Path, workers: int = 1) -> dict[str, object]:
    return preprocess_request(fasta, out=out, workers=workers, shards=4, validation=0.05, dedup=True)


def start(program: Path, arguments: dict[str, object], **how: object) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(stage.__file__).parents[1])}
    argv = [sys.executable, str(program), json.dumps(arguments)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **how)  # type: ignore[call-overload,no-any-return]


def descendants(pid: int) -> list[int]:
    """Living processes below a process."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                parents[int(entry.name)] = int(fields[1])
    found, front = [], [pid]
    while front:
        front = [child for child, parent in parents.items() if parent in front]
        found += front
    return found


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    found = []
    for pid in descendants(process.pid):
        with contextlib.suppress(OSError):  # it has just ended
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def wait_for(condition: Callable[[], object], timeout_s: float = 180) -> bool:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


# ---- killed ----


@pytest.mark.parametrize("delay_s", [0.0, 0.3, 0.8])
def test_a_killed_worker_ends_the_command_with_an_error(tmp_path: Path, program: Path, fasta: Path, clean: dict[str, bytes], delay_s: float) -> None:
    out = tmp_path / "out"
    process = start(program, request(fasta, out, workers=2))
    try:
        assert wait_for(lambda: workers_of(process) or process.poll() is not None)
        time.sleep(delay_s)
        for pid in workers_of(process)[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _, stderr = process.communicate(timeout=180)
    finally:
        process.kill()
    if process.returncode != 0:  # it may have been done already
        assert process.returncode == 71, stderr
        assert "a worker process died" in stderr
        assert not (out / INDEX).exists()
        stage.run_stage("preprocess", request(fasta, out))
    assert folder_bytes(out) == clean


def double(number: int) -> int:
    return 2 * number


def test_results_of_local_processes_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "SMALL", 0.0)
    processes = LocalProcesses(2)
    told: list[float] = []
    assert processes.run(double, range(20), costs=[1.0] * 20, advance=told.append) == [2 * number for number in range(20)]
    assert sum(told) == 20
    processes.close(kill=False)


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_moment_then_run_again_equals_a_clean_run(tmp_path: Path, program: Path, fasta: Path, clean: dict[str, bytes], seed: int) -> None:
    out = tmp_path / "out"
    generator = random.Random(seed)
    workers = 1 + seed % 2
    kills = 0
    for _ in range(2):
        process = start(program, request(fasta, out, workers=workers))
        wait_for(lambda: out.exists() or process.poll() is not None)  # noqa: B023 - called within the loop
        time.sleep(generator.uniform(0, 0.8 if workers == 1 else 2.0))
        below = descendants(process.pid)
        kills += process.poll() is None
        process.kill()
        process.wait()
        # Workers of a killed command end by themselves.
        assert wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))  # noqa: B023
    last = start(program, request(fasta, out, workers=workers))
    assert last.wait(timeout=180) == 0, last.stderr and last.stderr.read()
    assert folder_bytes(out) == clean


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 140))
def test_killed_at_many_moments(tmp_path: Path, program: Path, fasta: Path, clean: dict[str, bytes], seed: int) -> None:
    test_killed_at_any_moment_then_run_again_equals_a_clean_run(tmp_path, program, fasta, clean, seed)


def test_shards_that_were_complete_are_taken_over(tmp_path: Path, fasta: Path, clean: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def stop(*anything: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prottrans_hpc.corpus.builder._describe", stop)
    with pytest.raises(KeyboardInterrupt):
        stage.run_stage("preprocess", request(fasta, out))
    monkeypatch.undo()
    assert not (out / INDEX).exists()
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.h5")}
    assert len(times) == 5
    # One of them is damaged meanwhile: it, and only it, is made again.
    with (out / "train-00002.h5").open("r+b") as file:
        file.seek(9999)
        file.write(b"?")
    stage.run_stage("preprocess", request(fasta, out))
    assert folder_bytes(out) == clean
    assert {name for name, at in times.items() if (out / name).stat().st_mtime_ns != at} == {"train-00002.h5"}


def test_shards_of_an_older_plan_do_not_stay(tmp_path: Path, fasta: Path, clean: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr("prottrans_hpc.corpus.builder._describe", lambda *anything: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stage.run_stage("preprocess", request(fasta, out) | {"shards": 9})
    monkeypatch.undo()
    stage.run_stage("preprocess", request(fasta, out))
    assert folder_bytes(out) == clean


def test_two_commands_cannot_make_one_corpus(tmp_path: Path, fasta: Path) -> None:
    with workplace.open_workplace(tmp_path / "out"), pytest.raises(ResourceError, match="another process") as caught:
        stage.run_stage("preprocess", request(fasta, tmp_path / "out"))
    assert "--mpi" not in str(caught.value)


@pytest.mark.parametrize("mpi", [False, True])
def test_ranks_without_the_flag_for_ranks_are_told_of_it(tmp_path: Path, fasta: Path, monkeypatch: pytest.MonkeyPatch, mpi: bool) -> None:
    for name, value in {"RANK": "1", "SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    monkeypatch.setattr(pool, "_mpi_pool", lambda stop_file: contextlib.nullcontext(pool.ThisProcess()))
    with workplace.open_workplace(tmp_path / "out"), pytest.raises(ResourceError, match="another process") as caught:
        stage.run_stage("preprocess", request(fasta, tmp_path / "out") | {"mpi": mpi})
    assert ("one of 2 ranks that mpirun started: did you forget --mpi" in str(caught.value)) is not mpi
    assert exit_code(caught.value) == 71


# ---- large ----


def lengthy(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b">a\n")
        for _ in range(100):
            file.write(b"MKVLAWSTND" * 100_000)


def numerous(path: Path) -> None:
    with path.open("wb") as file:
        for start in range(0, 3_000_000, 100_000):
            file.write(b"".join(b">%d\nM\n" % number for number in range(start, start + 100_000)))


@pytest.mark.slow
@pytest.mark.parametrize("make", [lengthy, numerous])
def test_memory_stays_below_a_gibibyte(tmp_path: Path, program: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "in.fasta")
    process = start(program, request(tmp_path / "in.fasta", tmp_path / "out") | {"shards": 1, "validation": 0.0})
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert usage.ru_maxrss < 1 << 20, "KiB"


# ---- full ----


@pytest.mark.parametrize("operation", ["write", "pwrite", "fsync", "replace", "truncate"])
def test_a_failure_of_any_write_leaves_nothing_half(
    tmp_path: Path, fasta: Path, clean: dict[str, bytes], operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(os, operation)
    calls = 0
    fail_at = 0

    def failing(*arguments: object, **how: object) -> object:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "out"))
        return real(*arguments, **how)

    monkeypatch.setattr(os, operation, failing)
    counted = preprocess_request(fasta, out=tmp_path / "count", shards=4, validation=0.05, dedup=True)
    stage.run_stage("preprocess", counted)
    total = calls
    for fail_at in sorted({1, 2, total // 2, total - 1, total} & set(range(1, total + 1))):
        calls, out = 0, tmp_path / f"out-{fail_at}"
        with pytest.raises(OSError, match="No space") as caught:
            stage.run_stage("preprocess", request(fasta, out))
        assert exit_code(caught.value) == 73
        if out.exists():
            # The very last fsync is that of the folder, behind the rename of the index: then all is there.
            assert not (out / INDEX).exists() or (operation, fail_at) == ("fsync", total)
            assert not [path for path in out.rglob("*") if ".tmp-" in path.name or "pieces" in path.parts]
        fail_at = 0
        stage.run_stage("preprocess", request(fasta, out))
        assert folder_bytes(out) == clean


@pytest.mark.parametrize("workers", [1, 2])
def test_files_that_may_not_grow_end_with_73_and_name_the_file_system(tmp_path: Path, program: Path, fasta: Path, workers: int) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    out = tmp_path / "out"
    process = start(program, request(fasta, out, workers=workers), preexec_fn=limit)
    _, stderr = process.communicate(timeout=180)
    assert process.returncode == 73, stderr
    assert "File too large" in stderr
    assert not out.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_ends_with_73_and_is_left_clean(small_disk: Path, fasta: Path, program: Path) -> None:
    process = start(program, request(fasta, small_disk / "out") | {"dedup": False})
    _, stderr = process.communicate(timeout=180)
    assert process.returncode == 73, stderr
    assert f"(file system {small_disk})" in stderr
    assert list(small_disk.rglob("*.tmp*")) == []
    assert not (small_disk / "out" / INDEX).exists()


def test_too_little_space_is_said_before_the_work(tmp_path: Path, fasta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workplace.shutil, "disk_usage", lambda path: workplace.shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="are needed at least") as caught:
        stage.run_stage("preprocess", request(fasta, tmp_path / "out"))
    assert exit_code(caught.value) == 73
    assert "file system" in explain(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_permission_ends_with_77(tmp_path: Path, fasta: Path, program: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    how = {"user": 65534, "group": 65534} if os.geteuid() == 0 else {}
    for path in [tmp_path, *tmp_path.parents]:
        if how and not path.stat().st_mode & 0o001:
            pytest.skip(f"another user cannot reach {path}")
    process = start(program, request(fasta, tmp_path / "closed" / "out"), **how)
    _, stderr = process.communicate(timeout=180)
    assert process.returncode == 77, stderr


# ---- shares ----


@pytest.mark.parametrize("num_workers", [1, 2, 3, 7])
def test_shares_are_complete_and_balanced(num_workers: int) -> None:
    generator = random.Random(num_workers)
    costs = [generator.uniform(0, 100) for _ in range(50)] + [0.0] * 5
    shares = deal(costs, num_workers)
    assert sorted(i for share in shares for i in share) == list(range(55))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(costs[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs)
