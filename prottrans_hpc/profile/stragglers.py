"""How long N nodes wait for the slowest of them.

The work of a node varies from step to step. Taken as independent between nodes, with the same distribution on all,
the slowest of N is above the mean node by

- Gumbel: scale x ln N, where node times have an exponential upper tail. Their own distribution is then taken as
  Gumbel, whose maximum of N is the same one shifted by scale x ln N (Gumbel 1958, Statistics of Extremes);
- normal: scale x the expected largest of N standard normal numbers, by Blom's approximation (1958), which grows as sqrt(2 ln N).

The skew in a study is measured from the median node, which is taken for the mean one. Neither knows nodes that are always
slow: those are named by the scaling report, and belong excluded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist


def gumbel(num_nodes: int) -> float:
    """Mean of the largest of N, above the mean of one, in scales."""
    return math.log(num_nodes)


def normal(num_nodes: int) -> float:
    """The same of normal times, in standard deviations."""
    return NormalDist().inv_cdf((num_nodes - 0.375) / (num_nodes + 0.25))


FAMILIES: dict[str, Callable[[int], float]] = {"gumbel": gumbel, "normal": normal}


@dataclass(frozen=True)
class Spread:
    """How unequal nodes are."""

    family: str
    scale_s: float
    residual_s: float = 0.0
    """Root of the mean square of what the measured waits are off."""

    def wait_s(self, num_nodes: int) -> float:
        """Mean time from the mean node's end to the slowest one's; none on one node."""
        return self.scale_s * FAMILIES[self.family](num_nodes)


NONE = Spread("gumbel", 0.0)
"""All nodes alike."""


def fit(waits: Mapping[int, float]) -> Spread:
    """The family and scale that fit mean waits (seconds, by number of nodes) best, by least squares; of one size, Gumbel, which grows more."""
    measured = {nodes: wait for nodes, wait in waits.items() if nodes > 1}
    fits = [_fit_family(family, measured) for family in FAMILIES]
    return min(fits, key=lambda spread: spread.residual_s) if len(measured) > 1 else fits[0]


def _fit_family(family: str, waits: Mapping[int, float]) -> Spread:
    if not waits:
        return NONE
    shape = {nodes: FAMILIES[family](nodes) for nodes in waits}
    scale = max(0.0, sum(waits[nodes] * shape[nodes] for nodes in waits) / sum(value**2 for value in shape.values()))
    square = sum((waits[nodes] - scale * shape[nodes]) ** 2 for nodes in waits) / len(waits)
    return Spread(family, scale, math.sqrt(square))
