"""Locks on files, which the kernel drops when their holder dies, however it dies; and what is known where a file system has none.

The lock is flock's: it belongs to the open file, so that a child which inherits the descriptor holds it too. Network file
systems pass it on to other nodes, or refuse it with one of a handful of error numbers.
"""

from __future__ import annotations

import errno
import fcntl
from enum import Enum


class Lock(Enum):
    """What came of asking for a lock."""

    HELD = "held"
    BUSY = "busy"
    """Another process has it."""
    NO_LOCKS = "no locks"
    """The file system has none: nobody can tell whether another process is at work."""


_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, 524)
"""NFS without its lock service, Lustre mounted without `flock`, FUSE, file systems that forward (DVS). 524 is the kernel's own ENOTSUPP, which some let out."""


def take(descriptor: int, *, shared: bool = False, waits: bool = False) -> Lock:
    """Ask for the lock of an open file. `waits`: until nobody else has it. Any other fault of the file system is an OSError."""
    operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if waits else fcntl.LOCK_NB)
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return Lock.BUSY
        if error.errno in _NO_LOCKS:
            return Lock.NO_LOCKS
        raise
    return Lock.HELD
