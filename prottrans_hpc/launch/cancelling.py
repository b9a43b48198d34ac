"""Stopping the jobs of a run for good: the waiting ones of a chain first, so that none starts when the running one ends."""

from __future__ import annotations

import os
import pwd
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import SubmitError
from ..run_dir import Jobs, RunDir
from . import job_events, local_process, submission
from .job_state import State
from .run_facts import RunFacts


@dataclass(frozen=True)
class Cancelled:
    """A job that was asked to end."""

    job_id: str
    state: State
    """Before."""


def cancel(facts: RunFacts) -> list[Cancelled]:
    """Cancel what is alive of a run's jobs; [] when nothing is. Raises SubmitError when that cannot be known or done.

    What is cancelled is recorded before: the job's own end must not requeue it.
    """
    if facts.jobs is None:
        return []
    doomed = _local(facts.run_dir, facts.jobs) if facts.jobs.scheduler == "local" else _batch(facts.jobs)
    events = job_events.read_events(facts.run_dir)
    for job in doomed:
        own = [event for event in events if event["job_id"] == job.job_id]
        restart = max((event["restart"] for event in own), default=0)
        if not any(event["event"] == "cancelled" and str(event["time"]) >= facts.jobs.submitted[:19] for event in own):
            job_events.record(facts.run_dir, "cancelled", job_id=job.job_id, restart=restart, by=_who())
    for job in doomed:
        submission.cancel(facts.jobs.scheduler, job.job_id)
    return doomed


def _local(directory: RunDir, jobs: Jobs) -> list[Cancelled]:
    if local_process.is_here(jobs):
        ours = [job_id for job_id in jobs.job_ids if local_process.holds(directory, job_id)]
        if ours:
            return [Cancelled(job_id, State.RUNNING) for job_id in ours]
    if local_process.lock_is_held(directory):
        raise SubmitError(f"the job runs as process {', '.join(jobs.job_ids)} on {jobs.host}, out of reach of {os.uname().nodename}: cancel it there")
    return []


def _batch(jobs: Jobs) -> list[Cancelled]:
    states = submission.states(jobs.scheduler, jobs.job_ids)
    alive = [Cancelled(job_id, states[job_id]) for job_id in jobs.job_ids if job_id in states and states[job_id].is_alive]
    return in_order(alive)


def in_order(jobs: Sequence[Cancelled]) -> list[Cancelled]:
    """The waiting jobs, the last of the chain first, then the others."""
    waiting = [job for job in jobs if job.state is State.PENDING]
    return [*reversed(waiting), *(job for job in jobs if job.state is not State.PENDING)]


def _who() -> str:
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = f"user {os.getuid()}"
    return f"{user} on {os.uname().nodename}"
