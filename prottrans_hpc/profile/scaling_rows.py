"""What a scaling study says: a row a size, with confidence intervals, and the nodes that stand out. scaling.csv is these rows.

overhead(N) = t(N) / t(1) - 1, the papers' Fig. 2, where t is the mean time of a step and 1 the smallest size that was
measured; in a strong study N t(N) / t(1) - 1, what the nodes' time costs more. efficiency = 1 / (1 + overhead).
The intervals are of the percentile bootstrap (Efron 1979) over repetitions, and over the steps within each: what runs
differ in counts as much as what steps do.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import numpy.typing as npt

from .scaling import PARTS, Ledger, Point, Scaling

Samples = npt.NDArray[np.float64]

_DRAWS = 2000
_SEED = 42
_LEVEL = (2.5, 97.5)
_SLOW = 1.1
"""A node that takes so many times the median node's compute time stands out."""


@dataclass(frozen=True)
class Row:
    """One size. `low` and `high` are the ends of 95 % confidence intervals."""

    nodes: int
    ranks: int
    step_s: float
    step_s_low: float
    step_s_high: float
    overhead: float
    overhead_low: float
    overhead_high: float
    efficiency: float
    residues_per_s: float
    mfu: float | None
    """None where the peak is unknown."""
    data_wait_s: float
    forward_s: float
    backward_s: float
    exposed_comm_s: float
    optimizer_s: float
    checkpoint_s: float
    other_s: float
    skew_s: float
    """The slowest node's compute time less the median node's."""
    reduction_s: float | None
    """Exposed communication of the rank that came last: the reduction's own, without a wait for slower ranks. None in older studies."""


COLUMNS = tuple(field.name for field in fields(Row))


@dataclass(frozen=True)
class Outlier:
    """A node whose compute time stood out."""

    nodes: int
    """The size of the runs."""
    node: int
    host: str
    factor: float
    """Of the median node's, median over those runs."""
    num_runs: int
    """In which it stood out,"""
    of_runs: int
    """of so many of this size that it was in."""


def rows_of(scaling: Scaling) -> list[Row]:
    """A row a size, ascending."""
    draws = {nodes: _draw_means(scaling.at(nodes)) for nodes in scaling.node_counts}
    base = scaling.node_counts[0]
    return [_row(scaling, nodes, draws[nodes], draws[base]) for nodes in scaling.node_counts]


def _row(scaling: Scaling, nodes: int, draws: Samples, base_draws: Samples) -> Row:
    points, base = scaling.at(nodes), scaling.node_counts[0]
    factor = nodes / base if scaling.mode == "strong" else 1.0
    step_s = _mean_s(points)
    overhead = factor * step_s / _mean_s(scaling.at(base)) - 1.0
    # The smallest size is what it is compared with: no interval.
    low, high = np.percentile(factor * draws / base_draws - 1.0, _LEVEL) if nodes != base else (0.0, 0.0)
    step_low, step_high = np.percentile(draws, _LEVEL)
    total_s = sum(sum(point.step_s) for point in points)
    return Row(
        nodes,
        points[0].ranks,
        step_s,
        float(step_low),
        float(step_high),
        overhead,
        float(low),
        float(high),
        efficiency=1.0 / (1.0 + overhead),
        residues_per_s=sum(sum(point.residues) for point in points) / total_s,
        mfu=_mfu(points, scaling.peak_tflops_rank, total_s),
        skew_s=statistics.mean(seconds for point in points for seconds in point.skew_s),
        reduction_s=_mean_reduction(points),
        **{name: _mean_of(name, [point.ledger for point in points]) for name in PARTS},
    )


def _mean_of(name: str, ledgers: Sequence[Ledger]) -> float:
    parts: list[tuple[float, ...]] = [getattr(ledger, name) for ledger in ledgers]
    return statistics.mean(seconds for part in parts for seconds in part)


def _mean_reduction(points: Sequence[Point]) -> float | None:
    waits = [point.reduction_s for point in points]
    return None if None in waits else statistics.mean(seconds for wait in waits if wait is not None for seconds in wait)


def _mean_s(points: Sequence[Point]) -> float:
    return statistics.mean(seconds for point in points for seconds in point.step_s)


def _mfu(points: Sequence[Point], peak_tflops: float | None, total_s: float) -> float | None:
    counted = [sum(point.flops) for point in points if point.flops is not None]
    if peak_tflops is None or len(counted) != len(points):
        return None
    return sum(counted) / total_s / (peak_tflops * 1e12 * points[0].ranks)


def _draw_means(points: Sequence[Point]) -> Samples:
    """Means of a step's time in bootstrap samples, fp64 [draws]."""
    generator = np.random.default_rng((_SEED, points[0].nodes))
    times, lengths = np.concatenate([point.step_s for point in points]), np.array([point.steps for point in points])
    begins = np.cumsum(lengths) - lengths
    sums, num_steps = np.zeros(_DRAWS), int(lengths.min())
    for _ in points:  # one repetition of each sample at a time: a long study has many steps
        chosen = generator.integers(len(points), size=_DRAWS)
        steps = (generator.random((_DRAWS, num_steps)) * lengths[chosen, None]).astype(np.int64)
        sums += times[begins[chosen, None] + steps].mean(axis=1)
    means: Samples = sums / len(points)
    return means


def outliers_of(scaling: Scaling) -> list[Outlier]:
    """The nodes that took at least 1.1 times the median node's compute time in half of their runs of a size or more."""
    factors: dict[tuple[int, int, str], list[float]] = defaultdict(list)
    for point in scaling.points:
        if point.nodes > 1 and point.per_node:
            # Of two nodes, the other one: the median of both would hide half of it.
            usual = statistics.median_low(share.compute_s for share in point.per_node)
            for share in point.per_node:
                factors[point.nodes, share.node, share.host].append(share.compute_s / usual if usual else 1.0)
    found = [
        Outlier(nodes, node, host, statistics.median(seen), sum(factor >= _SLOW for factor in seen), len(seen)) for (nodes, node, host), seen in factors.items()
    ]
    return sorted((one for one in found if 2 * one.num_runs >= one.of_runs and one.num_runs), key=lambda one: (-one.factor, one.nodes, one.node))


def cell(value: float | int | None) -> str:
    """A number as it stands in the CSV and in the report; blank for None."""
    if value is None:
        return ""
    if isinstance(value, int):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1e5 else f"{value:.5g}"


def csv_text(rows: Sequence[Row]) -> str:
    """scaling.csv."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([cell(value) for value in asdict(row).values()] for row in rows)
    return text.getvalue()
