"""The jobs of one submission, each resuming where the one before it stopped: who comes after whom, and giving up the rest."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import replace

from .. import file_lock, terminal, timestamp
from .. import run_dir as run_dirs
from ..errors import ProttransError, SubmitError, explain
from ..file_lock import Lock
from ..run_dir import Jobs, RunDir
from . import job_events, submission
from .own_job import Start

_SUBMISSION_S = 60.0
"""Longest wait for a submission that is under way: its first job may end before its last is submitted."""
_POLL_S = 0.2
_ASK_S = 30.0
"""The job script waits while the scheduler is asked."""


def read_chain(run_dir: RunDir) -> tuple[str, ...]:
    """The job ids of the latest submission, in order; waits for one that is under way."""
    _wait_for_submission(run_dir)
    jobs = run_dirs.read_jobs(run_dir)
    return jobs.job_ids if jobs else ()


def enrol(run_dir: RunDir, start: Start) -> None:
    """Note a job that job.json lacks: its submission was interrupted before the scheduler's answer was on the disk, or was made by hand.

    The start holds the lease: once a submission under way is over, nobody else can submit, and so nobody else writes the file. What of its jobs is
    still alive stays, as those after this one. Raises nothing: the job trains all the same.
    """
    try:
        chain = read_chain(run_dir)
        if start.job_id in chain:
            return
        old = run_dirs.read_jobs(run_dir)
        if old is not None and old.scheduler == start.scheduler:
            run_dirs.write_jobs(run_dir, replace(old, job_ids=(start.job_id, *_alive(start.scheduler, chain))))
        else:
            run_dirs.write_jobs(run_dir, Jobs(start.scheduler, (start.job_id,), start.host, timestamp.now()))
    except (ProttransError, OSError) as error:
        terminal.warn(f"job.json does not name this job, so that `prottrans runs` does not know it: {explain(error)}")


def exclude_from_rest(run_dir: RunDir, scheduler: str, job_id: str, nodes: Sequence[str]) -> list[str]:
    """Keep the waiting jobs after this one from `nodes`; those that will be. Raises nothing: one that gets such a node finds it out."""
    kept = []
    try:
        chain = read_chain(run_dir)
        for other in chain[chain.index(job_id) + 1 :] if job_id in chain else ():
            if submission.exclude(scheduler, other, nodes, timeout_s=_ASK_S):
                kept.append(other)
    except (ProttransError, OSError) as error:
        terminal.warn(f"jobs of this chain may get {', '.join(nodes)} again: {error}")
    return kept


def cancel_rest(run_dir: RunDir, start: Start, reason: str) -> None:
    """Take the jobs after this one out of the queue, and note why. Raises nothing: a job that stays finds the same out when it begins.

    The last goes first, for the end of a job starts the one after it.
    """
    try:
        chain = read_chain(run_dir)
    except (ProttransError, OSError) as error:
        terminal.warn(f"the rest of the chain was not cancelled: {error}")
        return
    after = chain[chain.index(start.job_id) + 1 :] if start.job_id in chain else ()
    waiting = _alive(start.scheduler, after)
    cancelled, failed = [], []
    for job_id in reversed(waiting):
        try:
            submission.cancel(start.scheduler, job_id, timeout_s=_ASK_S)
            cancelled.append(job_id)
        except SubmitError as error:
            terminal.warn(str(error))
            failed.append(job_id)
    if waiting:
        with contextlib.suppress(OSError):
            job_events.note(run_dir, start, "cancelled_rest", cancelled=cancelled[::-1], not_cancelled=failed[::-1], reason=reason)
        terminal.note(f"cancelled the rest of the chain ({', '.join(cancelled[::-1]) or 'none could be'}): {reason}")


def _alive(scheduler: str, job_ids: tuple[str, ...]) -> list[str]:
    """Those that are not over; all when the scheduler does not say."""
    try:
        states = submission.states(scheduler, job_ids, timeout_s=_ASK_S)
    except SubmitError as error:
        terminal.warn(str(error))
        return list(job_ids)
    return [job_id for job_id in job_ids if job_id in states and states[job_id].is_alive]


def _wait_for_submission(run_dir: RunDir) -> None:
    """`gang.carry_out` holds the run's lock while it submits."""
    deadline = time.monotonic() + _SUBMISSION_S
    descriptor = os.open(run_dir.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while file_lock.take(descriptor) is Lock.BUSY and time.monotonic() < deadline:
            time.sleep(_POLL_S)
    finally:
        os.close(descriptor)
