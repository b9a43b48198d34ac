"""Nodes that are slow step after step: every rank knows from its ledger how long it computed, and all learn who lags.

What the ledger counts as work is no waiting for others, so a slow node shows on itself and not on those that wait for it;
checkpoints, validation and the data are parts of their own. A rank keeps the medians over a window of steps, and once a window
puts them into its two slots of the status all-reduce: no collective more, and at 5,616 ranks 90 kB every
`health.slow_window_steps` steps. Slots a rank and not a node, because a node's sum would hide one slow GPU of six.
A rank counts as slow only if both its time and its time a token stand out: more work is no fault of a node's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median, median_low

from ..recipe_health import Health


@dataclass(frozen=True)
class Place:
    """Where a rank is."""

    host: str
    node: int
    pid: int = 0


@dataclass(frozen=True)
class Verdict:
    """A node that is found slow, or no longer."""

    host: str
    node: int
    ranks: tuple[int, ...]
    """Its slow ranks; of a node that recovered those that were."""
    factor: float
    """By which the worst of them is slower than the median rank, over the windows that told."""
    is_slow: bool


@dataclass
class Streak:
    """How one rank did in the last windows."""

    ratios: deque[float]
    """To the median rank, the newest last."""
    is_slow: bool = False


@dataclass
class Stragglers:
    """Owns the window of this rank and the memory of who was slow, which is the same on every rank. Without places it watches nothing."""

    settings: Health = field(default_factory=Health)
    places: Sequence[Place] = ()
    """Of every rank, by rank."""
    rank: int = 0
    findings: list[Verdict] = field(default_factory=list)
    """What is new since somebody told it and emptied this."""
    _times: list[tuple[float, int]] = field(default_factory=list)
    _streaks: list[Streak] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._streaks = [Streak(deque(maxlen=self.settings.slow_patience)) for _ in self.places]

    def add(self, compute_s: float, num_tokens: int) -> None:
        """What this rank computed in a step, and for how long."""
        if len(self.places) > 1:
            self._times.append((compute_s, num_tokens))

    def report(self, step: int) -> list[float]:
        """This rank's part of the status all-reduce of a step (from 1): two slots for each rank at the end of a window, else nothing."""
        if len(self.places) < 2 or step % self.settings.slow_window_steps:
            return []
        slots = [0.0] * (2 * len(self.places))
        slots[2 * self.rank : 2 * self.rank + 2] = window_medians(self._times)
        self._times.clear()
        return slots

    def receive(self, slots: Sequence[float]) -> None:
        """The sums of what all ranks reported."""
        if not slots:
            return
        for streak, ratio in zip(self._streaks, slowness(slots[::2], slots[1::2]), strict=True):
            streak.ratios.append(ratio)
        self.findings += self._changed()

    def _changed(self) -> list[Verdict]:
        """Nodes that became slow or recovered with this window."""
        factor, patience = self.settings.slow_factor, self.settings.slow_patience
        full = [streak for streak in self._streaks if len(streak.ratios) == patience]
        turned = {id(streak) for streak in full if (max(streak.ratios) < factor if streak.is_slow else min(streak.ratios) >= factor)}
        found = []
        for node in sorted({place.node for place, streak in zip(self.places, self._streaks, strict=True) if id(streak) in turned}):
            own = [rank for rank, place in enumerate(self.places) if place.node == node]
            before = tuple(rank for rank in own if self._streaks[rank].is_slow)
            for rank in own:
                self._streaks[rank].is_slow ^= id(self._streaks[rank]) in turned
            now = tuple(rank for rank in own if self._streaks[rank].is_slow)
            if bool(now) != bool(before):
                worst = max(median(self._streaks[rank].ratios) for rank in now or before)
                found.append(Verdict(self.places[own[0]].host, node, now or before, worst, bool(now)))
        return found


def window_medians(times: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Of (seconds, tokens) a step: the median seconds, and the median seconds a token; zeros when nothing was computed."""
    worked = [(seconds, tokens) for seconds, tokens in times if tokens]
    return (median(seconds for seconds, _ in worked), median(seconds / tokens for seconds, tokens in worked)) if worked else (0.0, 0.0)


def slowness(times: Sequence[float], rates: Sequence[float]) -> list[float]:
    """By what factor each rank is slower than the median of those that had work; 0.0 for one that had none.

    The smaller of two ratios: that of the seconds and that of the seconds a token. Of an even number of ranks the median is
    the faster of the two in the middle: of two ranks the other one.
    """
    worked = [rank for rank, seconds in enumerate(times) if seconds > 0.0]
    if not worked:
        return [0.0] * len(times)
    usual_s, usual_rate = median_low(times[rank] for rank in worked), median_low(rates[rank] for rank in worked)
    return [min(seconds / usual_s, rate / usual_rate) for seconds, rate in zip(times, rates, strict=True)]
