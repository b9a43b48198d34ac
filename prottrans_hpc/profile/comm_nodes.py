"""Figures of single nodes, from which slow ones are found: their link, what joins their ranks, and how fast they compute.

Nodes meet in pairs, all at once, with another partner each round: a slow link slows all pairs of its node, but only one
pair of each partner. The best of a few repetitions counts, since nothing makes a node faster than it is.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..comm import Comm
from .comm_backends import Contender, Gang
from .comm_fits import SlowNode, link_seconds, rounds_of, slow_nodes

PAIR_BYTES = 1 << 20
"""That two nodes send each other."""
_MOST_ROUNDS = 8
"""Partners that a node meets: with more it would be no better known."""
_REPETITIONS = 5
_WIDTH = 384
"""Of the square matrices whose product tells how fast a rank computes."""


@dataclass(frozen=True)
class NodeTimes:
    """Seconds by node; an empty list: not measured."""

    link: list[float]
    """For PAIR_BYTES there and back at once."""
    within: list[float]
    """For an all-reduce of as many among its ranks."""
    compute: list[float]
    """For a matrix product, of its slowest rank."""

    def slow(self, hosts: Sequence[str], *, factor: float) -> list[SlowNode]:
        """The nodes that stand out, the worst first."""
        named = {"link": self.link, "within": self.within, "compute": self.compute}
        found = [slow for what, seconds in named.items() if seconds for slow in slow_nodes(what, seconds, hosts, factor=factor)]
        return sorted(found, key=lambda slow: -slow.factor)


def measure_nodes(comm: Comm, gang: Gang, gloo: Contender, *, seed: int) -> NodeTimes:
    """The figures of all nodes, the same on every rank. Collective."""
    context = gang.context
    met = _meet(comm, gang, seed) if context.num_nodes > 1 else []
    within = (
        _best(comm, gloo.prepare("all_reduce", "node", PAIR_BYTES // 4 // context.local_world_size * context.local_world_size))
        if "node" in gloo.scopes
        else None
    )
    left, right = torch.rand(_WIDTH, _WIDTH), torch.rand(_WIDTH, _WIDTH)
    compute = _best(comm, lambda: torch.mm(left, right))
    told = comm.all_gather_object([context.node_rank, met, within, compute])
    nodes = range(context.num_nodes)
    return NodeTimes(
        link_seconds([next(rank[1] for rank in told if rank[0] == node and rank[1]) for node in nodes]) if context.num_nodes > 1 else [],
        [max(rank[2] for rank in told if rank[0] == node) for node in nodes] if within is not None else [],
        [max(rank[3] for rank in told if rank[0] == node) for node in nodes],
    )


def _best(comm: Comm, call: Callable[[], object]) -> float:
    """The shortest of a few."""
    taken = []
    for _ in range(_REPETITIONS):
        comm.barrier()
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return min(taken)


def _meet(comm: Comm, gang: Gang, seed: int) -> list[tuple[int, float]]:
    """(partner, seconds) of each meeting of this rank's node; the first rank of a node speaks for it, the others wait."""
    context = gang.context
    rounds = rounds_of(context.num_nodes)
    chosen = random.Random(seed).sample(rounds, min(len(rounds), _MOST_ROUNDS))
    places = comm.all_gather_object([context.node_rank, comm.rank] if context.local_rank == 0 else None)
    rank_of = {place[0]: place[1] for place in places if place}
    sent, received = torch.ones(PAIR_BYTES // 4), torch.empty(PAIR_BYTES // 4)
    met = []
    for pairs in chosen:
        partner = next((sum(pair) - context.node_rank for pair in pairs if context.node_rank in pair), None)

        def exchange(partner: int | None = partner) -> None:
            if partner is None or context.local_rank != 0:
                return
            works = [dist.isend(sent, rank_of[partner]), dist.irecv(received, rank_of[partner])]
            for work in works:
                assert work is not None
                work.wait()

        exchange()  # the first message between two ranks may connect them
        seconds = _best(comm, exchange)
        if partner is not None and context.local_rank == 0:
            met.append((partner, seconds))
    return met
