"""What a cut model sends in a step, and how much of it comes on top: weights brought together, gradients cut again, activations within tensor groups.

A copy of the model lies on s tensor groups of t ranks. Its layers and the rest are units, which are taken as equally large: each is
brought together before its forward pass and, but for the rest, once more before its backward pass, and its gradients are
reduced and scattered behind it (Rajbhandari et al. 2020, ZeRO, stage 3; Zhao et al. 2023, PyTorch FSDP). This happens in every
micro batch; only the sum between copies is one a step. A tensor group sums its activations twice a layer in either pass
(Shoeybi et al. 2019, Megatron-LM), and nothing is computed meanwhile.

A ring gathers n bytes over p ranks in p - 1 steps of n / p bytes, and reduces and scatters them in as many (Thakur, Rabenseifner and Gropp 2005).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .collectives import ALGORITHMS, Fabric, Number, Wire


@dataclass(frozen=True)
class Cut:
    """How a model is cut over ranks."""

    shards: int | None
    """Tensor groups that share a copy; None: all that there are."""
    units: int
    """Parts that are brought together by themselves."""
    weight_bytes: float
    """Of the whole model."""
    tensor_ranks: int = 1
    """Of a tensor group."""
    activation_bytes: float = 0.0
    """That a tensor group sums at once, in a micro batch."""
    overlaps: bool = True
    """Whether the next unit travels while one is computed, as on streams of a GPU; gloo's collectives hold the pass up."""
    scatter_rounds: int = 1
    """Times that a reduce-scatter sends what a ring's would: gloo's has an all-reduce inside."""


@dataclass(frozen=True)
class Passes:
    """What of a step the traffic runs beside."""

    forward_s: float
    backward_s: float
    """Of all micro batches."""
    gradient_bytes: float
    micro_batches: int
    algorithm: str
    """Of the sum between copies, one of `collectives.ALGORITHMS`."""


def gather(num_bytes: Number, ranks: int, wire: Wire) -> Number:
    """(p - 1) (latency + n / p / bandwidth): a ring's all-gather, and its reduce-scatter."""
    return (ranks - 1) * (wire.latency_s + num_bytes / ranks / wire.bytes_per_s)


def num_shards(cut: Cut, ranks: int) -> int:
    """Tensor groups that a copy is cut over, of so many ranks."""
    groups = max(1, ranks // cut.tensor_ranks)
    return min(groups, cut.shards or groups)


def traffic(cut: Cut, passes: Passes, fabric: Fabric, num_nodes: int) -> tuple[Number, Number]:
    """(all of the communication of a step, what is exposed of it) in seconds; arrays where the fabric's numbers are."""
    shards, units, micro_batches = num_shards(cut, num_nodes * fabric.ranks_per_node), cut.units, passes.micro_batches
    wire, share = _copy_link(cut, shards, fabric, num_nodes)
    weights = gather(share * cut.weight_bytes / units, shards, wire)
    gradients = cut.scatter_rounds * gather(share * passes.gradient_bytes / units, shards, wire)
    between = _between_copies(cut, shards, passes, fabric, num_nodes)
    kept_whole = 1  # the rest stays together from the forward pass to the backward pass
    behind = weights + gradients
    activations = 4 * (units - 1) * _tensor_sum(cut, fabric, num_nodes)
    total = micro_batches * ((2 * units - kept_whole) * weights + units * gradients + activations) + units * between
    if not cut.overlaps or units == 1:
        return total, total
    forward_s, backward_s = (value / micro_batches / units for value in (passes.forward_s, passes.backward_s))
    first = weights + (units - 1) * np.maximum(0.0, weights - forward_s)
    later, last = ((units - 1) * np.maximum(0.0, behind + more - backward_s) + gradients + more for more in (0.0, between))
    return total, micro_batches * (first + activations) + (micro_batches - 1) * later + last


def _copy_link(cut: Cut, shards: int, fabric: Fabric, num_nodes: int) -> tuple[Wire, float]:
    """What joins the groups of a copy, and which share of the model each of its rings carries there.

    Every rank of a tensor group has a ring of its own for its part of the weights. Between nodes these rings share a node's link.
    """
    if shards * cut.tensor_ranks <= fabric.ranks_per_node:
        return fabric.inner(), 1.0 / cut.tensor_ranks
    return fabric.slowest(num_nodes), 1.0


def _between_copies(cut: Cut, shards: int, passes: Passes, fabric: Fabric, num_nodes: int) -> Number:
    """The sum of a unit's gradients over the copies: every rank with its like, first within the node, then between nodes over the node's link."""
    copy_ranks = shards * cut.tensor_ranks
    unit_bytes = passes.gradient_bytes / cut.units
    a_node = max(1, fabric.ranks_per_node // copy_ranks)
    nodes_a_copy = max(1, copy_ranks // fabric.ranks_per_node)
    inside = 2 * gather(unit_bytes / copy_ranks, a_node, fabric.inner())
    others = num_nodes // nodes_a_copy
    if others < 2:
        return inside
    return inside + ALGORITHMS[passes.algorithm](unit_bytes / nodes_a_copy, others, Fabric(1, fabric.between))


def _tensor_sum(cut: Cut, fabric: Fabric, num_nodes: int) -> Number:
    """One all-reduce of a tensor group's activations, a ring's."""
    wire = fabric.inner() if cut.tensor_ranks <= fabric.ranks_per_node else fabric.slowest(num_nodes)
    return 2 * gather(cut.activation_bytes, cut.tensor_ranks, wire)
