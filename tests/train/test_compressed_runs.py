"""Whole runs whose gradients are compressed: what a return to a checkpoint makes of it, and the same runs over Horovod."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
POISONED = Path(__file__).with_name("poisoned_rank.py")
START_TIMEOUT_S = 240.0
WATCH = ("divergence.window=10", "divergence.patience=2", "divergence.z_score=20.0", "divergence.action=rollback", "checkpoint.every_steps=5")
LOW_RANK = ("parallel.compression=powersgd", "parallel.powersgd_rank=1")
ROOT_MAY_RUN_MPI = {f"{name}_ALLOW_RUN_AS_ROOT{confirm}": "1" for name in ("OMPI", "PRTE") for confirm in ("", "_CONFIRM")}


def test_a_return_to_a_checkpoint_in_the_process_is_that_of_a_new_process(tmp_path, make_run, start_ranks, outcome, same, history):
    """What low rank left out of the steps that are undone is dropped: otherwise the steps from there on would depend on who went back."""
    spike = {"POISON": json.dumps({"steps": [12, 13], "ranks": [0, 1], "how": "spike", "from_factor": 1.0})}
    straight = make_run(tmp_path / "straight", *WATCH, *LOW_RANK)
    start_ranks(straight, 2, main=POISONED, env=spike).end(0)
    assert [(event["step"], event["to"]) for event in history(straight) if event["event"] == "went back"] == [(13, 10)]
    stopped = make_run(tmp_path / "stopped", *WATCH, *LOW_RANK, stop_after_step=12)
    start_ranks(stopped, 2, main=POISONED, env=spike).end(0)
    make_run(stopped, *WATCH, *LOW_RANK)
    start_ranks(stopped, 2, main=POISONED, env=spike).end(0)
    same(outcome(stopped), outcome(straight))
    exact = make_run(tmp_path / "exact", *WATCH)
    start_ranks(exact, 2, main=POISONED, env=spike).end(0)
    assert outcome(exact)["metrics"][5]["loss"] != outcome(straight)["metrics"][5]["loss"]  # there is something to leave out


def start_mpirun(run_dir: Path, errors: Path) -> subprocess.Popen[bytes]:
    beside = Path(sys.executable).with_name("mpirun")
    argv = ["timeout", "-k", "5", str(int(START_TIMEOUT_S)), str(beside) if beside.exists() else "mpirun", "--map-by", ":OVERSUBSCRIBE", "-np", "2"]
    own = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | ROOT_MAY_RUN_MPI
    with errors.open("ab") as stream:
        command = [*argv, sys.executable, "-m", "prottrans_hpc", "pretrain", str(run_dir)]
        return subprocess.Popen(command, env=own, stdout=stream, stderr=stream, start_new_session=True)


def ranks_of(starter: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return [one for one in psutil.Process(starter.pid).children(recursive=True) if one.cmdline()[1:4] == ["-m", "prottrans_hpc", "pretrain"]]


@pytest.mark.horovod
@pytest.mark.mpi
@pytest.mark.parametrize("compression", [pytest.param("fp16", marks=pytest.mark.slow), "bf16"])
def test_horovod_takes_the_steps_of_the_torch_back_end_and_a_killed_run_goes_on_with_them(tmp_path, make_run, start_ranks, outcome, same, compression):
    settings = (f"parallel.compression={compression}", "checkpoint.every_steps=3")
    by_torch = make_run(tmp_path / "torch", *settings)
    start_ranks(by_torch, 2).end(0)
    by_horovod, errors = make_run(tmp_path / "horovod", *settings, "parallel.comm=horovod"), tmp_path / "horovod.err"
    first = start_mpirun(by_horovod, errors)
    deadline = time.monotonic() + START_TIMEOUT_S
    while first.poll() is None and not (by_horovod / "checkpoints" / "step-00000003").exists():
        assert time.monotonic() < deadline, errors.read_text()
        time.sleep(0.005)
    for rank in ranks_of(first)[-1:]:  # empty where they have come to the end meanwhile
        rank.send_signal(signal.SIGKILL)
    first.wait(START_TIMEOUT_S)
    assert start_mpirun(by_horovod, errors).wait(START_TIMEOUT_S) == 0, errors.read_text()
    same(outcome(by_horovod), outcome(by_torch))
