"""The time of a training step on N nodes: its own work, the wait for the slowest node, and the reduction that the backward pass does not hide.

Gradients become ready from the last layer to the first, in proportion to their bytes (layers alike: a transformer's
are), and are sent in buckets, one after the other, as soon as each is full: Li et al. 2020, PyTorch Distributed. Only
the last micro batch of a step sends. What is sent beside computation is taken not to slow it. What a cut model sends is in
`sharded_cost`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from .collectives import ALGORITHMS, Fabric, Number
from .sharded_cost import Cut, Passes, traffic
from .stragglers import NONE, Spread

MIB = 2**20


@dataclass(frozen=True)
class Work:
    """What a rank does in a step whatever the number of nodes; seconds."""

    forward_s: float
    backward_s: float
    """Of all micro batches."""
    other_s: float
    """Data, optimizer and the rest: once a step."""
    gradient_bytes: float
    """As they are in memory."""

    @property
    def local_s(self) -> float:
        """Without any other rank."""
        return self.forward_s + self.backward_s + self.other_s


@dataclass(frozen=True)
class Manner:
    """How gradients are reduced."""

    bucket_bytes: float
    algorithm: str
    """One of `collectives.ALGORITHMS`."""
    sent_fraction: float = 1.0
    """Bytes on the wire for a byte of gradient: 0.5 for fp32 sent as 16 bits."""
    micro_batches: int = 1
    """Of a step; all but the last one only compute."""
    sums: int = 1
    """Reductions of a bucket, one after the other, between which its bytes are parted: 2 for the factors of PowerSGD."""
    compress_s: float = 0.0
    """What compressing computes in a step. Where this is measured it is part of the passes, and 0 here."""
    cut: Cut | None = None
    """None: every rank holds the whole model, and gradients go in buckets."""


@dataclass(frozen=True)
class Step:
    """A predicted step; seconds."""

    num_nodes: int
    local_s: float
    straggler_s: float
    """Mean wait for the slowest node."""
    communication_s: float
    """All reductions, hidden or not."""
    exposed_comm_s: float
    """What of them comes on top."""

    @property
    def step_s(self) -> float:
        """All of it."""
        return self.local_s + self.straggler_s + self.exposed_comm_s


def bucket_sizes(gradient_bytes: float, bucket_bytes: float) -> np.ndarray:
    """Bytes of each bucket in the order in which they fill; the last takes what is left."""
    count = max(1, math.ceil(gradient_bytes / bucket_bytes))
    sizes = np.full(count, float(bucket_bytes))
    sizes[-1] = gradient_bytes - bucket_bytes * (count - 1)
    return sizes


def reduction(work: Work, manner: Manner, fabric: Fabric, num_nodes: int) -> tuple[Number, Number]:
    """(all of the communication, what is exposed of it) in seconds; arrays where the fabric's numbers are.

    A bucket starts when it is full and the one before it is through, so that the last one ends at the latest of
    "when bucket k was full, and all from k on after it".
    """
    if num_nodes * fabric.ranks_per_node == 1:
        return 0.0, 0.0
    if manner.cut is not None:
        return traffic(manner.cut, Passes(work.forward_s, work.backward_s, work.gradient_bytes, manner.micro_batches, manner.algorithm), fabric, num_nodes)
    sizes = bucket_sizes(work.gradient_bytes, manner.bucket_bytes)
    overlapping_s, num_full = work.backward_s / manner.micro_batches, len(sizes) - 1
    sent = (size * manner.sent_fraction / manner.sums for size in (sizes[0], sizes[-1]))
    cost, last = (manner.sums * ALGORITHMS[manner.algorithm](size, num_nodes, fabric) for size in sent)
    total = num_full * cost + last
    if not num_full:
        return total, total + manner.compress_s
    # All buckets but the last are alike, so both grow evenly with k, and the latest end is with the first, the last but one or the last.
    first_s = sizes[0] / work.gradient_bytes * overlapping_s
    ends = (first_s + total, num_full * first_s + cost + last, overlapping_s + last)
    return total, np.maximum(np.maximum(ends[0], ends[1]), ends[2]) - overlapping_s + manner.compress_s


def predict(work: Work, manner: Manner, fabric: Fabric, num_nodes: int, spread: Spread = NONE) -> Step:
    """A step on so many nodes."""
    total, exposed = reduction(work, manner, fabric, num_nodes)
    return Step(num_nodes, work.local_s, spread.wait_s(num_nodes), float(total), float(exposed))


def with_micro_batches(work: Work, manner: Manner, factor: int) -> tuple[Work, Manner]:
    """The same with so many times the micro batches a step, and so that much larger a global batch; one optimizer step all the same."""
    more = replace(work, forward_s=factor * work.forward_s, backward_s=factor * work.backward_s)
    return more, replace(manner, micro_batches=factor * manner.micro_batches)
