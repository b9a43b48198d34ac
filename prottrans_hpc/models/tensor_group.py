"""What a model does itself where the ranks of a tensor group share its weights (Shoeybi et al. 2019, Megatron-LM, section 3).

A `Linear` that `architecture.TensorParallel` names does this by itself. A parameter that is named there is a DTensor while
its layer runs, and whoever multiplies by it takes `own_part`, hands `copy_to_group` what it multiplies, and `sum_over_group`
what comes out where heads end. Everywhere else the functions give back what they get.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def own_part(weight: Tensor) -> Tensor:
    """What this rank has of a weight that the ranks of a tensor group share, connected to it; elsewhere the weight."""
    if not _is_shared(weight):
        return weight
    part: Tensor = weight.to_local()  # type: ignore[attr-defined] # of a DTensor
    return part


def copy_to_group(hidden: Tensor, weight: Tensor) -> Tensor:
    """What every rank of `weight`'s group has, to be multiplied by parts of it: its gradient is the sum of the ranks'. Collective, going back."""
    if not _is_shared(weight) or not hidden.requires_grad:
        return hidden
    copied: Tensor = _CopyToGroup.apply(hidden, _group_of(weight))  # type: ignore[no-untyped-call] # torch gives apply no type
    return copied


def sum_over_group(addend: Tensor, weight: Tensor) -> Tensor:
    """The sum of what the ranks of `weight`'s group computed with parts of it. Collective."""
    if not _is_shared(weight):
        return addend
    total: Tensor = _SumOverGroup.apply(addend, _group_of(weight))  # type: ignore[no-untyped-call] # torch gives apply no type
    return total


def own_part_of_each(weight: Tensor, num_blocks: int) -> Tensor:
    """Of a weight that is so many blocks of rows, one below the other, this rank's part of every block, in that order.

    A rank holds one stretch of the rows, as of any weight that a group shares, and gives away what others need of it: each row
    crosses once, and its gradient once back. Collective, both ways; elsewhere the weight.
    """
    if not _is_shared(weight):
        return weight
    part: Tensor = _Deal.apply(own_part(weight), num_blocks, _group_of(weight))  # type: ignore[no-untyped-call] # torch gives apply no type
    return part


def _is_shared(weight: Tensor) -> bool:
    return hasattr(weight, "to_local")


def _group_of(weight: Any) -> dist.ProcessGroup:
    group: dist.ProcessGroup = weight.device_mesh.get_group()
    return group


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed(gradients[0], ctx.group), None


class _SumOverGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, addend: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(addend, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _summed(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _Deal(torch.autograd.Function):
    """With n ranks and b blocks the rows are b * n units; a rank holds b in a row, and needs its own of every block."""

    @staticmethod
    def forward(ctx: Any, held: Tensor, num_blocks: int, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.held, ctx.needed = group, *_units(num_blocks, group)
        return _exchange(held, ctx.held, ctx.needed, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _exchange(gradients[0], ctx.needed, ctx.held, ctx.group), None, None


def _units(num_blocks: int, group: dist.ProcessGroup) -> tuple[list[int], list[int]]:
    """Of each unit that this rank holds, the rank that needs it; and of each that it needs, the rank that holds it."""
    num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    return [(rank * num_blocks + index) % num_ranks for index in range(num_blocks)], [(block * num_ranks + rank) // num_blocks for block in range(num_blocks)]


def _exchange(rows: Tensor, goes_to: list[int], comes_from: list[int], group: dist.ProcessGroup) -> Tensor:
    """Equal units of rows, each to the rank that is named; those that come, in the order of `comes_from`."""
    units, num_ranks = rows.chunk(len(goes_to)), dist.get_world_size(group)
    sent = torch.cat([units[index] for index in _by_rank(goes_to)])
    received, num_rows = torch.empty_like(sent), len(rows) // len(goes_to)
    come, go = ([num_rows * ranks.count(rank) for rank in range(num_ranks)] for ranks in (comes_from, goes_to))
    dist.all_to_all_single(received, sent, come, go, group=group)
    arrived = dict(zip(_by_rank(comes_from), received.chunk(len(comes_from)), strict=True))
    return torch.cat([arrived[index] for index in range(len(comes_from))])


def _by_rank(ranks: list[int]) -> list[int]:
    """The units in the order of their ranks; those of one rank stay in theirs."""
    return sorted(range(len(ranks)), key=lambda index: ranks[index])
