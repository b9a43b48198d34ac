"""What follows from how a job ended."""

from __future__ import annotations

from typing import Any

import pytest

from prottrans_hpc.launch import verdicts
from prottrans_hpc.launch.own_job import Start

CHAIN = ("1", "2", "3")


def ended(code: int, step: int | None, job_id: str = "1", **more: Any) -> dict[str, Any]:
    return {"event": "ended", "job_id": job_id, "restart": 0, "code": code, "step": step, **more}


def begun(step: int, job_id: str = "1") -> dict[str, Any]:
    return {"event": "begun", "job_id": job_id, "restart": 0, "step": step}


@pytest.mark.parametrize("code", [0, 64, 65, 66, 70, 76, 77, 78])
def test_done_and_what_no_retry_cures_end_a_chain(code: int) -> None:
    assert verdicts.why_not_again([], CHAIN, code, 5)


@pytest.mark.parametrize("code", [71, 73, 74, 75, 130, 137, 143, 1])
def test_after_anything_else_the_next_job_tries(code: int) -> None:
    assert verdicts.why_not_again([], CHAIN, code, 5) is None


def test_the_same_step_failing_twice_ends_a_chain() -> None:
    assert "137 and 71" in str(verdicts.why_not_again([ended(137, 5)], CHAIN, 71, 5))


@pytest.mark.parametrize(
    "before",
    [
        [ended(137, 4)],  # it got on in between
        [ended(75, 5)],  # a stop in good order
        [ended(137, 5), ended(75, 5)],
        [ended(137, 5), {"event": "taken_over", "job_id": "2", "restart": 0, "step": 5}],  # not in a row
        [ended(137, 5, job_id="0")],  # of an earlier chain: somebody has looked since
    ],
)
def test_other_failures_do_not(before: list[dict[str, Any]]) -> None:
    assert verdicts.why_not_again(before, CHAIN, 137, 5) is None


def test_stopping_twice_at_one_step_is_no_failure() -> None:
    assert verdicts.why_not_again([ended(137, 5)], CHAIN, 75, 5) is None


def start(restart: int) -> Start:
    return Start("slurm", "", "1", restart, "n1", 1, ("n1",))


def test_a_job_that_never_gets_on_is_stopped_in_the_end() -> None:
    idle = [begun(7)] * verdicts.MAX_IDLE_STARTS
    assert "10 times in a row at step 7" in str(verdicts.why_not_begin(idle, start(10), 7))
    assert verdicts.why_not_begin(idle[1:], start(9), 7) is None
    assert verdicts.why_not_begin(idle, start(10), 8) is None
    assert verdicts.why_not_begin([*idle[5:], begun(7, job_id="0"), *idle[5:]], start(10), 7) is None


def test_requeues_have_a_limit() -> None:
    assert "over the limit of 500" in str(verdicts.why_not_begin([], start(501), 7))
    assert verdicts.why_not_begin([], start(500), 7) is None


def test_a_job_whose_cancellation_failed_finds_its_chain_doomed() -> None:
    events = [ended(76, 5, in_vain="exit code 76"), begun(5, job_id="9")]
    assert verdicts.doomed_by(events, CHAIN, "2") == events[0]
    assert verdicts.doomed_by(events, CHAIN, "1") is None, "its own failure does not keep a job from being requeued by an operator"
    assert verdicts.doomed_by([ended(75, 5, in_vain=None)], CHAIN, "2") is None
    assert verdicts.doomed_by(events, ("7", "8"), "8") is None


@pytest.mark.parametrize(("code", "text"), [(75, "state saved"), (137, "killed by SIGKILL"), (128 + 63, "killed by signal 63"), (3, "see the log")])
def test_codes_in_words(code: int, text: str) -> None:
    assert text in verdicts.describe_code(code)
