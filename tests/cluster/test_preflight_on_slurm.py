"""A preflight on a real Slurm: a node behind a slow link keeps a training from starting, and the next job of its chain goes elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prottrans_hpc import errors
from prottrans_hpc.launch.job_state import State

if TYPE_CHECKING:
    from .conftest import Cluster

SMALL = ("--set", "phases.0.global_batch_size=8", "--set", "validation.every_steps=0", "--set", "phases.0.steps=20", "--steps", "2")
GATE = "40"
"""The slow link takes two hundred times as long as the others; on a busy machine these scatter by a factor of five."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_slow_node_ends_the_job_and_the_next_of_the_chain_trains_without_it(cluster: Cluster, small_corpus: Path, tmp_path: Path) -> None:
    cluster.shape("n3", 20)  # the others pass gigabits
    run_dir, machine = tmp_path / "run", cluster.profile(tmp_path, exclude_slow_nodes="true")
    where = ("--corpus", str(small_corpus), "--machine", str(machine), "--run-dir", str(run_dir), "--nodes", "4")
    cluster.prottrans("pretrain", "tiny_prot_bert", *SMALL, *where, "--chain", "2", "--preflight", f"comm:{GATE}:240")
    first, second = cluster.job_ids(run_dir)
    assert cluster.wait_ended(first, 240) == State.FAILED
    log = (run_dir / "logs" / "job.log").read_text()
    found = [event for event in read_lines(run_dir / "history.jsonl") if event["event"] == "slow node"]
    assert "n3" in [event["host"] for event in found], log
    assert next(event for event in found if event["host"] == "n3")["what"] == "link"
    assert "(n3), its link to other nodes" in log
    assert "no rank of the training was started (exit code 71)" in log
    assert f"and so does job {second} of this chain" in log
    (ended,) = [event for event in read_lines(run_dir / "jobs.jsonl") if event["event"] == "ended" and event["job_id"] == first]
    assert ended["code"] == errors.NO_RESOURCES
    assert ended["cause"].startswith("preflight: slow: ")
    assert [event for event in read_lines(run_dir / "history.jsonl") if event["event"] == "start" and event["time"] < ended["time"]] == []

    assert cluster.wait_ended(second, 240) == State.DONE, (run_dir / "logs" / "job.log").read_text()
    (begun,) = [event for event in read_lines(run_dir / "jobs.jsonl") if event["event"] == "begun" and event["job_id"] == second]
    assert "n3" not in begun["nodes"]
    assert [line["step"] for line in read_lines(run_dir / "metrics.jsonl")] == [1, 2]
    shown = cluster.prottrans("runs", "show", str(run_dir), "--json").stdout
    told = json.loads(shown)
    assert (told["state"], told["preflight"]["verdict"], told["preflight"]["backend"]) == ("done", "passed", "gloo")
    assert told["preflight"]["fits"][0]["latency_s"] >= 0
    assert [start["trains_from"] is None for start in told["history"]["starts"]] == [True, False]

    resumed = cluster.prottrans("runs", "resume", str(run_dir), "--steps", "3", "--dry-run")
    assert "#SBATCH --exclude=n3\n" in resumed.stdout
    assert "prottrans_hpc.launch.preflight slurm" in resumed.stdout
