"""Where the main thread of this rank is: its step, its phase, and the collective that it waits in. Written by it, read by the watchdog.

One record a process, like the request to stop in `train.preemption`: whatever happens next to the main thread, only plain
attributes must be needed to say where it was. Every rank enters the same collectives in the same order, so their count
tells who has come how far.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Whereabouts:
    """What the main thread last said."""

    phase: str = "the start"
    is_patient: bool = True
    """Whether this phase may take long without being stuck: validation, checkpoints, whatever comes before the first step is done."""
    step: int = 0
    """The step at work, from 1."""
    num_collectives: int = 0
    """Entered so far."""
    collective: str | None = None
    """That it is in; None: in none."""
    waits: bool = False
    """Whether it can do nothing but wait for others in there; a backward pass that sends gradients computes, too."""
    moved: float = field(default_factory=time.monotonic)
    """When any of this last changed."""

    @property
    def position(self) -> int:
        """How far it has come; the more, the further. Ranks that wait in the same collective have the same."""
        return 2 * self.num_collectives - (self.collective is not None)


HERE = Whereabouts()


@contextlib.contextmanager
def inside(collective: str, *, waits: bool = True) -> Iterator[None]:
    """In here every rank takes part in a collective. One that fails stays where it was, for whoever asks afterwards."""
    outer = HERE.collective, HERE.waits
    HERE.num_collectives += 1
    HERE.collective, HERE.waits = collective, waits
    moved()
    yield
    HERE.collective, HERE.waits = outer
    moved()


@contextlib.contextmanager
def patiently(phase: str) -> Iterator[None]:
    """What happens in here may take long."""
    outer = HERE.phase, HERE.is_patient
    HERE.phase, HERE.is_patient = phase, True
    moved()
    try:
        yield
    finally:
        HERE.phase, HERE.is_patient = outer
        moved()


def step_begins(step: int, *, is_first: bool) -> None:
    """A step (from 1) is next; the first one of a start compiles, connects and fills caches."""
    HERE.step, HERE.phase, HERE.is_patient = step, "the first step" if is_first else "training", is_first
    moved()


def moved() -> None:
    """Something was done: a micro batch, for one."""
    HERE.moved = time.monotonic()
