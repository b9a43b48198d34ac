"""Pre-training under the stand-in for LSF with the real command line: 2 nodes x 2 resource sets, torch and gloo, real ranks.

`jsrun` passes no signal on here and ends with 1 whatever a rank ended with: what works does so by files in the run directory.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from prottrans_hpc.durable import read_json
from prottrans_hpc.launch.schedulers import SCHEDULERS

if TYPE_CHECKING:
    from .conftest import Lsf

REPOSITORY = Path(__file__).resolve().parents[2]
MACHINE = """
name = "small_lsf"
description = "four nodes of two cores"
scheduler = "lsf"
starter = "jsrun"
ranks_per_node = 2
max_nodes = 4
account_required = true
warning_min = 10
header_lines = ['#BSUB -alloc_flags "smt4 nvme"']
setup_lines = ["export PYTHONPATH='REPOSITORY'"]

[node]
num_cpu_cores = 2

[[queues]]
name = "batch"
[[queues.bins]]
min_nodes = 1
max_nodes = 4
max_walltime_min = 120

[[queues]]
name = "killable"
preemptable = true
preemptable_after_min = 120
[[queues.bins]]
min_nodes = 1
max_nodes = 4
max_walltime_min = 1440
"""
SMALL = ("--set", "phases.0.global_batch_size=8", "--set", "validation.every_steps=0", "--set", "checkpoint.every_steps=1000")
NEVER = 100_000
"""More steps than a test ever waits for."""


@dataclass(frozen=True)
class Pretraining:
    """One run under the stand-in."""

    lsf: Lsf
    prottrans: Callable[..., Any]
    corpus: Path
    run_dir: Path
    machine: Path

    def submit(self, *arguments: str, steps: int = NEVER) -> list[str]:
        """Submit with the real command; the job ids."""
        recipe = ["pretrain", "tiny_prot_bert", *SMALL, "--set", f"phases.0.steps={max(steps, 20)}", "--steps", str(steps), "--corpus", str(self.corpus)]
        where = ["--run-dir", str(self.run_dir), "--machine", str(self.machine), "--nodes", "2", "--account", "BIO123"]
        self.prottrans(*recipe, *where, *arguments, env={**self.lsf.environment, "LD_PRELOAD_ME": "of this shell", "LSB_JOBID": "7", "JSM_NAMESPACE_RANK": "5"})
        return list(read_json(self.run_dir / "job.json")["job_ids"])

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.run_dir / name
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []

    @property
    def step(self) -> int:
        steps = [line["step"] for line in self.lines("metrics.jsonl")]
        return steps[-1] if steps else 0

    def wait_for_step(self, step: int) -> None:
        self.lsf.wait_for(lambda: self.step >= step, f"step {step}:\n{self.log}")

    def wait_for_start(self, number: int) -> dict[str, Any]:
        """What the trainer noted at its first, second, ... start."""

        def starts() -> list[dict[str, Any]]:
            return [line for line in self.lines("history.jsonl") if line["event"] == "start"]

        self.lsf.wait_for(lambda: len(starts()) >= number, f"start {number}:\n{self.log}")
        return starts()[number - 1]

    @property
    def log(self) -> str:
        path = self.run_dir / "logs" / "job.log"
        return path.read_text() if path.exists() else "no log"

    def saved(self) -> int:
        steps = [int(path.name.removeprefix("step-")) for path in (self.run_dir / "checkpoints").glob("step-*")]
        return max(steps, default=0)

    def causes(self) -> list[str]:
        """Why each start stopped."""
        return [line["cause"] for line in self.lines("history.jsonl") if line["event"] == "stop"]

    def ranks(self) -> list[int]:
        """The process ids of the ranks that run now."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                variables = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if f"FAKE_LSF={self.lsf.folder}".encode() in variables and any(name.startswith(b"JSM_NAMESPACE_RANK=") for name in variables):
                found.append(int(path.parent.name))
        return found


@pytest.fixture
def pretraining(lsf: Lsf, prottrans: Callable[..., Any], small_corpus: Path, tmp_path: Path) -> Pretraining:
    machine = tmp_path / "small_lsf.toml"
    machine.write_text(MACHINE.replace("REPOSITORY", str(REPOSITORY)))
    # Minutes are real ones, and a test puts the clock forward when the training has got where it wants it.
    lsf.configure(racks=1, nodes_per_rack=4, cores=2, gpus=0, minute_s=60.0, terminate_interval_s=20.0)
    lsf.start()
    return Pretraining(lsf, prottrans, small_corpus, tmp_path / "two words [1-4]" / "run", machine)


@pytest.mark.parametrize("resource_set", ["rank", "node"])
def test_a_job_trains_to_the_end(pretraining: Pretraining, resource_set: str) -> None:
    pretraining.machine.write_text(pretraining.machine.read_text().replace("warning_min", f'resource_set = "{resource_set}"\nwarning_min'))
    (job,) = pretraining.submit(steps=4)
    done = pretraining.lsf.wait(job, "DONE", "EXIT")
    assert done["stat"] == "DONE", pretraining.log
    assert (pretraining.step, pretraining.saved()) == (4, 4)
    assert (pretraining.run_dir / "job.exit-code").read_text() == "0\n"
    assert sorted(path.name for path in (pretraining.run_dir / "logs").iterdir()) == ["job.log", f"lsf-{job}.log", "node-0000.log", "node-0001.log"]
    assert "4 ranks over torch" in (pretraining.run_dir / "logs" / "node-0000.log").read_text()
    assert (done["project"], done["queue"], done["walltime_min"], done["alloc_flags"], done["rerunnable"]) == ("BIO123", "batch", 120, "smt4 nvme", True)
    assert not {"LD_PRELOAD_ME", "LSB_JOBID", "JSM_NAMESPACE_RANK", "PYTHONPATH"} & done["environment"].keys(), "stated, not inherited"
    assert (done["warning"], done["out"]) == (["USR1", 10], str(pretraining.run_dir / "logs" / "lsf-%J.log"))


def test_a_preflight_that_measures_nothing_keeps_the_gate_closed_and_one_that_passes_opens_it(pretraining: Pretraining) -> None:
    (job,) = pretraining.submit("--preflight", "comm:1000:1", steps=3)  # within one second no rank has even begun
    assert pretraining.lsf.wait(job, "DONE", "EXIT")["stat"] == "EXIT", pretraining.log
    assert (pretraining.run_dir / "job.exit-code").read_text() == "71\n"
    assert "The gate stays closed: no rank of the training was started" in pretraining.log
    (ended,) = [line for line in pretraining.lines("jobs.jsonl") if line["event"] == "ended"]
    assert (ended["code"], ended["cause"], pretraining.step) == (71, "preflight failed: it did not end within 1 s", 0)
    pretraining.lsf.wait_for(lambda: not pretraining.ranks(), "the ranks of the preflight to be gone")

    (job,) = pretraining.submit("--preflight", "comm:1000", steps=3)
    assert pretraining.lsf.wait(job, "DONE", "EXIT")["stat"] == "DONE", pretraining.log
    assert (pretraining.step, pretraining.saved()) == (3, 3)
    found = read_json(pretraining.run_dir / "preflight.json")
    assert (found["verdict"], found["backend"], found["nodes"], found["ranks"]) == ("passed", "gloo", 2, 4)
    assert {fit["scope"] for fit in found["fits"]} == {"world", "node", "between"}


def test_a_warning_during_the_preflight_stops_the_job_before_it_trains(pretraining: Pretraining) -> None:
    (job,) = pretraining.submit("--preflight", "comm:1000", steps=3)
    pretraining.lsf.wait(job, "RUN")
    pretraining.lsf.wait_for(lambda: pretraining.ranks(), f"the ranks of the preflight:\n{pretraining.log}")
    pretraining.lsf.put_clock_forward(111)
    assert pretraining.lsf.wait(job, "DONE", "EXIT")["stat"] == "EXIT", pretraining.log
    assert ((pretraining.run_dir / "job.exit-code").read_text(), pretraining.step) == ("75\n", 0), pretraining.log
    assert "stopped by a signal to the job script" in pretraining.causes()[-1] or "SIGUSR1" in pretraining.causes()[-1]
    assert sorted(path.name for path in pretraining.run_dir.glob(".stop-*")) == []


def test_the_warning_saves_and_the_chain_goes_on_bitwise(pretraining: Pretraining, tmp_path: Path) -> None:
    """Two of three jobs are stopped by their warning; the third finishes, and what comes out is that of an undisturbed run."""
    first, second, third = pretraining.submit("--chain", "3", steps=40)
    for job, goal in ((first, 3), (second, 6)):
        pretraining.lsf.wait(job, "RUN")
        pretraining.wait_for_step(goal)
        pretraining.lsf.put_clock_forward(111)  # of 120 minutes, with a warning 10 minutes before the end
        ended = pretraining.lsf.wait(job, "EXIT")
        assert (ended["exit_code"], ended["exit_reason"]) == (75, None), pretraining.log
        assert pretraining.saved() == pretraining.step
    assert pretraining.lsf.wait(third, "DONE", "EXIT")["stat"] == "DONE", pretraining.log
    assert pretraining.causes() == ["SIGUSR1 to the job script"] * 2 + ["done"]
    assert [line["step"] for line in pretraining.lines("metrics.jsonl")] == list(range(1, 41))
    assert not list(pretraining.run_dir.glob(".stop-*")) and not list(pretraining.run_dir.glob(".exit-code-*"))
    undisturbed = tmp_path / "undisturbed"
    laptop = tmp_path / "two_ranks.toml"
    laptop.write_text(
        'name = "two_ranks"\ndescription = "-"\nscheduler = "local"\nstarter = "processes"\nranks_per_node = 2\nmax_nodes = 2\n[node]\nnum_cpu_cores = 4\n'
    )
    recipe = ["pretrain", "tiny_prot_bert", *SMALL, "--set", "phases.0.steps=40", "--corpus", str(pretraining.corpus)]
    pretraining.prottrans(*recipe, "--run-dir", str(undisturbed), "--machine", str(laptop), "--nodes", "2")
    assert tensors_of(undisturbed, 40) == tensors_of(pretraining.run_dir, 40)


def tensors_of(run_dir: Path, step: int) -> dict[str, bytes]:
    """The files of a checkpoint that hold tensors."""
    files = {path.name: path.read_bytes() for path in (run_dir / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")}
    assert files
    return files


def test_ranks_that_hear_nothing_are_killed_after_the_walltime_and_the_next_job_goes_on(pretraining: Pretraining) -> None:
    first, second = pretraining.submit("--chain", "2", "--set", "checkpoint.every_steps=2")
    pretraining.lsf.wait_for(lambda: pretraining.saved() >= 2, "a checkpoint")
    for pid in pretraining.ranks():
        os.kill(pid, signal.SIGSTOP)
    pretraining.lsf.put_clock_forward(131)
    ended = pretraining.lsf.wait(first, "EXIT")
    assert ended["exit_reason"].startswith("TERM_RUNLIMIT")
    resumes_at = pretraining.saved()
    assert pretraining.wait_for_start(2)["step"] == resumes_at
    pretraining.lsf.wait_for(lambda: pretraining.saved() > resumes_at, f"another checkpoint:\n{pretraining.log}")
    pretraining.lsf.run("bkill", second)
    assert pretraining.lsf.wait(second, "EXIT")["exit_code"] == 75, pretraining.log


@pytest.mark.parametrize("how", ["brequeue", pytest.param("preempt", marks=pytest.mark.slow), pytest.param("host failure", marks=pytest.mark.slow)])
def test_a_job_that_is_queued_again_resumes_under_its_id(pretraining: Pretraining, how: str) -> None:
    (job,) = pretraining.submit("--queue", "killable", "--set", "checkpoint.every_steps=2")
    pretraining.lsf.wait_for(lambda: pretraining.saved() >= 2, f"a checkpoint:\n{pretraining.log}")
    if how == "brequeue":
        assert pretraining.lsf.run("brequeue", job).returncode == 0
    else:
        pretraining.lsf.put_clock_forward(121)  # a killable job is left alone for two hours
        pretraining.lsf.ask(job, how)
    pretraining.lsf.wait_for(lambda: pretraining.lsf.job(job)["starts"] == 2, f"the second start:\n{pretraining.log}")
    ends_at = pretraining.saved()
    assert pretraining.wait_for_start(2)["step"] == ends_at
    if how != "host failure":
        assert pretraining.causes() == ["SIGINT to the job script"]
    before = len(pretraining.causes())
    cancel(pretraining.lsf, job)
    assert pretraining.lsf.wait(job, "EXIT")["exit_code"] == 75, pretraining.log
    assert pretraining.causes()[before:] == ["SIGUSR1 to the job script"]


def cancel(lsf: Lsf, job_id: str) -> None:
    """As `prottrans runs cancel` does it."""
    subprocess.run(SCHEDULERS["lsf"].cancel_argv(job_id), env=lsf.environment, check=True, timeout=60)


def test_a_failure_that_nothing_cures_ends_the_chain(pretraining: Pretraining) -> None:
    """One rank's exit code, 65 for a damaged corpus, comes through a jsrun that says 1, and the jobs behind are cancelled."""
    corpus = pretraining.machine.parent / "damaged"
    corpus.mkdir()
    for path in pretraining.corpus.iterdir():
        (corpus / path.name).write_bytes(path.read_bytes())
    damaged = Pretraining(pretraining.lsf, pretraining.prottrans, corpus, pretraining.run_dir, pretraining.machine)
    pretraining.lsf.stop()  # the jobs wait, and meanwhile the corpus loses a piece
    first, second = damaged.submit("--chain", "2")
    shard = next(corpus.glob("train-*"))
    shard.write_bytes(shard.read_bytes()[:1000])
    pretraining.lsf.start()
    assert pretraining.lsf.wait(first, "EXIT")["exit_code"] == 65, damaged.log
    assert pretraining.lsf.wait(second, "EXIT")["starts"] == 0
