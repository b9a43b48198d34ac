"""What a batch job knows of itself, and how the answers of real commands are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from prottrans_hpc.errors import ConfigError
from prottrans_hpc.launch.own_job import VITALS, identify


def test_a_slurm_job_counts_its_restarts() -> None:
    base = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CLUSTER_NAME": "lab"}
    first = identify("slurm", base, earlier_starts=lambda job_id: 9)
    assert (first.job_id, first.restart, first.cluster, first.nodes) == ("17", 0, "lab", ("n1", "n2"))
    assert identify("slurm", base | {"SLURM_RESTART_COUNT": "3"}, earlier_starts=lambda job_id: 9).restart == 3


def test_lsf_does_not_count_so_the_run_directory_does(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("batch2\n" + "h36n03\n" * 42 + "h36n04\n" * 42)
    found = identify("lsf", {"LSB_JOBID": "5", "LSB_DJOB_HOSTFILE": str(hosts)}, earlier_starts=lambda job_id: {"5": 2}[job_id])
    assert (found.job_id, found.restart, found.nodes) == ("5", 2, ("h36n03", "h36n04"))


def test_hosts_of_lsf_without_the_launch_node(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("batch3\n" + "a1\n" * 42 + "a2\n" * 42)
    nodes = VITALS["lsf"].nodes
    assert nodes({"LSB_DJOB_HOSTFILE": str(hosts), "LSB_MCPU_HOSTS": "h7 42"}) == ["a1", "a2"]
    assert nodes({"LSB_DJOB_HOSTFILE": str(tmp_path / "gone"), "LSB_MCPU_HOSTS": "batch3 1 h7 42 h9 42 "}) == ["h7", "h9"]
    assert nodes({"LSB_HOSTS": "batch3 h7 h7 h9"}) == ["h7", "h9"]
    # A cluster without launch nodes may call all of its nodes so.
    assert nodes({"LSB_MCPU_HOSTS": "login1 4"}) == ["login1"]
    assert nodes({}) == []


def test_outside_of_a_job_nothing_begins() -> None:
    with pytest.raises(ConfigError, match="SLURM_JOB_ID is not set"):
        identify("slurm", {"LSB_JOBID": "5"}, earlier_starts=lambda job_id: 0)


# Slurm 22.05.8, `scontrol show job --oneliner`: a job in its grace period, the same when it runs undisturbed, and when it is being requeued.
GRACE = (
    "JobId=1 JobName=sbatch JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0 "
    "PreemptEligibleTime=2026-11-21T15:25:43 PreemptTime=2026-11-21T15:25:47 SuspendTime=None SecsPreSuspend=0 Partition=killable"
)
CALM = GRACE.replace("PreemptTime=2026-11-21T15:25:47", "PreemptTime=None")
LEAVING = "JobId=3 JobName=sbatch JobState=COMPLETING Reason=None Dependency=(null) Requeue=1 Restarts=1 BatchFlag=1 SuspendTime=None SecsPreSuspend=0"


@pytest.mark.parametrize(
    ("output", "expected"), [(GRACE, True), (CALM, False), (LEAVING, False), (GRACE.replace("Requeue=1", "Requeue=0"), False), ("", False)]
)
def test_the_grace_period_is_recognised(output: str, expected: bool) -> None:
    assert VITALS["slurm"].is_being_preempted(output) is expected


def test_lost_nodes() -> None:
    said = "n1|idle\nn2|down*\nn3|allocated\nn4|mixed*\nn5|drained\nn5|down\nn6|completing\n"
    assert VITALS["slurm"].parse_lost_nodes(said) == ["n2", "n4", "n5"]
