"""Where the wall time of a step goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

_LINE_EVERY_S = 10.0


@dataclass
class Clock:
    """Splits the wall time of a step into its parts."""

    checkpoint_s: float = 0.0
    data_wait_s: float = 0.0
    _began: float = field(default_factory=time.perf_counter)
    _shown: float | None = None

    def step_taken(self, *, data_wait_s: float) -> None:
        """Before anything that does not happen in every step."""
        self.checkpoint_s, self.data_wait_s = 0.0, data_wait_s

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """What happens in here is not counted."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def lap(self) -> float:
        """Seconds since the last lap; starts the next."""
        now = time.perf_counter()
        elapsed, self._began = now - self._began, now
        return elapsed

    def line_is_due(self) -> bool:
        """Whether it is time for another line in the log."""
        if self._shown is not None and time.perf_counter() - self._shown < _LINE_EVERY_S:
            return False
        self._shown = time.perf_counter()
        return True
