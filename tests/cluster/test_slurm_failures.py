"""A slow node of a real Slurm: it is named by its host, and the next start does without it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prottrans_hpc.launch.job_state import State

if TYPE_CHECKING:
    from .conftest import Cluster

SETTINGS = ("health.slow_window_steps=3", "health.slow_patience=2", "health.slow_factor=1.5", "phases.0.steps=1000000", "phases.0.global_batch_size=8")
SETTINGS += ("validation.every_steps=0", "checkpoint.every_steps=1000000")


def host_pid_of_rank(run_dir: Path, rank: int) -> int:
    """The process of a rank on this computer: the nodes' namespaces hide it from one another, not from us."""
    for place in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if place.name.isdecimal() and f"{run_dir}\0".encode() in (place / "cmdline").read_bytes() + b"\0":
                environment = (place / "environ").read_bytes().split(b"\0")
                command = (place / "cmdline").read_bytes().split(b"\0")
                if f"SLURM_PROCID={rank}".encode() in environment and b"pretrain" in command and b"python" in command[0]:
                    return int(place.name)
    raise AssertionError(f"rank {rank} of {run_dir} is not there")


def slow_hosts(run_dir: Path) -> list[str]:
    """Nodes that the history names."""
    events: list[dict[str, Any]] = [json.loads(line) for line in (run_dir / "history.jsonl").read_text().splitlines()]
    return [str(event["host"]) for event in events if event["event"] == "slow node"]


def test_a_slow_node_is_named_and_the_next_start_does_without_it(
    cluster: Cluster, small_corpus: Path, tmp_path: Path, held_up: Callable[[int], AbstractContextManager[None]]
) -> None:
    run_dir = tmp_path / "run"
    where = ("--corpus", str(small_corpus), "--machine", str(cluster.profile(tmp_path)), "--run-dir", str(run_dir), "--nodes", "2")
    cluster.prottrans("pretrain", "tiny_prot_bert", *where, *(word for setting in SETTINGS for word in ("--set", setting)), timeout_s=120)
    (first,) = cluster.job_ids(run_dir)
    cluster.wait(lambda: (run_dir / "metrics.jsonl").is_file() and (run_dir / "metrics.jsonl").read_text(), "the first step", 120)
    with held_up(host_pid_of_rank(run_dir, 1)):
        cluster.wait(lambda: "n2" in slow_hosts(run_dir), "the slow node n2 to be named", 120)
    cluster.prottrans("runs", "cancel", str(run_dir))
    assert not cluster.wait_ended(first).is_alive
    shown = cluster.prottrans("runs", "show", str(run_dir)).stdout
    assert "node 1 (n2) is slow" in shown
    cluster.prottrans("runs", "resume", str(run_dir), "--exclude", "n2", "--steps", "1000000", timeout_s=120)
    (second,) = cluster.job_ids(run_dir)
    cluster.wait(lambda: cluster.state(second) == State.RUNNING, "the second job to run", 60)
    placed = cluster.run("squeue", "--noheader", f"--jobs={second}", "--format=%N").stdout.strip()
    assert placed == "n[1,3]"
