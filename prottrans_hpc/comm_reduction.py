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
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .recipe_parallel import Parallel

_log = logging.getLogger(__name__)

Steps = Iterator[dist.Work]
"""A sum in the making: what it yields must be waited for before it goes on."""
Sum = Callable[[Tensor], Steps]
"""Replaces a contiguous tensor by its sum over the ranks, the same bits on every rank."""
Hold = Callable[..., None]
"""`TorchComm.hold`: keeps tensors until the back end has let go of them."""


class Reduction(Protocol):
    """What is done with a bucket."""

    def steps(self, index: int, buffer: Tensor, gradients: Sequence[Tensor]) -> Steps:
        """Sum bucket `index` in place; `gradients` are views of its buffer."""


@dataclass(frozen=True)
class NodeGroups:
    """Process groups of this rank, made once."""

    node: dist.ProcessGroup
    """The ranks of its node."""
    between: dist.ProcessGroup
    """The ranks with its local rank, one on each node."""


@dataclass(frozen=True)
class Plain:
    """Sums whole buckets."""

    total: Sum

    def steps(self, index: int, buffer: Tensor, gradients: Sequence[Tensor]) -> Steps:
        """The sum alone."""
        return self.total(buffer)


def node_members(places: Sequence[Sequence[int]]) -> list[list[int]] | None:
    """The ranks of each node in the order of their local ranks, from every rank's (node rank, local rank).

    None where a hierarchy would gain nothing or has no partners: one node, one rank a node, nodes with unequal numbers of ranks.
    """
    nodes: dict[int, list[int]] = {}
    for rank in sorted(range(len(places)), key=lambda rank: tuple(places[rank])):
        nodes.setdefault(places[rank][0], []).append(rank)
    sizes = {len(members) for members in nodes.values()}
    return list(nodes.values()) if len(nodes) > 1 and len(sizes) == 1 and max(sizes) > 1 else None


def make_node_groups(nodes: Sequence[Sequence[int]], rank: int, *, timeout_s: int, is_cuda: bool) -> NodeGroups:
    """The two groups that `rank` is in. Collective."""
    between = [list(members) for members in zip(*nodes, strict=True)]
    timeout = timedelta(seconds=timeout_s)
    if is_cuda:  # one split makes all groups of a kind; NCCL wants every rank in it
        made = [dist.split_group(split_ranks=[list(group) for group in groups], timeout=timeout) for groups in (nodes, between)]
    else:  # only the members of a group meet: with thousands of ranks each knows two groups, not all of them
        own = [next(list(group) for group in groups if rank in group) for groups in (nodes, between)]
        made = [dist.new_group(group, timeout=timeout, backend="gloo", use_local_synchronization=True) for group in own]
    assert made[0] is not None
    assert made[1] is not None
    return NodeGroups(made[0], made[1])


def flat(tensor: Tensor, group: dist.ProcessGroup | None, hold: Hold) -> Steps:
    """One all-reduce."""
    yield started(dist.all_reduce, hold, tensor, group=group)


def hierarchical(tensor: Tensor, groups: NodeGroups, hold: Hold, between: Sum) -> Steps:
    """Reduce-scatter within the node, `between` the nodes, all-gather within the node. The order of additions is fixed."""
    num_local = groups.node.size()
    padded = pad(tensor, num_local)
    part = torch.empty(padded.numel() // num_local, dtype=tensor.dtype, device=tensor.device)
    if tensor.is_cuda:
        yield started(dist.reduce_scatter_single, hold, part, padded, group=groups.node)
    else:  # gloo's own is an all-reduce of everything inside: 4 times slower here
        received = torch.empty_like(padded)
        yield started(dist.all_to_all_single, hold, received, padded, group=groups.node)
        torch.sum(received.view(num_local, -1), dim=0, out=part)
    yield from between(part)
    yield started(dist.all_gather_single, hold, padded, part, group=groups.node)
    if padded.data_ptr() != tensor.data_ptr():
        tensor.copy_(padded[: tensor.numel()])


def pad(tensor: Tensor, parts: int) -> Tensor:
    """A flat tensor that divides into equal parts: the tensor itself where it does already."""
    missing = -tensor.numel() % parts
    return torch.cat((tensor, tensor.new_zeros(missing))) if missing else tensor


def started(collective: Any, hold: Hold, *tensors: Tensor, **options: Any) -> dist.Work:
    """Start a collective on tensors that are held until it has let go of them."""
    same_memory = [tensor.detach() for tensor in tensors]
    hold(*same_memory)
    work = collective(*same_memory, async_op=True, **options)
    assert work is not None  # only a rank outside the group gets None
    return work  # type: ignore[no-any-return]


class Pipeline:
    """Runs sums beside the backward pass.

    On CPUs, whenever a bucket is full, every sum under way takes its next step; it waits for the one before, which had
    the time of a bucket to end. On GPUs all steps are queued at once on a stream of their own, in which waiting costs nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._running: list[tuple[Steps, dist.Work]] = []

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


def choose(parallel: Parallel, groups: NodeGroups | None, hold: Hold) -> Reduction | None:
    """What the recipe asks for; None: one flat all-reduce of every bucket as it is."""
    from .comm_compression import COMPRESSIONS

    if groups is not None:
        _log.info("gradients are summed within each of %d nodes of %d ranks, then between the nodes", groups.between.size(), groups.node.size())
    elif parallel.reduction == "hierarchical":
        _log.info("parallel.reduction is hierarchical, which takes several nodes of equally many ranks, two or more: flat is used here")
    if groups is None and parallel.compression == "none":
        return None
    if parallel.compression == "powersgd":
        _log.info("powersgd begins with nothing left out: what it leaves out is kept in memory alone, so a resumed run takes other steps than an unbroken one")
    return COMPRESSIONS[parallel.compression](parallel, groups, hold)
