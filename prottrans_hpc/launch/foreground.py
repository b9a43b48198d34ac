"""A job in the foreground: it ends when the job ends, with its exit code, and hands signals on to it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence

from .. import terminal
from .children import hold_signals, next_signal, shell_code, start

_KILL_AT_INTERRUPT = 3
_ECHO_S = 0.2
"""The same signal within this time asks for nothing new. A shell that is sent thousands a second dies of its own nested traps."""


def run(argv: Sequence[str], lock: int) -> int:
    """Run a command as a child that dies with this process; its exit code as a shell reports it.

    The child has a session of its own, so that Ctrl-C reaches it once, through here, and not every process of it at
    once. `lock` is a descriptor that it inherits. The signals stay held afterwards.
    """
    os.set_inheritable(lock, True)
    hold_signals()
    child = start(argv, own_session=True)
    interrupts, passed_on = 0, dict[int, float]()
    while child.poll() is None:
        number = next_signal(None)
        if number == signal.SIGINT:
            interrupts += 1
            terminal.note(_ABOUT_INTERRUPTS[min(interrupts, _KILL_AT_INTERRUPT)])
        if number == signal.SIGINT and interrupts >= _KILL_AT_INTERRUPT:
            child.kill()
        elif number is not None and number != signal.SIGCHLD and time.monotonic() > passed_on.get(number, -_ECHO_S) + _ECHO_S:
            passed_on[number] = time.monotonic()
            # A terminal that is closed asks to stop, too.
            child.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
    return shell_code(child.returncode)


_ABOUT_INTERRUPTS = {
    1: "interrupted: the job saves a checkpoint and stops (twice more Ctrl-C kills it at once; the last checkpoint stays good)",
    2: "once more Ctrl-C kills the job at once",
    3: "killed; the last checkpoint stays good",
}
