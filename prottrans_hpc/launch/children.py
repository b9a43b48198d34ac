"""Child processes that cannot outlive their parent, and signals as events to wait for.

PR_SET_PDEATHSIG makes the kernel kill a child when its parent ends, however the parent ended. So a chain
command line -> shell -> starter -> ranks leaves nothing behind when any of its links, or a process group, gets SIGKILL.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

_PR_SET_PDEATHSIG = 1

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""What asks ranks to save and stop."""
WATCHED = frozenset((*STOP_SIGNALS, signal.SIGHUP, signal.SIGCHLD))

Stream = IO[Any] | int | None


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int) -> None:
    """Have this process killed when `parent`, its parent, ends; end now if that has happened already."""
    _libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def hold_signals() -> None:
    """From now on the watched signals wait for `next_signal`. They stay held until the process ends.

    So a late signal cannot replace an exit code that is decided already.
    """
    for number in WATCHED - {signal.SIGCHLD}:
        signal.signal(number, signal.SIG_DFL)  # one that is ignored (SIGINT under a shell's &, nohup's SIGHUP) would never arrive
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)


def next_signal(timeout_s: float | None) -> int | None:
    """Wait for the next watched signal; None when the time is up."""
    if timeout_s is None:
        return signal.sigwait(WATCHED)
    event = signal.sigtimedwait(WATCHED, max(0.0, timeout_s))
    return event.si_signo if event else None


def start(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    output: Stream = None,
    hold_stop_signals: bool = False,
    own_session: bool = False,
) -> subprocess.Popen[bytes]:
    """Start a child that dies with this process. `output` takes its standard output and error.

    A child with `hold_stop_signals` starts with these blocked: what comes before it is ready to take them waits for it.
    Open file descriptors that are inheritable go to the child: the lock of a run directory must live as long as the last rank.
    """
    parent = os.getpid()
    _libc()  # loaded before the fork

    def in_child() -> None:
        die_with_parent(parent)
        signal.pthread_sigmask(signal.SIG_SETMASK, STOP_SIGNALS if hold_stop_signals else ())

    return subprocess.Popen(
        list(argv), env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, close_fds=False, preexec_fn=in_child, start_new_session=own_session
    )


def shell_code(returncode: int) -> int:
    """The exit code as a shell reports it: 128 + N for a process that signal N killed."""
    return 128 - returncode if returncode < 0 else returncode


class Deadline:
    """A moment to wait for, or none."""

    def __init__(self) -> None:
        self._at: float | None = None

    def set_in(self, seconds: float) -> None:
        """Set the moment; one that is set already stays."""
        self._at = self._at if self._at is not None else time.monotonic() + seconds

    @property
    def remaining_s(self) -> float | None:
        """Seconds until then, 0 when it is past, None when none is set."""
        return None if self._at is None else max(0.0, self._at - time.monotonic())

    @property
    def is_past(self) -> bool:
        """Whether the moment has come."""
        return self.remaining_s == 0.0
