"""The lease of a run directory: two batch jobs must never train into one.

`begin` takes it before the ranks start, `end` gives it back. A job that died could not; its lease is taken over only
when the scheduler says that the job is gone. In doubt, and where the scheduler does not answer, the answer is no.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .. import durable, file_lock, timestamp
from ..errors import DataError, SubmitError
from ..file_lock import Lock
from ..run_dir import RunDir
from . import submission
from .job_state import State
from .own_job import Start

LOCK_NAME = ".job.lease.lock"
_SETTLE_S = 2.0
"""Where files cannot be locked: so long must a lease stand before it counts."""
_WAIT_FOR_END_S = 60.0
"""A job that is being ended is waited for so long."""
_POLL_S = 2.0


@dataclass(frozen=True)
class Lease:
    """Who works in a run directory."""

    scheduler: str
    cluster: str
    job_id: str
    restart: int
    host: str
    pid: int
    nodes: tuple[str, ...]
    time: str

    @property
    def holder(self) -> str:
        """For people."""
        return f"job {self.job_id}{f' (restart {self.restart})' if self.restart else ''} on {self.host}, since {self.time}"


@dataclass(frozen=True)
class Taken:
    """A lease that was taken over, and what became of the job that held it."""

    lease: Lease
    state: State | None
    """As the scheduler says; None: it has forgotten the job, or the job is our own, requeued."""


def read_lease(run_dir: RunDir) -> Lease | None:
    """The lease; None when nobody holds it. Raises SubmitError when it is damaged: nobody can tell who works there then."""
    try:
        values: dict[str, Any] = durable.read_json(run_dir.lease)
        return Lease(**{**values, "restart": int(values["restart"]), "pid": int(values["pid"]), "nodes": tuple(map(str, values["nodes"]))})
    except FileNotFoundError:
        return None
    except (DataError, KeyError, TypeError, ValueError) as error:
        raise SubmitError(f"{run_dir.lease} is damaged: {error}. {_remedy(run_dir)}") from error


def take(run_dir: RunDir, start: Start) -> Taken | None:
    """Take the lease; what was taken over, if anything. Raises SubmitError when another start has it or may have it."""
    deadline = time.monotonic() + _WAIT_FOR_END_S
    while True:
        with _locked(run_dir) as is_locked:
            old = read_lease(run_dir)
            state = None if old is None else _fate(run_dir, old, start)
            if state is not State.STOPPING:
                durable.write_json(run_dir.lease, _content(start))
                break
        if time.monotonic() > deadline:
            raise SubmitError(f"{run_dir.path} is held by a job that has been ending for {_WAIT_FOR_END_S:.0f} s")
        time.sleep(_POLL_S)  # without the lock: the other job may want to give its lease back
    if not is_locked:
        time.sleep(_SETTLE_S)
        standing = read_lease(run_dir)
        if standing is None or not is_of(standing, start):
            raise SubmitError(f"{run_dir.path} was taken at the same moment by {standing.holder if standing else 'a job that has ended'}")
    return Taken(old, state) if old else None


def release(run_dir: RunDir, start: Start) -> bool:
    """Give the lease back; whether it was ours."""
    with _locked(run_dir):
        lease = read_lease(run_dir)
        if lease is None or not is_of(lease, start):
            return False
        run_dir.lease.unlink(missing_ok=True)
        return True


def is_of(lease: Lease, start: Start) -> bool:
    """Whether a lease is that of a start."""
    return (lease.scheduler, lease.cluster, lease.job_id, lease.restart) == (start.scheduler, start.cluster, start.job_id, start.restart)


def _content(start: Start) -> dict[str, Any]:
    return {**vars(start), "nodes": list(start.nodes), "time": timestamp.now()}


def _fate(run_dir: RunDir, lease: Lease, start: Start) -> State | None:
    """What became of the holder, if it is gone or on its way (STOPPING). Raises SubmitError when it works, or nobody can tell."""
    if (lease.scheduler, lease.cluster) != (start.scheduler, start.cluster):
        here, there = (f"{place.scheduler} {place.cluster}".strip() for place in (start, lease))
        raise SubmitError(f"{run_dir.path} is held by {lease.holder}, a job of {there}; {here} cannot say whether it is gone. {_remedy(run_dir)}")
    if lease.job_id == start.job_id:
        if lease.restart >= start.restart:
            raise SubmitError(f"{run_dir.path} is held by {lease.holder}; this is the same job, restart {start.restart}: a job starts once only")
        return None
    try:
        state = submission.states(lease.scheduler, [lease.job_id]).get(lease.job_id)
    except SubmitError as error:
        raise SubmitError(f"{run_dir.path} is held by {lease.holder}, and whether it is gone cannot be known: {error}. {_remedy(run_dir)}") from error
    if state is not None and state.is_alive and state is not State.STOPPING:
        raise SubmitError(f"{run_dir.path} is in use by {lease.holder}, which is {state}: two jobs must never train into one run directory")
    return state


def _remedy(run_dir: RunDir) -> str:
    return f"If you know that no job works there, remove {run_dir.lease} and submit again"


@contextlib.contextmanager
def _locked(run_dir: RunDir) -> Iterator[bool]:
    """One at a time looks at the lease and changes it. Yields whether the file system has locks."""
    descriptor = os.open(run_dir.path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield file_lock.take(descriptor, waits=True) is Lock.HELD
    finally:
        os.close(descriptor)
