"""The groups of ranks that reductions take, over Horovod: its global process set, or those of a node and between nodes.

Horovod adds up no bf16 ("Tensor type torch.BFloat16Tensor is not supported"), and need not: what is narrow is only moved, as
16-bit integers of the same bits, and added up here. An operation is named by what it is and by the lowest number that no
operation under way has: all ranks start and await the same ones in the same order, so the names agree, and repeat in every step,
which is what Horovod's cache of agreements lives on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .comm_reduction import NodeGroups, Work

if TYPE_CHECKING:
    from .comm_horovod import HorovodComm


@dataclass
class _Operation:
    """One under way, whose result is put where it belongs when it is awaited."""

    await_it: Callable[[], Any]
    into: Tensor | None = None
    """None: it works in place."""

    def wait(self) -> None:
        """Return when it is there."""
        result = self.await_it()
        if self.into is not None:
            self.into.copy_(result.view(self.into.dtype))


@dataclass
class HorovodGroup:
    """A process set."""

    comm: HorovodComm
    hvd: Any
    process_set: Any
    label: str
    _busy: set[str] = field(default_factory=set)

    @property
    def size(self) -> int:
        """How many ranks are in it."""
        return int(self.process_set.size())

    def all_reduce(self, tensor: Tensor) -> Work:
        """The sum, in place, in MPI's order."""
        return self._start("sum", tensor, lambda name: self.hvd.allreduce_async_(tensor, op=self.hvd.Sum, name=name, process_set=self.process_set))

    def all_reduce_max(self, tensor: Tensor) -> Work:
        """The largest of each place, in place."""
        return self._start("max", tensor, lambda name: self.hvd.allreduce_async_(tensor, op=self.hvd.Max, name=name, process_set=self.process_set))

    def all_to_all(self, received: Tensor, sent: Tensor) -> Work:
        """An exchange of equal parts."""
        return self._start("exchange", sent, lambda name: self.hvd.alltoall_async(_movable(sent), name=name, process_set=self.process_set), received)

    def all_gather(self, gathered: Tensor, part: Tensor) -> Work:
        """The parts one after the other."""
        return self._start("gather", part, lambda name: self.hvd.allgather_async(_movable(part), name=name, process_set=self.process_set), gathered)

    def reduce_scatter(self, part: Tensor, whole: Tensor) -> None:
        """Left to the caller, whose sum has an order of its own: Horovod's hangs on one of its controllers."""

    def _start(self, kind: str, tensor: Tensor, begin: Callable[[str], int], into: Tensor | None = None) -> Work:
        family = f"{self.label}.{kind}.{tensor.dtype}.{tensor.numel()}"
        name = next(name for name in (f"{family}.{number}" for number in count()) if name not in self._busy)
        self._busy.add(name)
        handle = begin(name)

        def await_it() -> Any:
            result = self.comm.wait(handle, "the reduction of the gradients")
            self._busy.discard(name)
            return result

        return _Operation(await_it, into)


def _movable(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def make_node_groups(comm: HorovodComm, hvd: Any, nodes: Sequence[Sequence[int]]) -> NodeGroups:
    """The two groups that this rank is in, of process sets that all ranks make together. Collective; takes Horovod with dynamic process sets."""
    between = [list(members) for members in zip(*nodes, strict=True)]
    made = [[hvd.add_process_set(hvd.ProcessSet(list(members))) for members in groups] for groups in (nodes, between)]
    node, across = (next(one for one in sets if one.included()) for sets in made)
    return NodeGroups(HorovodGroup(comm, hvd, node, "node"), HorovodGroup(comm, hvd, across, "between"))
