"""Pre-training over several nodes by the real command line on a real Slurm: states, exit codes, signals, cancelling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from prottrans_hpc.launch.job_state import State

if TYPE_CHECKING:
    from .conftest import Cluster

SMALL = ("--set", "phases.0.global_batch_size=8", "--set", "validation.every_steps=0")
ENDLESS = ("--set", "phases.0.steps=1000000", "--set", "checkpoint.every_steps=1000000")


class Training:
    """`prottrans pretrain` of the tiny ProtBert on the cluster."""

    def __init__(self, cluster: Cluster, corpus: Path, folder: Path) -> None:
        self.cluster, self.corpus, self.folder = cluster, corpus, folder
        self.run_dir = folder / "run"

    def submit(self, *options: str, nodes: int = 2, **profile: Any) -> str:
        machine = self.cluster.profile(self.folder, **profile)
        where = ("--corpus", str(self.corpus), "--machine", str(machine), "--run-dir", str(self.run_dir), "--nodes", str(nodes))
        self.cluster.prottrans("pretrain", "tiny_prot_bert", *SMALL, *where, *options, timeout_s=120)
        return self.cluster.job_ids(self.run_dir)[-1]

    def story(self) -> str:
        logs = [self.run_dir / "logs" / "job.log", *sorted(self.run_dir.glob("logs/node-*.log"))]
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in logs if path.is_file())

    @property
    def code(self) -> int:
        return int((self.run_dir / "job.exit-code").read_text())

    @property
    def steps(self) -> list[int]:
        path = self.run_dir / "metrics.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().split("\n")[:-1]] if path.is_file() else []

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.run_dir / "checkpoints").iterdir() if not path.name.startswith("."))

    def wait_training(self) -> None:
        self.cluster.wait(lambda: self.steps, "the first step", 120)


@pytest.fixture
def training(cluster: Cluster, small_corpus: Path, tmp_path: Path) -> Training:
    return Training(cluster, small_corpus, tmp_path)


def test_two_nodes_train_and_the_same_command_resumes(training: Training, cluster: Cluster) -> None:
    first = training.submit("--steps", "2", ranks_per_node=2)
    assert cluster.states([first])[first] in (State.PENDING, State.RUNNING)
    assert cluster.wait_ended(first) == State.DONE, training.story()
    assert (training.code, training.steps, training.checkpoints) == (0, [1, 2], ["step-00000002"])
    assert "4 ranks over torch" in training.story()
    hosts = json.loads((training.run_dir / "environment.json").read_text())
    assert {"n1", "n2"} <= set(json.dumps(hosts).replace('"', " ").split())
    second = training.submit("--steps", "3", nodes=3)
    assert cluster.wait_ended(second) == State.DONE, training.story()
    assert (training.code, training.steps) == (0, [1, 2, 3])
    assert cluster.states([first, second]) == {first: State.DONE, second: State.DONE}


@pytest.mark.horovod
def test_two_nodes_train_with_horovod_under_mpirun(training: Training, cluster: Cluster) -> None:
    job_id = training.submit("--steps", "2", "--set", "parallel.comm=horovod", starter="mpirun")
    assert cluster.wait_ended(job_id) == State.DONE, training.story()
    assert (training.code, training.steps, training.checkpoints) == (0, [1, 2], ["step-00000002"])
    assert "2 ranks over horovod" in training.story()


def test_the_walltime_warning_becomes_a_checkpoint(training: Training, cluster: Cluster) -> None:
    job_id = training.submit(*ENDLESS)
    training.wait_training()
    # From here on the job is inside the minute (warning_min) before its end; Slurm looks every 30 s.
    cluster.run("scontrol", "update", f"jobid={job_id}", "timelimit=1")
    assert cluster.wait_ended(job_id) == State.FAILED, training.story()
    assert training.code == 75, training.story()
    assert training.checkpoints == [f"step-{training.steps[-1]:08d}"]
    assert "SIGUSR1" in (training.run_dir / "history.jsonl").read_text()


@pytest.mark.parametrize("starter", ["srun", "mpirun"])
def test_cancelling_lets_the_ranks_save(training: Training, cluster: Cluster, starter: str) -> None:
    job_id = training.submit(*ENDLESS, starter=starter)
    waiting = cluster.submit("#!/bin/bash\ntrue\n", f"--dependency=afterany:{job_id}")
    training.wait_training()
    program = "import sys; from prottrans_hpc.launch import submission; [submission.cancel('slurm', job_id) for job_id in sys.argv[1:]]"
    cluster.python("-c", program, waiting, job_id)
    assert cluster.wait_ended(job_id) == State.FAILED, training.story()
    assert (training.code, training.checkpoints) == (75, [f"step-{training.steps[-1]:08d}"]), training.story()
    assert cluster.states([job_id, waiting]) == {job_id: State.FAILED, waiting: State.CANCELLED}


def test_a_plain_scancel_leaves_time_to_save_as_well(training: Training, cluster: Cluster) -> None:
    job_id = training.submit(*ENDLESS)
    training.wait_training()
    cluster.run("scancel", job_id)
    assert cluster.wait_ended(job_id) == State.CANCELLED, training.story()
    assert training.checkpoints == [f"step-{training.steps[-1]:08d}"], training.story()
