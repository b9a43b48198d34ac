"""What a scaling study says of each size, as a cost model needs it: its own work, the wait for the slowest node, and what reductions add.

Checkpoints are left out of steps: how often they come is the recipe's choice. What a rank waits for gradients contains the wait
for slower nodes. The rank that comes last waits for none: its wait is the reduction's. Older studies lack it; there the skew of the
step is taken off. A cut model talks within its passes, and the ledger does not tell that apart: what they take longer than on one
node is communication then, and what a node waits there for others is part of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .cost_model import Work
from .scaling import Point, Scaling


@dataclass(frozen=True)
class Size:
    """One number of nodes; medians over steps and repetitions, seconds."""

    nodes: int
    step_s: float
    work: Work
    exposed_comm_s: float
    """Without the wait for slower nodes."""
    skew_s: float
    """Mean: what a fitted distribution predicts."""


Draw = Mapping[int, Sequence[tuple[Point, np.ndarray]]]
"""By number of nodes: points, and which of their steps count."""


def all_steps(study: Scaling) -> Draw:
    """Every measured step once."""
    return {nodes: [(point, np.arange(point.steps)) for point in study.at(nodes)] for nodes in study.node_counts}


def drawn_steps(study: Scaling, generator: np.random.Generator) -> Draw:
    """A bootstrap sample: of each size as many points as it has, drawn with replacement, and of each as many steps, likewise."""
    return {nodes: [_drawn(study.at(nodes), generator) for _ in study.at(nodes)] for nodes in study.node_counts}


def _drawn(points: Sequence[Point], generator: np.random.Generator) -> tuple[Point, np.ndarray]:
    point = points[int(generator.integers(len(points)))]
    return point, generator.integers(point.steps, size=point.steps)


def sizes_of(study: Scaling, draw: Draw) -> list[Size]:
    """Ascending."""
    sizes = [_size(study, nodes, draw[nodes]) for nodes in study.node_counts]
    return [_beside_one_node(size, sizes[0], study) for size in sizes] if study.sharing.is_cut else sizes


def _beside_one_node(size: Size, one: Size, study: Scaling) -> Size:
    """A cut model's own passes are those of one node, or in a strong study a node's share of them; longer where ranks take turns on the same cores."""
    share = (one.nodes / size.nodes if study.mode == "strong" else 1.0) * study.turns(size.nodes) / study.turns(one.nodes)
    work = replace(size.work, forward_s=share * one.work.forward_s, backward_s=share * one.work.backward_s)
    longer_s = size.work.forward_s + size.work.backward_s - work.forward_s - work.backward_s
    return replace(size, work=work, exposed_comm_s=max(0.0, longer_s + size.exposed_comm_s))


def _size(study: Scaling, nodes: int, chosen: Sequence[tuple[Point, np.ndarray]]) -> Size:
    def column(of: str) -> np.ndarray:
        return np.concatenate([np.asarray(getattr(point, of, None) or getattr(point.ledger, of))[steps] for point, steps in chosen])

    skew = column("skew_s")
    work = Work(
        float(np.median(column("forward_s"))),
        float(np.median(column("backward_s"))),
        float(np.median(column("data_wait_s") + column("optimizer_s") + column("other_s"))),
        float(study.gradient_bytes),
    )
    is_told = all(point.reduction_s is not None for point, _ in chosen)
    exposed = column("reduction_s") if is_told else np.maximum(0.0, column("exposed_comm_s") - skew)
    return Size(nodes, float(np.median(column("step_s") - column("checkpoint_s"))), work, float(np.median(exposed)), float(np.mean(skew)))
