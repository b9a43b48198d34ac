"""Signals that ask a run to stop. They only set a flag; the loop looks at it once a step, on all ranks together.

A scheduler that wants its nodes back sends SIGTERM, SIGUSR1 or SIGUSR2 (Slurm's --signal, LSF's -wa), a person
SIGINT; some send SIGCONT first, to wake a suspended job, which needs no handler. One rank being told is enough.
A job script whose starter may not pass signals on writes a file instead, for which rank 0 looks once a step.
Nothing heavy is imported here, so that `install` can run before torch is loaded, which takes seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

_received: list[int] = []
_watched: list[str] = []
"""The stop file, on rank 0."""
_said: list[str] = []
"""What was in it when it was found."""


def install() -> None:
    """Take the signals from here on. A starter may have blocked them until now; what is pending then counts."""
    for number in SIGNALS:
        signal.signal(number, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _note(number: int, frame: FrameType | None) -> None:
    _received.append(number)


def watch(run_dir: str, nonce: str) -> None:
    """Look for the stop file of this start from here on; those that earlier starts left are removed, and mean nothing."""
    own = stop_file_name(nonce)
    with contextlib.suppress(OSError):
        for name in os.listdir(run_dir):
            if name.startswith(_STOP_FILE_PREFIX) and name != own:
                os.unlink(os.path.join(run_dir, name))
    _watched[:] = [os.path.join(run_dir, own)]


_STOP_FILE_PREFIX = ".stop-"


def stop_file_name(nonce: str) -> str:
    """The name of a start's stop file, which does not give the nonce away; the job script makes the same one."""
    return _STOP_FILE_PREFIX + hashlib.sha256(nonce.encode()).hexdigest()[:16]


def requested() -> bool:
    """Whether a signal has come, to this rank or into the stop file."""
    if _watched and not _said:
        with contextlib.suppress(OSError), open(_watched[0], encoding="ascii", errors="replace") as file:
            _said.append(file.read(20).strip() or "a signal")
    return bool(_received or _said)


def cause() -> str:
    """The name of the first signal, for the log."""
    if _received:
        return signal.Signals(_received[0]).name
    return f"{_said[0]} to the job script" if _said else "to another rank"


def forget_signals() -> None:
    """Let further signals change nothing any more: the exit code is decided, and a late one must not replace it.

    Python puts its own handlers back to the default while it shuts down, but leaves an ignored signal ignored.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
