"""How the gradients of a bucket become their sum over the ranks, when one flat all-reduce is not what the recipe asks for.

A sum is a generator: it starts a collective and yields it, is resumed when that has ended, and starts the next. All
ranks run the same generators in the same order, so nothing depends on who is first, and `Pipeline` overlaps them with the
backward pass. `hierarchical` is the idea behind IBM's DDL (arXiv 1708.02188): within a node the ranks reduce and scatter, so
that each holds one part of the node's sum; only those parts cross between the nodes; within the node they are gathered
again. Of n bytes, 2 (N - 1) / N n cross the link of each of N nodes, in each direction, in 2 (N - 1) steps, wherever the
starter has put the ranks. A ring over all p ranks takes 2 (p - 1) steps, and sends 2 (p - 1) / p n over a node's link as often as
neighbours in it are on different nodes: once when ranks fill one node after the other, once a rank when they are dealt out in turn.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .recipe_parallel import HALVED, Parallel

_log = logging.getLogger(__name__)


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> object:
        """Return when it has ended; on a stream, when what is queued after it would find it ended."""


Steps = Iterator[Work]
"""A sum in the making: what it yields must be waited for before it goes on."""
Sum = Callable[[Tensor], Steps]
"""Replaces a contiguous tensor by its sum over the ranks, the same bits on every rank."""


class Group(Protocol):
    """Ranks that talk among themselves; each method starts a collective on flat tensors of any float type."""

    @property
    def size(self) -> int:
        """How many they are."""

    def all_reduce(self, tensor: Tensor) -> Work:
        """The sum, in place. fp32 or fp64."""

    def all_reduce_max(self, tensor: Tensor) -> Work:
        """The largest of each place, in place. fp32 or fp64."""

    def all_to_all(self, received: Tensor, sent: Tensor) -> Work:
        """Part i of what each rank sends goes to rank i, which receives the parts in the order of the ranks."""

    def all_gather(self, gathered: Tensor, part: Tensor) -> Work:
        """Every rank's part, in the order of the ranks."""

    def reduce_scatter(self, part: Tensor, whole: Tensor) -> Work | None:
        """Of the sum the part that is this rank's; None where an exchange and a sum by the caller are faster."""


class Reduction(Protocol):
    """What is done with a bucket."""

    def steps(self, index: int, buffer: Tensor, gradients: Sequence[Tensor]) -> Steps:
        """Sum bucket `index` in place; `gradients` are views of its buffer."""

    def forget(self) -> None:
        """Drop what is remembered of earlier steps: the next one is as the first of a start."""


@dataclass(frozen=True)
class NodeGroups:
    """Groups of this rank, made once."""

    node: Group
    """The ranks of its node."""
    between: Group
    """The ranks with its local rank, one on each node."""


@dataclass(frozen=True)
class Plain:
    """Sums whole buckets."""

    total: Sum

    def steps(self, index: int, buffer: Tensor, gradients: Sequence[Tensor]) -> Steps:
        """The sum alone."""
        return self.total(buffer)

    def forget(self) -> None:
        """Nothing is remembered."""


def node_members(places: Sequence[Sequence[int]]) -> list[list[int]] | None:
    """The ranks of each node in the order of their local ranks, from every rank's (node rank, local rank).

    None where a hierarchy would gain nothing or has no partners: one node, one rank a node, nodes with unequal numbers of ranks.
    """
    nodes: dict[int, list[int]] = {}
    for rank in sorted(range(len(places)), key=lambda rank: tuple(places[rank])):
        nodes.setdefault(places[rank][0], []).append(rank)
    sizes = {len(members) for members in nodes.values()}
    return list(nodes.values()) if len(nodes) > 1 and len(sizes) == 1 and max(sizes) > 1 else None


def flat(tensor: Tensor, group: Group) -> Steps:
    """One all-reduce."""
    yield group.all_reduce(tensor)


def hierarchical(tensor: Tensor, groups: NodeGroups, between: Sum) -> Steps:
    """Reduce-scatter within the node, `between` the nodes, all-gather within the node. The order of additions is fixed."""
    num_local = groups.node.size
    padded = pad(tensor, num_local)
    part = torch.empty(padded.numel() // num_local, dtype=tensor.dtype, device=tensor.device)
    scattered = groups.node.reduce_scatter(part, padded)
    if scattered is not None:
        yield scattered
    else:
        received = torch.empty_like(padded)
        yield groups.node.all_to_all(received, padded)
        torch.sum(received.view(num_local, -1), dim=0, out=part)
    yield from between(part)
    yield groups.node.all_gather(padded, part)
    if padded.data_ptr() != tensor.data_ptr():
        tensor.copy_(padded[: tensor.numel()])


def pad(tensor: Tensor, parts: int) -> Tensor:
    """A flat tensor that divides into equal parts: the tensor itself where it does already."""
    missing = -tensor.numel() % parts
    return torch.cat((tensor, tensor.new_zeros(missing))) if missing else tensor


class Pipeline:
    """Runs sums beside the backward pass.

    Without a stream, whenever a bucket is full, every sum under way takes its next step; it waits for the one before, which had
    the time of a bucket to end. Given a stream, in which waiting costs nothing, all steps are queued there at once. Buckets have to
    be started in the same order on all ranks: those that wait for one another's next step would do so for ever.
    """

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self._stream = stream
        self._running: list[tuple[Steps, Work]] = []

    def start(self, steps: Steps) -> None:
        """Begin a sum."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for work in steps:
                    work.wait()
            return
        self._advance()
        first = next(steps, None)
        if first is not None:
            self._running.append((steps, first))

    def finish(self) -> None:
        """Return when every sum that was begun is there."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        while self._running:
            self._advance()

    def _advance(self) -> None:
        running, self._running = self._running, []
        for steps, work in running:
            work.wait()
            following = next(steps, None)
            if following is not None:
                self._running.append((steps, following))


def wants_nodes(parallel: Parallel) -> bool:
    """Whether the recipe's sums are taken within nodes first, where that gains something."""
    return parallel.reduction == "hierarchical" or parallel.compression in HALVED


def choose(parallel: Parallel, world: Group, groups: NodeGroups | None) -> Reduction | None:
    """What the recipe asks for; None: one flat all-reduce of every bucket as it is."""
    from .comm_compression import COMPRESSIONS

    if groups is not None:
        _log.info("gradients are summed within each of %d nodes of %d ranks, then between the nodes", groups.between.size, groups.node.size)
    elif parallel.reduction == "hierarchical":
        _log.info("parallel.reduction is hierarchical, which takes several nodes of equally many ranks, two or more: flat is used here")
    if groups is None and parallel.compression == "none":
        return None
    if parallel.compression == "powersgd":
        _log.info("powersgd begins with nothing left out: what it leaves out is kept in memory alone, so a resumed run takes other steps than an unbroken one")
    return COMPRESSIONS[parallel.compression](parallel, world, groups)
