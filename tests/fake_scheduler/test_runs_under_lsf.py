"""`prottrans runs` on a chain under the stand-in for LSF; the ranks are small programs that wait to be asked to stop."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .conftest import Lsf

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHON = """#!/bin/bash
# Ranks wait for the file that asks them to stop; begin and end are the real ones.
if [ "${3-}" != prottrans_hpc ]; then exec PYTHON "$@"; fi
echo "rank $JSM_NAMESPACE_RANK works"
while ! compgen -G "$5/.stop-*" >/dev/null; do sleep 0.1; done
echo "rank $JSM_NAMESPACE_RANK saves"
echo 75 > "$PROTTRANS_EXIT_CODE_FILE"
exit 75
"""
MACHINE = """
name = "small_lsf"
description = "two nodes"
scheduler = "lsf"
starter = "jsrun"
ranks_per_node = 1
max_nodes = 2
account_required = true
python = "FAKE"
setup_lines = ["export PYTHONPATH='REPOSITORY'"]

[node]
num_cpu_cores = 2

[[queues]]
name = "batch"
[[queues.bins]]
min_nodes = 1
max_nodes = 2
max_walltime_min = 120
"""


@pytest.fixture
def call(lsf: Lsf, prottrans: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """The real command line in a folder with a corpus and a machine, under a cluster of two nodes."""
    python = tmp_path / "python"
    python.write_text(PYTHON.replace("PYTHON", sys.executable))
    python.chmod(0o755)
    (tmp_path / "machine.toml").write_text(MACHINE.replace("FAKE", str(python)).replace("REPOSITORY", str(REPOSITORY)))
    split = {"sequences": 500, "residues": 50_000, "bytes": 0, "shards": []}
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "index.json").write_text(json.dumps({"format": 1, "splits": {"train": split, "validation": split}}))
    lsf.configure(racks=1, nodes_per_rack=2, cores=2, gpus=0, minute_s=60.0, terminate_interval_s=20.0)
    lsf.start()
    return lambda *arguments, **options: prottrans(*arguments, cwd=tmp_path, env=dict(lsf.environment), **options)


def test_a_chain_is_listed_followed_cancelled_and_resumed(call: Any, lsf: Lsf, prottrans: Any, tmp_path: Path) -> None:
    start = ("pretrain", "tiny_prot_bert", "--corpus", "corpus", "--machine", "machine.toml", "--nodes", "2", "--account", "BIO123", "--run-dir", "runs/first")
    call(*start, "--chain", "2")
    first, second = json.loads((tmp_path / "runs" / "first" / "job.json").read_text())["job_ids"]
    log = tmp_path / "runs" / "first" / "logs" / "job.log"

    def state() -> dict[str, Any]:
        (run,) = json.loads(call("runs", "--json").stdout)
        return dict(run)

    lsf.wait_for(lambda: log.exists() and log.read_text().count("works") == 2, "two ranks at work")
    run = state()
    assert (run["state"], run["reason"], run["nodes"]) == ("running", "1 more in the queue", 2)
    assert run["jobs"] == [{"id": first, "state": "RUNNING"}, {"id": second, "state": "PENDING"}]
    assert call("runs", "resume", "first", code=71).stderr.startswith("error: first is running")
    follower = subprocess.Popen(
        [*prottrans.argv, "runs", "logs", "first", "--follow"],
        cwd=tmp_path,
        env=dict(lsf.environment) | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert call("runs", "cancel", "first").stdout == f"job {second}: taken out of the queue\njob {first}: asked to save and stop\n"
    assert follower.communicate(timeout=120)[0].count("saves") == 2
    assert follower.returncode == 0
    assert state()["state"] == "cancelled"
    story = json.loads(call("runs", "show", "first", "--json").stdout)["history"]["starts"]
    assert [(row["job_id"], row["exit_code"], len(row["nodes"])) for row in story] == [(first, 75, 2)]
    assert call("runs", "cancel", "first").stdout.startswith("nothing to cancel")
    call("runs", "resume", "first", "--chain", "1")
    lsf.wait_for(lambda: log.read_text().count("works") == 4, "two ranks at work again")
    assert state()["state"] == "running"
    assert "#BSUB -P BIO123" in (tmp_path / "runs" / "first" / "job.sh").read_text()
    call("runs", "cancel", "first")
    lsf.wait_for(lambda: state()["state"] == "cancelled", "the end")
