"""One start at a time works in a run directory: rank 0 holds a lock that the kernel drops when it dies, however it dies."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator

from .. import file_lock, terminal
from ..errors import ResourceError
from ..file_lock import Lock
from ..rank import RankContext
from ..run_dir import RunDir

NAME = ".training.lock"
_WAIT_S = 20.0
"""A start that was just killed may take a moment to be gone."""
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def only_start(run_dir: RunDir, context: RankContext, *, wait_s: float = _WAIT_S) -> Iterator[None]:
    """Hold the run's lock, on rank 0. Raises ResourceError when another start keeps it."""
    if not context.is_main:
        yield
        return
    descriptor = os.open(run_dir.path / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _take(descriptor, run_dir, wait_s)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {context.hostname}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, run_dir: RunDir, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while (lock := file_lock.take(descriptor)) is Lock.BUSY:
        if time.monotonic() > deadline:
            holder = terminal.printable(os.pread(descriptor, 200, 0).strip()) or "a process that does not say who it is"
            raise ResourceError(f"{run_dir.path} is in use: {holder} is training there. Wait for it to end or stop it; a second one would destroy its work")
        time.sleep(0.1)
    if lock is Lock.NO_LOCKS:
        _log.warning("the file system of %s has no locks: make sure yourself that this run is started once only", run_dir.path)
