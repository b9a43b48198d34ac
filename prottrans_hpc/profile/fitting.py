"""Latency and bandwidth of the links, and the algorithm, from what reductions added to measured steps.

Least squares on the exposed communication relative to the step, over a grid in the logarithms of both that is refined
around its best point: the overlap with the backward pass makes the surface flat in places, where gradients would be of no use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from . import stragglers
from .collectives import Fabric, Wire
from .cost_model import Manner, reduction
from .known_links import AllReduce
from .measured_steps import Size
from .stragglers import Spread

CANDIDATES = {
    "gloo": ("ring",),
    "horovod": ("ring", "halving_doubling", "recursive_doubling"),
    "nccl": ("ring", "tree", "ring_or_tree"),
}
"""What a back end's all-reduce may have been: gloo has a ring; MPI below Horovod, and NCCL, choose by size, and do not say."""
FEWEST_SIZES = 2
"""Sizes above one node that a fit needs: there are two unknowns, latency and bandwidth. With known links there is one, how much worse they do in training."""
_LATENCY_S, _BYTES_PER_S = (1e-7, 1e-1), (1e6, 1e12)
_GRID, _ROUNDS, _SHRINK = 17, 6, 4.0
_LOAD = (0.1, 100.0)
"""How many times slower than in a communication study the same links may be in training."""
_INFLUENCE = 1e-3
"""A link that is ten times worse or better and changes no measured step by more than this share of it was not seen."""


@dataclass(frozen=True)
class Fitted:
    """A model of reductions and stragglers."""

    algorithm: str
    link: Wire
    """Between nodes, as the reductions saw it."""
    spread: Spread
    residual: float
    """Root of the mean square of what predicted reductions are off, as a share of the step."""

    def fabric(self, ranks_per_node: int) -> Fabric:
        """Where the reductions ran."""
        return Fabric(ranks_per_node, self.link)


def fit(sizes: Sequence[Size], manner: Manner, ranks_per_node: int, candidates: Sequence[str], known: AllReduce | None = None) -> Fitted:
    """The algorithm and link that explain these sizes best. The caller has made sure that there are enough of them.

    Where a communication study is known, its links are only made slower or faster as a whole.
    """
    several = [size for size in sizes if size.nodes > 1]
    spread = stragglers.fit({size.nodes: size.skew_s for size in several})
    if known:
        found = [_scale(name, several, manner, ranks_per_node, known.link(name)) for name in candidates]
    else:
        found = [_search(name, several, manner, ranks_per_node) for name in candidates]
    best = min(found, key=lambda entry: entry[1])
    return Fitted(best[0], best[2], spread, best[1])


def unseen(fitted: Fitted, sizes: Sequence[Size], manner: Manner, ranks_per_node: int) -> list[str]:
    """Which of latency and bandwidth the study cannot tell, because ten times as much or as little would look the same."""
    several, link = [size for size in sizes if size.nodes > 1], fitted.link
    worse = {
        "latency": (Wire(10 * link.latency_s, link.bytes_per_s), Wire(link.latency_s / 10, link.bytes_per_s)),
        "bandwidth": (Wire(link.latency_s, link.bytes_per_s / 10), Wire(link.latency_s, 10 * link.bytes_per_s)),
    }

    def shares(wire: Wire) -> np.ndarray:
        return np.array([_share(size, fitted.algorithm, manner, Fabric(ranks_per_node, wire)) for size in several])

    here = shares(link)
    return [name for name, wires in worse.items() if any(np.abs(shares(wire) - here).max() < _INFLUENCE for wire in wires)]


def _share(size: Size, algorithm: str, manner: Manner, fabric: Fabric) -> np.ndarray:
    """Predicted exposed communication as a share of the measured step."""
    changed = replace(manner, algorithm=algorithm)
    return np.asarray(reduction(size.work, changed, fabric, size.nodes)[1]) / size.step_s


def _errors(algorithm: str, sizes: Sequence[Size], manner: Manner, fabric: Fabric) -> np.ndarray:
    off = [_share(size, algorithm, manner, fabric) - size.exposed_comm_s / size.step_s for size in sizes]
    return np.asarray(np.sqrt(np.mean(np.square(off), axis=0)))


def _scale(algorithm: str, sizes: Sequence[Size], manner: Manner, ranks_per_node: int, link: Wire) -> tuple[str, float, Wire]:
    factors = np.geomspace(*_LOAD, num=_GRID**2)
    grid = Wire(link.latency_s * factors, link.bytes_per_s / factors)
    errors = _errors(algorithm, sizes, manner, Fabric(ranks_per_node, grid))
    best = int(errors.argmin())
    return algorithm, float(errors[best]), Wire(float(grid.latency_s[best]), float(grid.bytes_per_s[best]))


def _search(algorithm: str, sizes: Sequence[Size], manner: Manner, ranks_per_node: int) -> tuple[str, float, Wire]:
    lows, highs = np.log(np.array([_LATENCY_S[0], _BYTES_PER_S[0]])), np.log(np.array([_LATENCY_S[1], _BYTES_PER_S[1]]))
    low, high = lows, highs
    for _ in range(_ROUNDS):
        latency, rate = (np.exp(np.linspace(low[axis], high[axis], _GRID)) for axis in (0, 1))
        grid = Wire(np.repeat(latency, _GRID), np.tile(rate, _GRID))
        errors = _errors(algorithm, sizes, manner, Fabric(ranks_per_node, grid))
        best = int(errors.argmin())
        centre, half = np.log([grid.latency_s[best], grid.bytes_per_s[best]]), (high - low) / 2 / _SHRINK
        low, high = np.maximum(lows, centre - half), np.minimum(highs, centre + half)
    return algorithm, float(errors[best]), Wire(float(grid.latency_s[best]), float(grid.bytes_per_s[best]))
