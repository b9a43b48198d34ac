"""Copies out that are not done: until they are, what they read takes the device's memory still, however long ago it was given up."""

from __future__ import annotations

from collections import deque

from torch import Tensor

from .transfer import Moment


class Departures:
    """Of one device, in the order in which they were begun. Python runs far ahead of a GPU; without waiting here all would pile up, whatever the limit."""

    def __init__(self) -> None:
        self.bytes = 0
        """That take memory of the device."""
        self._under_way: deque[tuple[Moment, Tensor]] = deque()

    def add(self, is_out: Moment | None, device_bytes: Tensor) -> None:
        """Hold what is being copied; None: it is copied."""
        if is_out is not None:
            self._under_way.append((is_out, device_bytes))
            self.bytes += len(device_bytes)

    def let_go(self) -> None:
        """Of what is copied by now."""
        while self._under_way and self._under_way[0][0].query():
            self._pop()

    def wait_until(self, most_bytes: int) -> None:
        """No more than so many are under way."""
        self.let_go()
        while self._under_way and self.bytes > most_bytes:
            self._under_way[0][0].synchronize()
            self._pop()

    def _pop(self) -> None:
        _, device_bytes = self._under_way.popleft()
        self.bytes -= len(device_bytes)

    def __del__(self) -> None:
        self.wait_until(0)  # the allocator would give the memory to others
