from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prottrans_hpc import errors
from prottrans_hpc.comm import Solo
from prottrans_hpc.recipe import Checkpointing
from prottrans_hpc.run_dir import RunDir
from prottrans_hpc.train import checkpoint
from prottrans_hpc.train.retention import prune, remove_leftovers, steps_to_keep
from prottrans_hpc.train.saving import MAX_WRITERS, MIN_BYTES_A_WRITER, LaneTensors, Saver, plan_files
from prottrans_hpc.train.tensor_file import Staging

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


@given(
    sizes=st.dictionaries(
        st.sampled_from(["model", "optimizer"]), st.dictionaries(st.text("abc.", min_size=1), st.integers(0, 10**9), max_size=30), max_size=2
    ),
    world_size=st.integers(1, 6000),
)
def test_every_tensor_is_written_once_by_an_existing_rank(sizes, world_size):
    plans = plan_files(sizes, world_size)
    written = sorted((plan.kind, name) for plan in plans for name in plan.tensors)
    assert written == sorted((kind, name) for kind, tensors in sizes.items() for name in tensors)
    assert len({plan.name for plan in plans}) == len(plans)
    assert len({plan.rank for plan in plans}) <= MAX_WRITERS
    assert all(0 <= plan.rank < world_size for plan in plans)


def test_bytes_are_shared_out_evenly_and_over_nodes():
    sizes = {"model": {f"w{i}": 4 << 20 for i in range(64)}, "optimizer": {f"m.w{i}": 8 << 20 for i in range(64)}}
    plans = plan_files(sizes, 32)
    load: dict[int, int] = {}
    for plan in plans:
        load[plan.rank] = load.get(plan.rank, 0) + sum(sizes[plan.kind][name] for name in plan.tensors)
    assert len(load) == 32
    assert max(load.values()) == min(load.values())
    few = {plan.rank for plan in plan_files({"model": {f"w{i}": MIN_BYTES_A_WRITER for i in range(4)}}, 32)}
    assert few == {0, 8, 16, 24}


def test_staged_tensors_do_not_follow_the_training(tmp_path: Path) -> None:
    run = _run(tmp_path)
    weights = torch.ones(100)
    saver = _saver(run)
    saver.stage(1, _state(1), {"model": {"w": weights}, "optimizer": {"num_updates": torch.tensor(5)}})
    weights.zero_()
    saver.start()
    saver.drain()
    found = checkpoint.read_checkpoint(run.checkpoint(1))
    assert found.model["w"].eq(1.0).all()
    assert found.optimizer["num_updates"].item() == 5


def test_staging_memory_is_allocated_once(tmp_path: Path) -> None:
    run, tensors = _run(tmp_path), {"model": {"w": torch.ones(100)}, "optimizer": {}}
    saver = _saver(run)
    addresses = set()
    for step in (1, 2, 3):
        saver.stage(step, _state(step), tensors)
        addresses.add(next(iter(saver._staging.values()))._buffer.data_ptr())
        saver.start()
    saver.drain()
    assert len(addresses) == 1
    assert run.checkpoint_steps() == [2, 3]


def test_the_memory_of_lanes_that_are_no_more_is_given_back(tmp_path: Path) -> None:
    run, tensors = _run(tmp_path), {"model": {"w": torch.ones(100)}, "optimizer": {}}
    saver = _saver(run)
    for step, num_lanes in enumerate((4, 8, 8, 16), 1):
        saver.stage(step, _state(step), tensors, LaneTensors(num_lanes, 1, {"lane-00000000": torch.full((num_lanes, 3), float(step))}))
        saver.start()
        assert len([name for name in saver._staging if name.startswith("memory-")]) == 1
        assert len(saver._staging) == 2
    saver.drain()
    files = [path.name for path in run.checkpoint(4).iterdir() if path.name.startswith("memory-")]
    assert files == ["memory-00000000-00000016-of-00000016.safetensors"]


def test_a_slow_disk_does_not_hold_training_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, let_go, real_write = _run(tmp_path), threading.Event(), Staging.write

    def slow(self: Staging, *arguments: object) -> object:
        assert let_go.wait(60)
        return real_write(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Staging, "write", slow)
    saver = _saver(run)
    saver.stage(1, _state(1), {"model": {"w": torch.ones(100)}, "optimizer": {}})
    saver.start()
    for _ in range(3):  # steps go on; their status says that nothing is finished
        saver.receive(saver.report())
        assert saver.pending
    assert run.checkpoint_steps() == []
    let_go.set()
    saver.drain()
    assert not saver.pending
    assert run.checkpoint_steps() == [1]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync", "mkdir", "replace"])
def test_a_refusing_disk_fails_the_save_and_leaves_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    run = _run(tmp_path)
    tensors = {"model": {"w": torch.ones(100)}, "optimizer": {}}
    _save(run, 1, tensors)

    def refuse(*arguments: object, **_: object) -> None:
        raise OSError(number, os.strerror(number))

    saver = _saver(run)
    saver.stage(2, _state(2), tensors)
    monkeypatch.setattr(os, call, refuse)
    saver.start()
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        saver.drain()
    monkeypatch.undo()
    assert errors.exit_code(caught.value) == (errors.IO_ERROR if number == errno.EIO else errors.CANNOT_WRITE)
    if call == "write" and number != errno.EIO:
        assert f"file system {_mount_of(tmp_path)}" in errors.explain(caught.value)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-00000001"]
    assert checkpoint.problems(run.checkpoint(1)) == []


def _mount_of(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if os.path.ismount(parent))


def test_a_damaged_folder_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    run, tensors = _run(tmp_path), {"model": {"w": torch.ones(100)}, "optimizer": {}}
    _save(run, 1, tensors)
    (run.checkpoint(1) / "state.json").write_text("{}")
    _save(run, 1, tensors)
    assert checkpoint.problems(run.checkpoint(1)) == []
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000001"]


def test_what_is_kept():
    policy = Checkpointing(every_steps=10, keep_last=2, keep_every_steps=100)
    steps = [10, 100, 190, 200, 210, 220, 230]
    assert steps_to_keep(steps, policy, newest=220) == {100, 200, 210, 220, 230}
    assert steps_to_keep([5], policy, newest=5) == {5}


def test_pruning_never_leaves_a_half_deleted_checkpoint(tmp_path: Path) -> None:
    run = _run(tmp_path)
    for step in (1, 2, 3, 4):
        run.checkpoint(step).mkdir()
    prune(run, Checkpointing(every_steps=1, keep_last=2), newest=4)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-00000003", "step-00000004"]


def test_only_leftovers_of_this_runs_saves_are_removed(tmp_path: Path) -> None:
    run = _run(tmp_path)
    for leftover in (run.checkpoints / ".step-00000002.tmp-0011", run.checkpoints / ".step-00000001.tmp-aa"):
        leftover.mkdir()
        (leftover / "model").write_bytes(b"x")
    (run.path / ".metrics.jsonl.tmp-00").write_bytes(b"x")
    mine = {run.checkpoint(1), run.path / ".run.json.tmp-00", run.path / "notes.txt", run.checkpoints / ".hidden"}
    for path in mine:
        path.mkdir() if path == run.checkpoint(1) else path.write_bytes(b"x")
    assert remove_leftovers(run) == [".metrics.jsonl.tmp-00", ".step-00000001.tmp-aa", ".step-00000002.tmp-0011"]
    assert all(path.exists() for path in mine)
    assert len(list(run.path.rglob("*"))) == len(mine) + 1  # and the folder of checkpoints


def test_killed_before_every_touch_of_the_file_system(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(HERE / "crash_saves.py"), str(tmp_path)], env=_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    newest = found["newest"]
    assert len(newest) > 40, "the save has more calls than that: the hook does not see them"
    assert {"open", "write", "fsync", "replace", "mkdir", "rmdir", "unlink"} <= set(found["touches"])
    assert set(newest) == {2, 3}, "a loader must find the old or the new one"
    assert newest == sorted(newest), "and the new one for good once it was there"
    assert found["last_status"] == 0


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace")
def test_the_order_of_system_calls_survives_a_power_cut(tmp_path: Path) -> None:
    """Every file: written, then fsynced; then its folder; then the rename; then the folder around it."""
    script = f"""import sys; sys.path.insert(0, {str(HERE)!r}); import crash_saves
run = crash_saves.RunDir(crash_saves.Path({str(tmp_path)!r}))
run.checkpoints.mkdir()
crash_saves.save(run, 1)"""
    trace = tmp_path / "trace"
    calls = "trace=openat,write,fsync,close,rename,renameat2,mkdir,unlink"
    done = subprocess.run(
        ["strace", "-f", "-y", "-s0", "-e", calls, "-o", str(trace), sys.executable, "-c", script], env=_environment(), capture_output=True, timeout=300
    )
    if b"ptrace" in done.stderr.lower():
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in trace.read_text().splitlines() if str(tmp_path / "checkpoints") in line]
    commit = next(i for i, line in enumerate(lines) if re.search(r'rename\w*\(.*step-00000001"', line))
    written = {path for line in lines for path in re.findall(r"write\(\d+<([^>]+)>", line)}
    assert len(written) == 4  # model, optimizer, state, manifest
    for path in written:
        writes = [i for i, line in enumerate(lines) if f"<{path}>" in line and "write(" in line]
        syncs = [i for i, line in enumerate(lines) if f"<{path}>" in line and "fsync(" in line]
        assert max(writes) < min(i for i in syncs if i > max(writes)) < commit
        if path.endswith(".safetensors"):  # by the rank that wrote it: another node's fsync does not reach its cache
            assert min(syncs) < min(i for i, line in enumerate(lines) if f"<{path}>" in line and "close(" in line)
    folder_syncs = [i for i, line in enumerate(lines) if re.search(r"fsync\(\d+<[^>]*\.step-00000001\.tmp-[^/>]*>", line)]
    last_entry = max(i for i, line in enumerate(lines[:commit]) if "rename" in line or "O_CREAT" in line)
    assert last_entry < max(folder_syncs) < commit
    assert any(re.search(r"fsync\(\d+<[^>]*/checkpoints>", line) for line in lines[commit:])


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def _run(folder: Path) -> RunDir:
    run = RunDir(folder / "run")
    run.checkpoints.mkdir(parents=True)
    return run


def _state(step: int) -> dict[str, object]:
    return {"format": checkpoint.FORMAT, "run_id": "r", "step": step, "identity": {}}


def _saver(run: RunDir) -> Saver:
    return Saver(run, Solo(torch.device("cpu")), Checkpointing(every_steps=1, keep_last=2), start_id="start")


def _save(run: RunDir, step: int, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
    saver = _saver(run)
    saver.stage(step, _state(step), tensors)
    saver.start()
    saver.drain()
