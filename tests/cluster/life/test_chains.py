"""Chains of jobs: each resumes where the one before it stopped, and none is left over."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from prottrans_hpc.launch.job_state import State

if TYPE_CHECKING:
    from ..conftest import Cluster
    from .conftest import MakeTraining


def warn(cluster: Cluster, job_id: str) -> None:
    """What Slurm does a minute (warning_min) before the end of the walltime: the very signal to the very shell."""
    cluster.run("scancel", "--batch", "--signal=USR1", job_id)


def test_a_chain_trains_to_the_end_and_cancels_what_is_left(
    cluster: Cluster, training: MakeTraining, undisturbed: dict[str, Any], same: Callable[[dict[str, Any], dict[str, Any]], None]
) -> None:
    run = training()
    run.submit(num_jobs=4, walltime_min=3)
    first, second, third, fourth = run.job_ids
    run.wait_for_step(20)
    warn(cluster, first)
    run.wait_event("begun", 2)
    (ended,) = run.events("ended")
    assert (ended["job_id"], ended["code"], ended["cause"]) == (first, 75, "SIGUSR1")
    run.wait_for_start(2)
    warn(cluster, second)
    run.wait_done()
    assert [(event["job_id"], event["code"]) for event in run.events("ended")] == [(first, 75), (second, 75), (third, 0)]
    cluster.wait(lambda: run.events("cancelled_rest"), "the end of the chain")
    (cut,) = run.events("cancelled_rest")
    assert (cut["job_id"], cut["cancelled"], cut["reason"]) == (third, [fourth], "the work is done")
    cluster.wait_ended(third)  # its script goes on for a moment after that
    assert cluster.states(run.job_ids) == {first: State.FAILED, second: State.FAILED, third: State.DONE, fourth: State.CANCELLED}
    same(run.outcome(), undisturbed)
    # Submitted once more, it starts no rank and its chain is over at once.
    log = run.log
    run.submit(num_jobs=2)
    assert cluster.wait_ended(run.job_ids[0]) is State.DONE
    assert cluster.wait_ended(run.job_ids[1]) is State.CANCELLED
    assert "nothing to do: step 400 of 400 was reached before" in run.log[len(log) :] and "rank 0" not in run.log[len(log) :]


@pytest.mark.slow
def test_three_jobs_of_a_chain_by_real_walltimes(cluster: Cluster, training: MakeTraining, same: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Slurm itself warns the first and the second; it looks at its clock every 30 s."""
    run, straight = (training(name, settings=("phases.0.steps=1000000",)) for name in ("chain", "straight"))
    run.steps = 1_000_000
    run.submit(num_jobs=3, walltime_min=10)
    for number, job_id in enumerate(run.job_ids[:2], 1):
        assert run.wait_event("begun", number)["job_id"] == job_id
        run.wait_for_start(number)
        cluster.run("scontrol", "update", f"jobid={job_id}", "timelimit=1")
        ended = run.wait_event("ended", number)
        assert (ended["job_id"], ended["code"], ended["cause"]) == (job_id, 75, "SIGUSR1"), run.story()
    run.wait_for_start(3)
    warn(cluster, run.job_ids[2])
    third = run.wait_event("ended", 3)
    assert third["code"] == 75 and third["step"] >= run.events("ended")[1]["step"] > run.events("ended")[0]["step"] > 0
    cluster.wait(lambda: not cluster.run("squeue", "--noheader").stdout, "the last job to be gone")
    run.steps = straight.steps = int(third["step"]) + 5
    for one in (run, straight):
        one.submit()
        one.wait_done(300)
    same(run.outcome(), straight.outcome())


def test_a_failure_that_no_retry_cures_ends_the_chain(cluster: Cluster, training: MakeTraining) -> None:
    run = training()
    blocker = cluster.submit("#!/bin/bash\nsleep 100\n", "--nodes=8", "--exclusive")
    cluster.wait_running(blocker)
    run.submit(num_jobs=3)
    index = run.corpus / "index.json"
    run.run_dir.run_json.write_text(run.run_dir.run_json.read_text().replace(str(run.corpus), str(run.corpus) + "-gone"))
    assert index.exists()
    cluster.run("scancel", blocker)
    assert [cluster.wait_ended(job_id) for job_id in run.job_ids] == [State.FAILED, State.CANCELLED, State.CANCELLED]
    (ended,) = run.events("ended")
    assert ended["code"] == 66 and "exit code 66" in ended["in_vain"]
    (cut,) = run.events("cancelled_rest")
    assert cut["cancelled"] == run.job_ids[1:] and "no usable checkpoint or input was found" in cut["reason"]
    assert run.run_dir.exit_code.read_text() == "66\n"
