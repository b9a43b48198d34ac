"""`prottrans runs` on real jobs of a real Slurm, from a shell on the login node that knows nothing but the run's folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..conftest import Cluster
    from .conftest import MakeTraining

RANKS = r"""for p in /proc/[0-9]*; do
  if tr '\0' ' ' <$p/cmdline 2>/dev/null | grep -q '^[^ ]*python[^ ]* -P -m prottrans_hpc pretrain'; then echo ${p#/proc/}; fi
done"""


def test_a_chain_is_listed_shown_cancelled_and_resumed(cluster: Cluster, training: MakeTraining) -> None:
    run = training()
    runs, name = ("runs", "--runs", str(run.folder.parent)), run.folder.name

    def listed() -> dict[str, Any]:
        (row,) = json.loads(cluster.prottrans(*runs, "--json").stdout)
        return dict(row)

    run.steps = 1000  # more than it ever takes
    run.submit(num_jobs=3)
    first, second, third = run.job_ids
    run.wait_for_step(60)
    row = listed()
    assert (row["state"], row["reason"], row["nodes"]) == ("running", "2 more in the queue", 2)
    assert row["jobs"] == [{"id": first, "state": "RUNNING"}, {"id": second, "state": "PENDING"}, {"id": third, "state": "PENDING"}]
    assert "two jobs must never train into one run directory" in cluster.prottrans(*runs, "resume", name, code=71).stderr
    # The first job loses a rank; the second takes its steps again.
    victim = run.events("begun")[-1]["nodes"][1]
    cluster.run("kill", "-KILL", *cluster.run("bash", "-c", RANKS, node=victim).stdout.split(), node=victim)
    resumed_at = run.wait_event("begun", 2)["step"]
    run.wait_for_start(2)
    assert f" on {victim}: " not in cluster.prottrans(*runs, "logs", name, "--node", "0", "-n", "1000").stdout
    assert f" INFO {victim} rank 1 " in cluster.prottrans(*runs, "logs", name, "--node", "1", "-n", "1000").stdout
    assert cluster.prottrans(*runs, "cancel", name).stdout == f"job {third}: taken out of the queue\njob {second}: asked to save and stop\n"
    cluster.wait(lambda: len(run.events("ended")) == 2, "the second job to end")
    cluster.wait(lambda: listed()["state"] == "cancelled", "the verdict")
    story = json.loads(cluster.prottrans(*runs, "show", name, "--json").stdout)["history"]
    lost, stopped = story["starts"]
    assert (lost["job_id"], lost["exit_code"], len(lost["nodes"])) == (first, 137, 2) and f"lost rank 1 on {victim}" in lost["cause"]
    assert lost["steps_lost"] > 0 and lost["node_hours_wasted"] > 0 and story["steps_lost"] == lost["steps_lost"]
    assert (stopped["job_id"], stopped["exit_code"], stopped["step"], stopped["steps_lost"]) == (second, 75, resumed_at, 0)
    told = cluster.prottrans(*runs, "show", name).stdout
    assert f"lost rank 1 on {victim}" in told and "(exit code 137)" in told and "steps taken again" in told and "node-hours wasted" in told
    last = stopped["stop_step"] + 5
    done = cluster.prottrans(*runs, "resume", name, "--chain", "1", "--steps", str(last), "--follow", timeout_s=200)
    assert f"step {last} of {last}" in done.stdout and "done: embed with" in done.stderr
    assert listed()["state"] == "done"
    assert f"it has step {last} of {last}; it can go on with --steps 1000" in cluster.prottrans(*runs, "resume", name, code=64).stderr
