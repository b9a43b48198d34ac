"""A job that is preempted or requeued goes on where it was, and comes to the same parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from prottrans_hpc.launch.job_state import State

if TYPE_CHECKING:
    from ..conftest import Cluster
    from .conftest import MakeTraining, Training

Outcome = dict[str, Any]
Same = Callable[[Outcome, Outcome], None]


def preempt(run: Training) -> None:
    """A job of a higher partition wants all nodes for some seconds."""
    run.cluster.submit("#!/bin/bash\nsleep 2\n", "--partition=batch", "--nodes=8", "--exclusive", "--time=1")


def requeue(run: Training) -> None:
    """What an operator types."""
    run.cluster.run("scontrol", "requeue", run.job_ids[0])


@pytest.mark.parametrize(("queue", "disturb"), [("killable", preempt), ("killable_at_once", preempt), ("batch", requeue)])
def test_a_disturbed_run_comes_to_the_same_parameters(
    training: MakeTraining, undisturbed: Outcome, same: Same, queue: str, disturb: Callable[[Training], None]
) -> None:
    run = training()
    run.submit(queue=queue)
    run.wait_for_step(60)
    disturb(run)
    again = run.wait_event("begun", 2)
    assert (again["job_id"], again["restart"]) == (run.job_ids[0], 1)
    run.wait_done()
    first, last = run.events("ended")
    assert first["code"] == 75 and first["cause"].startswith("SIG") and first["step"] == again["step"] > 60
    assert (last["code"], last["restart"], last["step"]) == (0, 1, 400)
    # In a grace period Slurm takes any exit for the end of the job; elsewhere it requeues by itself.
    assert [event["job_id"] for event in run.events("requeued")] == (run.job_ids if queue == "killable" else [])
    same(run.outcome(), undisturbed)
    assert not run.run_dir.lease.exists()


def test_a_second_job_in_the_same_run_directory_is_refused(cluster: Cluster, training: MakeTraining) -> None:
    run = training()
    run.submit(num_jobs=2)
    run.wait_for_step(5)
    refusal = run.submit(code=71)
    assert f"is in use by job {run.job_ids[0]} (RUNNING), {run.job_ids[1]} (PENDING)" in refusal
    by_hand = cluster.run("sbatch", "--parsable", str(run.run_dir.job_script)).stdout.strip()
    assert cluster.wait_ended(by_hand) is State.FAILED
    (refused,) = run.events("refused")
    assert refused["job_id"] == by_hand and f"is in use by job {run.job_ids[0]} on n" in refused["reason"]
    assert not run.run_dir.exit_code.exists(), "that file belongs to the job that runs"
    step = run.step
    cluster.run("scancel", *reversed(run.job_ids))
    cluster.wait(lambda: run.events("ended"), "the end after scancel")
    (ended,) = run.events("ended")
    assert (ended["job_id"], ended["code"]) == (run.job_ids[0], 75) and ended["step"] >= step
