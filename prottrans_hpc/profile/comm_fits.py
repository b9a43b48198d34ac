"""Arithmetic of the communication study: latency and bandwidth from timings, the fastest back end, nodes that are slow. Pure.

A collective of n bytes takes latency + n / bandwidth (Hockney 1994). Timings err in proportion to themselves, so the fit
weighs each by 1 / t^2; otherwise the largest message alone would decide. `bytes` is always the whole buffer: what an
all-reduce sums, what a reduce-scatter begins with, what an all-gather ends with.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SURE_MADS = 5.0
"""A node is slow only when it lies so many scaled median absolute deviations off: nodes that all scatter are not slow."""
_MAD_TO_SIGMA = 1.4826
"""For a normal distribution."""
ALONE = "no other back end was measured"


@dataclass(frozen=True)
class Sample:
    """One message size of one collective."""

    backend: str
    collective: str
    scope: str
    bytes: int
    seconds: tuple[float, ...]
    """One a repetition: the slowest rank's, for one call."""

    @property
    def median_s(self) -> float:
        """Half of the repetitions took longer."""
        return statistics.median(self.seconds)

    @property
    def kind(self) -> tuple[str, str, str]:
        """What a fit is made of."""
        return self.backend, self.collective, self.scope


@dataclass(frozen=True)
class Fit:
    """A line through the samples of one collective."""

    backend: str
    collective: str
    scope: str
    latency_s: float
    """Of an empty message; never below 0."""
    bytes_per_s: float | None
    """Of the buffer; None: size did not matter within what was measured."""
    r2: float | None
    """Weighted share of the variance that the line explains; None: there is no variance."""

    def seconds(self, num_bytes: int) -> float:
        """What the line says."""
        return self.latency_s + (num_bytes / self.bytes_per_s if self.bytes_per_s else 0.0)


def fit(samples: Sequence[Sample]) -> Fit:
    """The weighted least squares line through the medians of one kind's samples."""
    points = [(float(sample.bytes), sample.median_s) for sample in samples]
    latency, per_byte = _line(points)
    weights = [seconds**-2 for _, seconds in points]
    mean = sum(w * t for w, (_, t) in zip(weights, points, strict=True)) / sum(weights)
    spread = sum(w * (t - mean) ** 2 for w, (_, t) in zip(weights, points, strict=True))
    left = sum(w * (t - latency - per_byte * n) ** 2 for w, (n, t) in zip(weights, points, strict=True))
    return Fit(*samples[0].kind, latency, 1.0 / per_byte if per_byte > 0 else None, 1.0 - left / spread if spread > 0 else None)


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(latency, seconds a byte), neither below 0: where the best line would have one negative, the best line without it."""
    weights = [seconds**-2 for _, seconds in points]
    total = sum(weights)
    mean_n = sum(w * n for w, (n, _) in zip(weights, points, strict=True)) / total
    mean_t = sum(w * t for w, (_, t) in zip(weights, points, strict=True)) / total
    variance = sum(w * (n - mean_n) ** 2 for w, (n, _) in zip(weights, points, strict=True))
    covariance = sum(w * (n - mean_n) * (t - mean_t) for w, (n, t) in zip(weights, points, strict=True))
    slope = covariance / variance if variance > 0 else 0.0
    if slope <= 0:
        return mean_t, 0.0
    if mean_t < slope * mean_n:
        through_origin = sum(w * n * t for w, (n, t) in zip(weights, points, strict=True)) / sum(w * n * n for w, (n, _) in zip(weights, points, strict=True))
        return 0.0, through_origin
    return mean_t - slope * mean_n, slope


def fits_of(samples: Sequence[Sample]) -> list[Fit]:
    """A fit for every kind that was measured."""
    kinds = dict.fromkeys(sample.kind for sample in samples)
    return [fit([sample for sample in samples if sample.kind == kind]) for kind in kinds]


def fastest_of(samples: Sequence[Sample], fits: Sequence[Fit]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """{scope: {collective: [{bytes, backend, seconds, why}, ...]}}, ascending in bytes."""
    lines = {(line.backend, line.collective, line.scope): line for line in fits}
    groups: dict[tuple[str, str, int], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.scope, sample.collective, sample.bytes), []).append(sample)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for (scope, collective, num_bytes), rivals in sorted(groups.items()):
        rivals.sort(key=lambda sample: sample.median_s)
        row = {"bytes": num_bytes, "backend": rivals[0].backend, "seconds": rivals[0].median_s, "why": _why(rivals, lines)}
        found.setdefault(scope, {}).setdefault(collective, []).append(row)
    return found


def _why(rivals: Sequence[Sample], lines: Mapping[tuple[str, str, str], Fit]) -> str:
    """What tells the first from the second: latency, bandwidth, or nothing that is beyond the scatter."""
    if len(rivals) == 1:
        return ALONE
    best, second = rivals[0], rivals[1]
    times = f"{second.median_s / best.median_s:.2f} times as fast as {second.backend}"
    if max(_middle(best)) >= min(_middle(second)):
        return f"{times}, which is within the scatter"
    ours, theirs = lines[best.kind], lines[second.kind]
    gained_latency = theirs.latency_s - ours.latency_s
    gained_bytes = (theirs.seconds(best.bytes) - theirs.latency_s) - (ours.seconds(best.bytes) - ours.latency_s)
    if gained_latency >= gained_bytes:
        return f"{times}: latency {_us(ours.latency_s)} against {_us(theirs.latency_s)}"
    return f"{times}: bandwidth {_rate(ours)} against {_rate(theirs)}"


def _middle(sample: Sample) -> tuple[float, float]:
    """The middle half of the repetitions, from and to."""
    ordered, quarter = sorted(sample.seconds), len(sample.seconds) // 4
    return ordered[quarter], ordered[-1 - quarter]


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} us"


def _rate(line: Fit) -> str:
    return f"{line.bytes_per_s / 1e9:.3g} GB/s" if line.bytes_per_s else "beyond measure"


@dataclass(frozen=True)
class SlowNode:
    """A node that is worse than the others in one respect."""

    node: int
    host: str
    what: str
    """link, within or compute."""
    seconds: float
    median_s: float
    """Of all nodes."""

    @property
    def factor(self) -> float:
        """So many times the median."""
        return self.seconds / self.median_s


def slow_nodes(what: str, seconds: Sequence[float], hosts: Sequence[str], *, factor: float) -> list[SlowNode]:
    """The nodes that take more than `factor` times the median, and stand out from the scatter of the others; the worst first.

    The median is the lower one, so that of two nodes the slower can be told from the faster.
    """
    middle = statistics.median_low(seconds)
    deviation = statistics.median_low([abs(value - middle) for value in seconds])
    found = [
        SlowNode(node, hosts[node], what, value, middle)
        for node, value in enumerate(seconds)
        if value > factor * middle and value - middle > SURE_MADS * _MAD_TO_SIGMA * deviation
    ]
    return sorted(found, key=lambda slow: -slow.factor)


def rounds_of(num_nodes: int) -> list[list[tuple[int, int]]]:
    """A tournament: in each round every node has one partner (with an odd number one rests), and all pairs meet once (circle method)."""
    places: list[int | None] = [*range(num_nodes), *([None] if num_nodes % 2 else [])]
    rounds = []
    for _ in range(len(places) - 1):
        pairs = zip(places[: len(places) // 2], reversed(places[len(places) // 2 :]), strict=True)
        rounds.append([(min(one, other), max(one, other)) for one, other in pairs if one is not None and other is not None])
        places = [places[0], places[-1], *places[1:-1]]
    return rounds


def link_seconds(met: Sequence[Sequence[tuple[int, float]]]) -> list[float]:
    """What each node's link is good for, from its (partner, seconds): the lower median, since a slow partner slows one pair only."""
    return [statistics.median_low([seconds for _, seconds in partners]) for partners in met]
