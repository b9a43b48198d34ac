"""Whether the process of a local job still runs, told without disturbing it.

A process id says nothing by itself: another host has it too, and the system gives it out again. The job's own
processes hold its run directory's lock file open, from the command line or job script down to the last rank.
"""

from __future__ import annotations

import os
from pathlib import Path

from .. import file_lock
from ..file_lock import Lock
from ..run_dir import Jobs, RunDir


def holds(run_dir: RunDir, process_id: str) -> bool:
    """Whether a process of this host has the lock file of a run directory open, so that it is that run's job."""
    try:
        lock = run_dir.lock.stat()
        for descriptor in Path("/proc", process_id, "fd").iterdir():
            status = _status(descriptor)
            if status is not None and (status.st_dev, status.st_ino) == (lock.st_dev, lock.st_ino):
                return True
    except OSError:  # it has ended, belongs to somebody else, or the directory has no lock
        return False
    return False


def _status(descriptor: Path) -> os.stat_result | None:
    try:
        return descriptor.stat()
    except OSError:  # closed meanwhile
        return None


def lock_is_held(run_dir: RunDir) -> bool:
    """Whether somebody, on whichever host, holds the lock; a file system without locks says no."""
    try:
        descriptor = os.open(run_dir.lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        # Shared and given back at once: a start that comes in between tries again (see gang.py).
        return file_lock.take(descriptor, shared=True) is Lock.BUSY
    except OSError:
        return False
    finally:
        os.close(descriptor)


def is_here(jobs: Jobs) -> bool:
    """Whether a job's processes are those of this host."""
    return jobs.host == os.uname().nodename


def runs(run_dir: RunDir, jobs: Jobs) -> bool:
    """Whether a local job still runs, here or elsewhere."""
    return (is_here(jobs) and any(holds(run_dir, job_id) for job_id in jobs.job_ids)) or lock_is_held(run_dir)
