"""Signals that ask a run to stop. They only set a flag; the loop looks at it once a step, on all ranks together.

A scheduler that wants its nodes back sends SIGTERM, SIGUSR1 or SIGUSR2 (Slurm's --signal, LSF's -wa), a person
SIGINT; some send SIGCONT first, to wake a suspended job, which needs no handler. One rank being told is enough.
A job script whose starter may not pass signals on writes a file instead, for which rank 0 looks once a step.
Nothing heavy is imported here, so that `install` can run before torch is loaded, which takes seconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

_received: list[int] = []
_watched: list[str] = []
"""The stop file, on rank 0."""
_found: list[str] = []
"""The same, once it was there: a request is not taken back."""
_said: list[str] = []
"""What was in it."""


def install() -> None:
    """Take the signals from here on. A starter may have blocked them until now; what is pending then counts."""
    for number in SIGNALS:
        signal.signal(number, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _note(number: int, frame: FrameType | None) -> None:
    _received.append(number)


def watch(run_dir: str, nonce: str) -> None:
    """Look for the stop file of this start from here on; those that earlier starts left are removed, and mean nothing."""
    from ..run_dir import STOP_FILE_PREFIX, RunDir  # not above: it takes time to load, and signals are taken before

    own = RunDir(Path(run_dir)).stop_file(nonce)
    with contextlib.suppress(OSError):
        for name in os.listdir(run_dir):
            if name.startswith(STOP_FILE_PREFIX) and name != own.name:
                os.unlink(os.path.join(run_dir, name))
    _watched[:] = [str(own)]


def requested() -> bool:
    """Whether a signal has come, to this rank or into the stop file."""
    if _watched and not _found and os.path.exists(_watched[0]):
        _found.append(_watched[0])
    return bool(_received or _found)


def cause() -> str:
    """The name of the first signal, for the log."""
    if _received:
        return signal.Signals(_received[0]).name
    if not _found:
        return "to another rank"
    if not _said:
        _said.append(_signal_in(_found[0]))
    return f"{_said[0]} to the job script"


def _signal_in(stop_file: str, patience_s: float = 1.0) -> str:
    """What the job script wrote. It opens the file before it writes, so an empty one gets a moment; on a full disk it stays empty."""
    deadline = time.monotonic() + patience_s
    while True:
        with contextlib.suppress(OSError), open(stop_file, encoding="ascii", errors="replace") as file:
            if said := file.read(20).strip():
                return said
        if time.monotonic() > deadline:
            return "a signal"
        time.sleep(0.02)


def forget_signals() -> None:
    """Let further signals change nothing any more: the exit code is decided, and a late one must not replace it.

    Python puts its own handlers back to the default while it shuts down, but leaves an ignored signal ignored.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
