"""Chains of jobs: each resumes where the one before it stopped, and none is left over."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from prottrans_hpc.launch.job_state import State

if TYPE_CHECKING:
    from ..conftest import Cluster
    from .conftest import MakeTraining


def test_a_chain_trains_to_the_end_and_cancels_what_is_left(
    cluster: Cluster, training: MakeTraining, undisturbed: dict[str, Any], same: Callable[[dict[str, Any], dict[str, Any]], None]
) -> None:
    run = training()
    run.submit(num_jobs=4, walltime_min=3)  # warned a minute before the end
    first, second, third, fourth = run.job_ids
    cluster.run("scontrol", "update", f"jobid={first}", "timelimit=1")
    run.wait_event("begun", 2)
    (ended,) = run.events("ended")
    assert (ended["job_id"], ended["code"], ended["cause"]) == (first, 75, "SIGUSR1")
    step = run.step
    cluster.wait(lambda: run.step > step + 20, "the second job to train")
    # The warning again, without the wait: the very signal that Slurm sends to the very shell.
    cluster.run("scancel", "--batch", "--signal=USR1", second)
    run.wait_done()
    assert [(event["job_id"], event["code"]) for event in run.events("ended")] == [(first, 75), (second, 75), (third, 0)]
    cluster.wait(lambda: run.events("cancelled_rest"), "the end of the chain")
    (cut,) = run.events("cancelled_rest")
    assert (cut["job_id"], cut["cancelled"], cut["reason"]) == (third, [fourth], "the work is done")
    assert cluster.states(run.job_ids) == {first: State.FAILED, second: State.FAILED, third: State.DONE, fourth: State.CANCELLED}
    same(run.outcome(), undisturbed)
    # Submitted once more, it starts no rank and its chain is over at once.
    log = run.log
    run.submit(num_jobs=2)
    assert cluster.wait_ended(run.job_ids[0]) is State.DONE
    assert cluster.wait_ended(run.job_ids[1]) is State.CANCELLED
    assert "nothing to do: step 400 of 400 was reached before" in run.log[len(log) :] and "rank 0" not in run.log[len(log) :]


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
