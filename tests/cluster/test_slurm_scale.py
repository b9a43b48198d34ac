"""A scaling study on a real Slurm over slow links: all points in one job, then one more in a job of its own."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING

from prottrans_hpc.launch.job_state import State

if TYPE_CHECKING:
    from .conftest import Cluster

RATE_MBIT = 32
SMALL = ("--steps", "2", "--warmup", "1", "--repetitions", "1", "--set", "phases.0.global_batch_size=4")


def rows_of(out: Path) -> dict[str, dict[str, str]]:
    with (out / "scaling.csv").open(newline="") as file:
        return {row["nodes"]: row for row in csv.DictReader(file)}


def test_a_study_on_slow_links(cluster: Cluster, small_corpus: Path, tmp_path: Path) -> None:
    for node in cluster.nodes:
        cluster.shape(node, RATE_MBIT)
    out, machine = tmp_path / "study", cluster.profile(tmp_path)
    command = ("scale", "tiny_prot_bert", "--corpus", str(small_corpus), "--machine", str(machine), "--out", str(out), *SMALL)
    told = cluster.prottrans(*command, "--nodes", "1,2", "--one-job", timeout_s=120)
    assert "when the jobs have ended, the same command makes the report" in told.stderr
    (job_id,) = cluster.job_ids(out / "job")
    assert [cluster.job_ids(run) for run in sorted((out / "points").iterdir())] == [[job_id], [job_id]]
    assert cluster.wait_ended(job_id) == State.DONE, (out / "job" / "logs" / "job.log").read_text()
    assert (out / "report.html").is_file()  # the job has made it
    assert list(rows_of(out)) == ["1", "2"]
    points = {point["nodes"]: point for point in json.loads((out / "scaling.json").read_text())["points"]}
    assert [share["host"] for share in points[2]["per_node"]] == ["n1", "n2"]
    # Each rank sends its half of the gradients twice; one bucket holds them all, so nothing of it hides behind the backward pass.
    sent_s = 8 * json.loads((out / "scaling.json").read_text())["gradient_bytes"] / (RATE_MBIT * 1e6)
    assert float(rows_of(out)["2"]["exposed_comm_s"]) > 0.8 * sent_s
    assert float(rows_of(out)["1"]["exposed_comm_s"]) < 0.1 * sent_s
    followed = cluster.prottrans(*command, "--nodes", "1,2,3", "--follow", timeout_s=400)
    assert "2 points measured; to run, in this order: n0003-r1" in followed.stderr
    assert list(rows_of(out)) == ["1", "2", "3"]
    assert cluster.job_ids(out / "points" / "n0003-r1") != [job_id]
    assert list(out.glob("points/*/checkpoints")) == []
