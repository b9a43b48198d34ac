"""What an all-reduce costs on a fabric, by Hockney's model: a message of n bytes takes latency + n / bandwidth.

Each formula says whose it is. p are all ranks, N nodes of r ranks. Reduction of the numbers themselves is taken to be
free, as is contention between jobs: what a fit finds as latency and bandwidth contains both. A node's link is shared
by its ranks, so what all of them send at once is counted against it.

Sources: Hockney 1994, The communication challenge for MPP; Thakur, Rabenseifner and Gropp 2005, Optimization of
Collective Communication Operations in MPICH (ring, recursive doubling, recursive halving and doubling); Rabenseifner
2004, Optimization of Collective Reduction Operations; Patarasuk and Yuan 2009, Bandwidth optimal all-reduce algorithms
(the ring, and that no all-reduce sends less than 2 (p - 1) / p n); Sanders, Speck and Traeff 2009, Two-tree algorithms for full
bandwidth broadcast, reduction and scan; Cho et al. 2019, BlueConnect (one reduction a level of the machine, by the authors of IBM's DDL).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Number = Any
"""A float, or a numpy array of many candidates at once."""


@dataclass(frozen=True)
class Wire:
    """A link, as `machine.Link`; its numbers may be arrays of candidates."""

    latency_s: Number
    bytes_per_s: Number


@dataclass(frozen=True)
class Fabric:
    """Nodes, and what joins their ranks."""

    ranks_per_node: int
    between: Wire
    within: Wire | None = None
    """None: one rank a node, or nothing is known; what happens within nodes is then free."""

    def inner(self) -> Wire:
        """The connection within a node; one that costs nothing where none is known."""
        return self.within or Wire(0.0, math.inf)

    def slowest(self, num_nodes: int) -> Wire:
        """What a step of a ring over all ranks waits for."""
        if num_nodes == 1:
            return self.inner()
        within = self.inner()
        return Wire(np.maximum(self.between.latency_s, within.latency_s), np.minimum(self.between.bytes_per_s, within.bytes_per_s))


Cost = Callable[[Number, int, Fabric], Number]
"""`(bytes, nodes, fabric)` -> seconds of one all-reduce."""


def ring(num_bytes: Number, num_nodes: int, fabric: Fabric) -> Number:
    """2 (p - 1) steps of n / p bytes over the slowest link (Patarasuk and Yuan 2009; Thakur et al. 2005, section 4.4)."""
    ranks, link = num_nodes * fabric.ranks_per_node, fabric.slowest(num_nodes)
    return 2 * (ranks - 1) * (link.latency_s + num_bytes / ranks / link.bytes_per_s)


def halving_doubling(num_bytes: Number, num_nodes: int, fabric: Fabric) -> Number:
    """2 ceil(log2 p) steps that send 2 (p - 1) / p n bytes (Rabenseifner 2004; Thakur et al. 2005, section 4.5)."""
    ranks, link = num_nodes * fabric.ranks_per_node, fabric.slowest(num_nodes)
    return 2 * math.ceil(math.log2(ranks)) * link.latency_s + 2 * (ranks - 1) / ranks * num_bytes / link.bytes_per_s


def recursive_doubling(num_bytes: Number, num_nodes: int, fabric: Fabric) -> Number:
    """ceil(log2 p) steps of all n bytes (Thakur et al. 2005); between nodes the r ranks of a node share its link."""
    within, between = fabric.inner(), fabric.between
    inside = math.ceil(math.log2(fabric.ranks_per_node)) * (within.latency_s + num_bytes / within.bytes_per_s)
    return inside + math.ceil(math.log2(num_nodes)) * (between.latency_s + fabric.ranks_per_node * num_bytes / between.bytes_per_s)


def tree(num_bytes: Number, num_nodes: int, fabric: Fabric) -> Number:
    """Two binary trees over the nodes, each for half of the bytes, up and down (Sanders et al. 2009), with a chain through each node; NCCL's.

    Pipelined, its bytes cost 2 n / bandwidth whatever the number of nodes. On one node it is the ring.
    """
    if num_nodes == 1:
        return ring(num_bytes, 1, fabric)
    chain, link = 2 * (fabric.ranks_per_node - 1) * fabric.inner().latency_s, fabric.slowest(num_nodes)
    return chain + 2 * math.ceil(math.log2(num_nodes)) * fabric.between.latency_s + 2 * num_bytes / link.bytes_per_s


def hierarchical(num_bytes: Number, num_nodes: int, fabric: Fabric) -> Number:
    """Reduce-scatter within each node, all-reduce between nodes of every rank's share, all-gather within (Cho et al. 2019).

    Within a node rings; between nodes the faster of ring and halving and doubling, the shares of a node's ranks at once over its link.
    """
    ranks, within = fabric.ranks_per_node, fabric.inner()
    inside = 2 * (ranks - 1) * (within.latency_s + num_bytes / ranks / within.bytes_per_s)
    nodes = Fabric(1, fabric.between)
    if num_nodes == 1:
        return inside
    return inside + np.minimum(ring(num_bytes, num_nodes, nodes), halving_doubling(num_bytes, num_nodes, nodes))


def ring_or_tree(num_bytes: Number, num_nodes: int, fabric: Fabric) -> Number:
    """The faster of both for this message, as NCCL chooses."""
    return np.minimum(ring(num_bytes, num_nodes, fabric), tree(num_bytes, num_nodes, fabric))


ALGORITHMS: dict[str, Cost] = {
    "ring": ring,
    "halving_doubling": halving_doubling,
    "recursive_doubling": recursive_doubling,
    "tree": tree,
    "ring_or_tree": ring_or_tree,
    "hierarchical": hierarchical,
}
