"""One run after another's weights, both in the queue of a real Slurm at once: the second waits, and refuses an ancestor that failed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from prottrans_hpc.launch.job_state import State

if TYPE_CHECKING:
    from .conftest import Cluster

SMALL = ("--set", "phases.0.global_batch_size=8", "--set", "validation.every_steps=0")
Submit = Callable[..., str]


@pytest.fixture
def submit(cluster: Cluster, small_corpus: Path, tmp_path: Path) -> Submit:
    def pretrain(folder: Path, *options: str) -> str:
        where = ("--corpus", str(small_corpus), "--machine", str(cluster.profile(tmp_path)), "--run-dir", str(folder), "--nodes", "2")
        cluster.prottrans("pretrain", "tiny_prot_bert", *SMALL, *where, *options, timeout_s=120)
        return cluster.job_ids(folder)[-1]

    return pretrain


def test_the_heir_waits_for_its_ancestor_and_begins_with_its_weights(submit: Submit, cluster: Cluster, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    before = submit(first, "--steps", "2")
    after = submit(second, "--steps", "1", "--set", "seed=43", "--init", str(first), "--init-optimizer", "--after", str(first))
    assert cluster.wait_ended(before) == State.DONE
    assert cluster.wait_ended(after) == State.DONE, (second / "logs" / "job.log").read_text()
    noted = json.loads((second / "init.json").read_text())
    assert (noted["checkpoint"], noted["step"]) == (str(first / "checkpoints" / "step-00000002"), 2)
    times = [[json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()] for folder in (first, second)]
    assert times[0][-1]["event"] == "stop" and times[0][-1]["time"] <= times[1][0]["time"]


def test_an_heir_whose_ancestor_was_cancelled_ends_for_good(submit: Submit, cluster: Cluster, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    before = submit(first, "--set", "phases.0.steps=1000000")
    submit(second, "--steps", "1", "--set", "seed=43", "--init", str(first), "--after", before, "--chain", "2")
    heir, rest = cluster.job_ids(second)
    cluster.run("scancel", before)
    assert cluster.wait_ended(before) == State.CANCELLED
    assert cluster.wait_ended(heir) == State.FAILED and cluster.wait_ended(rest) == State.CANCELLED
    assert "finish it, then start this one again" in (second / "logs" / "node-0000.log").read_text() + (second / "logs" / "job.log").read_text()
    assert int((second / "job.exit-code").read_text()) == 66
