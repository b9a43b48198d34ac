"""Signals that ask an extraction to stop: they set a flag, which is looked at between batches."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from .. import terminal
from ..errors import RequeueRequested
from ..train.preemption import SIGNALS


@dataclass
class StopRequest:
    """Whether, and by which signal, this process was asked to stop."""

    signal_name: str | None = None

    def check(self, what_is_kept: str) -> None:
        """Raise RequeueRequested when a signal has come."""
        if self.signal_name:
            raise RequeueRequested(f"stopped by {self.signal_name}: {what_is_kept}; the same command does the rest")


@contextlib.contextmanager
def listening() -> Iterator[StopRequest]:
    """Take the stop signals while the block runs; a second SIGINT interrupts at once, which loses the current batches only."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if request.signal_name and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal_name = signal.Signals(number).name
        terminal.note(f"{request.signal_name}: stopping after this batch")

    if threading.current_thread() is not threading.main_thread():
        yield request  # Python gives signals to the main thread only; there the caller listens
        return
    previous = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
