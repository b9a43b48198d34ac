"""Signals that ask a run to stop. They only set a flag; the loop looks at it once a step, on all ranks together.

A scheduler that wants its nodes back sends SIGTERM, SIGUSR1 or SIGUSR2 (Slurm's --signal, LSF's -wa), a person
SIGINT; some send SIGCONT first, to wake a suspended job, which needs no handler. One rank being told is enough.
Nothing heavy is imported here, so that `install` can run before torch is loaded, which takes seconds.
"""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

_received: list[int] = []


def install() -> None:
    """Take the signals from here on. A starter may have blocked them until now; what is pending then counts."""
    for number in SIGNALS:
        signal.signal(number, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _note(number: int, frame: FrameType | None) -> None:
    _received.append(number)


def requested() -> bool:
    """Whether a signal has come."""
    return bool(_received)


def cause() -> str:
    """The name of the first signal, for the log."""
    return signal.Signals(_received[0]).name if _received else "to another rank"


def forget_signals() -> None:
    """Let further signals change nothing any more: the exit code is decided, and a late one must not replace it.

    Python puts its own handlers back to the default while it shuts down, but leaves an ignored signal ignored.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
