"""The starters that are not ours, for real: codes, signals and kills mean the same under each of them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from prottrans_hpc import config

if TYPE_CHECKING:
    from .conftest import Job

STARTERS = [pytest.param("mpirun", marks=pytest.mark.mpi), "torchrun"]


def machine(folder: Path, starter: str) -> list[str]:
    """The laptop with another starter."""
    text = (config.folder_of("hpc") / "laptop.toml").read_text().replace('starter = "processes"', f'starter = "{starter}"')
    path = folder / f"{starter}.toml"
    path.write_text(text)
    return ["--machine", str(path)]


@pytest.mark.parametrize("starter", STARTERS)
@pytest.mark.parametrize("code", [0, 65])
def test_exit_codes_come_through(job: Job, starter: str, code: int) -> None:
    job.behave({0: {"code": 0}, 1: {"code": 0}} if code == 0 else {1: {"code": code}})  # else rank 0 waits until it is told
    process = job.start("--nodes", "2", *machine(job.folder, starter))
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == code, stderr
    assert (job.run_dir / "job.exit-code").read_text() == f"{code}\n"
    assert not list(job.run_dir.glob(".exit-code-*"))


@pytest.mark.parametrize("starter", STARTERS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_every_rank_to_stop(job: Job, starter: str, number: signal.Signals) -> None:
    process = job.start("--nodes", "2", *machine(job.folder, starter))
    job.rank(0), job.rank(1)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 75, stderr
    assert all(job.got(rank) for rank in range(2))  # torchrun may say it twice


@pytest.mark.parametrize("starter", [*STARTERS, "none"])
def test_sigkill_of_the_command_line_leaves_no_rank(job: Job, starter: str) -> None:
    ranks = range(1 if starter == "none" else 2)
    process = job.start("--nodes", str(len(ranks)), *machine(job.folder, starter))
    pids = [job.pid(rank) for rank in ranks]
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    job.wait_gone(pids)


@pytest.mark.horovod
def test_horovod_trains_on_this_computer(small_corpus: Path, prottrans: Callable[..., Any], tmp_path: Path) -> None:
    small = ["--set", "phases.0.global_batch_size=8", "--set", "validation.every_steps=0", "--set", "parallel.comm=horovod", "--steps", "2"]
    where = ["--corpus", str(small_corpus), "--run-dir", str(tmp_path / "horovod"), "--nodes", "2", "--machine", "laptop_mpi"]
    done = prottrans("pretrain", "tiny_prot_bert", *small, *where)
    assert "2 ranks over horovod" in done.stderr
    assert len((tmp_path / "horovod" / "metrics.jsonl").read_text().splitlines()) == 2
    assert sys.executable in (tmp_path / "horovod" / "job.sh").read_text()
