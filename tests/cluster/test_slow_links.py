"""Slow links between the nodes of a real Slurm cluster: what crosses them, and that a node behind one is found and named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from prottrans_hpc import errors
from prottrans_hpc.launch.job_state import State

if TYPE_CHECKING:
    from .conftest import Cluster

WORK = Path(__file__).with_name("reduction_bytes.py")
HIERARCHICAL = {"reduction": "hierarchical"}


@pytest.mark.parametrize("placement", ["block", "cyclic"])
def test_less_crosses_between_the_nodes(cluster: Cluster, tmp_path: Path, placement: str) -> None:
    """Two nodes of three ranks; of n bytes a ring over all ranks sends 5/3 n over a link, or three times that, a hierarchy n."""
    settings = {"flat": {}, "hierarchical": HIERARCHICAL, "bf16": {"compression": "bf16"}, "powersgd": HIERARCHICAL | {"compression": "powersgd"}}
    where = ("--nodes=2", "--ntasks-per-node=3", f"--distribution={placement}", "--kill-on-bad-exit=1")
    told = cluster.run("srun", *where, sys.executable, str(WORK), str(tmp_path), json.dumps(settings), timeout_s=240).stdout
    crossing = json.loads(told.splitlines()[-1])
    assert crossing["flat"] == pytest.approx(5 / 3 * (3 if placement == "cyclic" else 1), rel=0.15)
    assert crossing["hierarchical"] == pytest.approx(1.0, rel=0.15)
    assert crossing["bf16"] == pytest.approx(0.5, rel=0.15)
    assert crossing["powersgd"] < 0.05


def test_a_node_behind_a_slow_link_is_named_and_does_not_pass_the_gate(cluster: Cluster, tmp_path: Path) -> None:
    cluster.shape("n3", 20)  # the others pass gigabits
    machine = cluster.profile(tmp_path)
    where = ("--machine", str(machine), "--nodes", "4", "--out", str(tmp_path / "preflight"))
    cluster.prottrans("comm", *where, "--max-mib", "1", "--repetitions", "2", "--limit", "0.2", "--gate", "4")
    job_id = cluster.job_ids(tmp_path / "preflight")[0]
    assert cluster.wait_ended(job_id) == State.FAILED
    log = "\n".join(path.read_text() for path in (tmp_path / "preflight" / "logs").iterdir())
    assert (tmp_path / "preflight" / "job.exit-code").read_text().strip() == str(errors.NO_RESOURCES), log
    found = json.loads((tmp_path / "preflight" / "comm.json").read_text())
    assert "n3" in found["hosts"]
    worst = next(slow for slow in found["slow_nodes"] if slow["what"] == "link")  # a busy machine may slow another one down as well
    assert worst["host"] == "n3"
    assert worst["factor"] > 4
    assert "(n3), its link to other nodes" in log
