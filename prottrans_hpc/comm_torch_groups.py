"""The groups of ranks that reductions take, over torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .comm_reduction import NodeGroups, Work

Hold = Callable[..., None]
"""`TorchComm.hold`: keeps tensors until the back end has let go of them."""


@dataclass(frozen=True)
class TorchGroup:
    """A process group, or the default one (None)."""

    process_group: dist.ProcessGroup | None
    hold: Hold

    @property
    def size(self) -> int:
        """How many ranks are in it."""
        return dist.get_world_size(self.process_group)

    def all_reduce(self, tensor: Tensor) -> Work:
        """The sum, in place."""
        return self._start(dist.all_reduce, tensor)

    def all_reduce_max(self, tensor: Tensor) -> Work:
        """The largest of each place, in place."""
        return self._start(dist.all_reduce, tensor, op=dist.ReduceOp.MAX)

    def all_to_all(self, received: Tensor, sent: Tensor) -> Work:
        """An exchange of equal parts."""
        return self._start(dist.all_to_all_single, received, sent)

    def all_gather(self, gathered: Tensor, part: Tensor) -> Work:
        """The parts one after the other."""
        return self._start(dist.all_gather_single, gathered, part)

    def reduce_scatter(self, part: Tensor, whole: Tensor) -> Work | None:
        """NCCL's; gloo's own is an all-reduce of everything inside: 4 times slower here."""
        return self._start(dist.reduce_scatter_single, part, whole) if whole.is_cuda else None

    def _start(self, collective: Any, *tensors: Tensor, **options: Any) -> Work:
        """Start a collective on tensors that are held until it has let go of them."""
        same_memory = [tensor.detach() for tensor in tensors]
        self.hold(*same_memory)
        work = collective(*same_memory, async_op=True, group=self.process_group, **options)
        assert work is not None  # only a rank outside the group gets None
        return work  # type: ignore[no-any-return]


def make_node_groups(nodes: Sequence[Sequence[int]], rank: int, *, timeout_s: int, is_cuda: bool, hold: Hold) -> NodeGroups:
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
    return NodeGroups(TorchGroup(made[0], hold), TorchGroup(made[1], hold))
