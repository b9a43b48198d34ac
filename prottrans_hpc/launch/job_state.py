"""The states of a job, the same for every scheduler."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """Where a job is in its life."""

    PENDING = "PENDING"
    """Queued, held, or waiting for a job before it."""
    RUNNING = "RUNNING"
    STOPPING = "STOPPING"
    """Its processes are being ended."""
    SUSPENDED = "SUSPENDED"
    DONE = "DONE"
    """Ended with exit code 0."""
    FAILED = "FAILED"
    """Ended with another exit code."""
    CANCELLED = "CANCELLED"
    PREEMPTED = "PREEMPTED"
    TIMEOUT = "TIMEOUT"
    """Killed at the end of its walltime."""
    NODE_LOST = "NODE_LOST"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    UNKNOWN = "UNKNOWN"
    """The scheduler says something that this program does not know: take it as alive."""

    @property
    def is_alive(self) -> bool:
        """Whether the job may still do something; in doubt, yes."""
        return self in (State.PENDING, State.RUNNING, State.STOPPING, State.SUSPENDED, State.UNKNOWN)
