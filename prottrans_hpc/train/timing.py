"""Where the wall time of a step goes: the ledger that every rank keeps in normal training, and the clock of metrics.jsonl.

No trace and no synchronisation: each change from one part to the next is one mark, a reading of the host's clock or an
event on the GPU's stream. A lap of the ledger ends where a rank has done its work of a step and turns to the status
all-reduce, which waits for the device in any case and takes the lap's numbers along. So a lap holds the update and the
checkpoint of the step before, and data, forward and backward of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ParamSpec, Protocol, TypeVar

import torch

_LINE_EVERY_S = 10.0

PARTS = ("data_wait", "forward", "backward", "exposed_comm", "optimizer", "checkpoint", "other")
"""Of a step. exposed_comm is all waiting for other ranks that no backward pass hides, slower ones included; other is what has no name."""
COMPUTE = ("forward", "backward", "optimizer")
"""What a node works on by itself."""
_OTHER = PARTS.index("other")
_APART = len(PARTS)

T = TypeVar("T")
P = ParamSpec("P")


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


class Marks(Protocol):
    """A clock whose readings may be taken before what they time has happened."""

    def restart(self) -> None:
        """Forget all moments; the next is now."""

    def set(self) -> None:
        """The next moment, in the order of the device's work."""

    def spans(self) -> list[float]:
        """Seconds between the moments so far, once all of them have passed; the last one stays, as the first of the next."""


class HostMarks:
    """Readings of the host's clock."""

    def __init__(self) -> None:
        self._moments: list[float] = []

    def restart(self) -> None:
        """From now on."""
        self._moments = [time.perf_counter()]

    def set(self) -> None:
        """Now."""
        self._moments.append(time.perf_counter())

    def spans(self) -> list[float]:
        """Differences."""
        moments, self._moments = self._moments, self._moments[-1:]
        return [later - earlier for earlier, later in itertools.pairwise(moments)]


class StreamMarks:
    """Events on the GPU's current stream, used again and again. What the host waits for while the GPU works takes no time here."""

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []
        self._num_set = 0

    def restart(self) -> None:
        """From where the stream comes to next."""
        self._num_set = 0
        self.set()

    def set(self) -> None:
        """When the stream has come here."""
        if self._num_set == len(self._events):
            self._events.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        self._events[self._num_set].record()
        self._num_set += 1

    def spans(self) -> list[float]:
        """Times between events; the caller has waited for the device since the last of them."""
        used = self._events[: self._num_set]
        seconds = [earlier.elapsed_time(later) / 1e3 for earlier, later in itertools.pairwise(used)]
        self._events[0], self._events[self._num_set - 1] = used[-1], used[0]
        self._num_set = 1
        return seconds


MARKS: dict[str, Callable[[], Marks]] = {"cpu": HostMarks, "cuda": StreamMarks}


class StepTiming:
    """One rank's ledger. At any moment one part runs; a part within another one holds that one's clock."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._marks = MARKS[device.type if device else "cpu"]()
        self.begin()

    def begin(self) -> None:
        """The first lap begins now; what came before is forgotten."""
        self._marks.restart()
        self._running, self._parts = _OTHER, [_OTHER]

    @contextlib.contextmanager
    def part(self, name: str | None) -> Iterator[None]:
        """What happens in here belongs to a part of `PARTS`; None: to no step."""
        outer = self._running
        self._turn_to(_APART if name is None else PARTS.index(name))
        try:
            yield
        finally:
            self._turn_to(outer)

    def timed(self, name: str, work: Callable[P, T]) -> Callable[P, T]:
        """A function whose time belongs to a part."""

        def work_in_part(*args: P.args, **kwargs: P.kwargs) -> T:
            with self.part(name):
                return work(*args, **kwargs)

        return work_in_part

    def waits_for(self, steps: Iterator[T]) -> Iterator[T]:
        """The steps; that they are waited for is timed."""
        end = object()
        while True:
            with self.part("data_wait"):
                step = next(steps, end)
            if step is end:
                return
            yield step  # type: ignore[misc] # it is no sentinel

    def _turn_to(self, part: int) -> None:
        self._marks.set()
        self._parts.append(part)
        self._running = part

    def end_lap(self) -> None:
        """This rank has done its work of a step; `read` tells, once the device has been waited for."""
        self._marks.set()

    def read(self) -> tuple[float, ...]:
        """Seconds of each of `PARTS` in the lap that `end_lap` has ended."""
        sums = [0.0] * (len(PARTS) + 1)
        for part, seconds in zip(self._parts, self._marks.spans(), strict=True):
            sums[part] += seconds
        self._parts = [self._running]
        return tuple(sums[:_APART])


def by_name(seconds: Sequence[float]) -> dict[str, float]:
    """A ledger as it stands in files: `forward_s` and so on, to the microsecond."""
    return {f"{name}_s": round(value, 6) for name, value in zip(PARTS, seconds, strict=True)}


def exposed_comm_s(seconds: Sequence[float]) -> float:
    """What of a ledger is waiting for other ranks."""
    return seconds[PARTS.index("exposed_comm")]


def compute_s(seconds: Sequence[float]) -> float:
    """What of a ledger is work, and no waiting."""
    return sum(value for name, value in zip(PARTS, seconds, strict=True) if name in COMPUTE)
