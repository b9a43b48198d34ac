"""What follows from how a job ended: go on, run again, or give the rest of its chain up. Pure."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from .. import errors
from .job_events import Event
from .own_job import Start

INCURABLE = (errors.USAGE, errors.BAD_DATA, errors.NO_INPUT, errors.BUG, errors.NUMERICS, errors.NO_PERMISSION, errors.IDENTITY)
"""Exit codes after which another start would end in the same way."""
MAX_RESTARTS = 500
"""A job that was requeued so often is stuck in something that no program sees."""
MAX_IDLE_STARTS = 10
"""So many starts of a job in a row that began at the same step: it does not get on."""


def why_not_again(events: Sequence[Event], chain: Sequence[str], code: int, step: int) -> str | None:
    """Why another job of the chain would be in vain after a start that ended with this code at this step; None: it would not.

    Done is a reason too. `events` are those before this end; the jobs of earlier chains do not count, for somebody has looked since.
    """
    if code == errors.DONE:
        return "the work is done"
    if code in INCURABLE:
        return f"exit code {code} ({errors.MEANING[code]}): another start would end in the same way"
    stops = [event for event in events if event["event"] in ("ended", "taken_over") and event["job_id"] in chain]
    if code != errors.REQUEUE and stops and _is_failure(stops[-1]) and stops[-1].get("step") == step:
        return f"two starts in a row failed (exit codes {stops[-1]['code']} and {code}) without a checkpoint after step {step}: look at the log before a third"
    return None


def _is_failure(stop: Event) -> bool:
    """A stop with its state saved, or a job that lost its nodes, says nothing about the work itself."""
    return stop["event"] == "ended" and stop.get("code") not in (errors.DONE, errors.REQUEUE)


def why_not_begin(events: Sequence[Event], start: Start, step: int) -> str | None:
    """Why a start is one too many; None: it is not."""
    if start.restart > MAX_RESTARTS:
        return f"job {start.job_id} was requeued {start.restart} times, which is over the limit of {MAX_RESTARTS}"
    begun = [event for event in events if event["event"] == "begun"]
    idle = 0
    for event in reversed(begun):
        if event["job_id"] != start.job_id or event.get("step") != step:
            break
        idle += 1
    if idle >= MAX_IDLE_STARTS:
        return f"job {start.job_id} has started {idle} times in a row at step {step} and never saved a newer checkpoint"
    return None


def doomed_by(events: Sequence[Event], chain: Sequence[str], job_id: str) -> Event | None:
    """The job before this one in its chain, if it ended so that the rest was to be cancelled and was not."""
    before = chain[: chain.index(job_id)] if job_id in chain else ()
    ended = [event for event in events if event["event"] == "ended"]
    last = ended[-1] if ended else None
    return last if last and last["job_id"] in before and last.get("in_vain") else None


def describe_code(code: int) -> str:
    """What an exit code means, in words."""
    if code in errors.MEANING:
        return errors.MEANING[code]
    if code > 128:
        try:
            return f"killed by {signal.Signals(code - 128).name}"
        except ValueError:
            return f"killed by signal {code - 128}"
    return "an exit code of the starter or the shell; see the log"
