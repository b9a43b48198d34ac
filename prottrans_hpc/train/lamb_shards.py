"""LAMB where ranks hold pieces of tensors: the same algorithm as `lamb`, with norms of whole tensors.

Moments and directions need nothing from other ranks. The squares of all norms travel together in one all-reduce between
the two halves of an update; till then a direction stays where the gradient was, so sharding costs no memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import pieces
from .lamb import Slot, Update, groups
from .optim import SumOverRanks


@dataclass(frozen=True)
class Shard:
    """This rank's part of a slot."""

    parameter: Tensor
    direction: Tensor
    """The gradient, which the direction replaces."""
    exp_avg: Tensor
    exp_avg_sq: Tensor
    adapts: bool
    counts: bool
    """Whether its numbers enter the norms from here, not from another rank that holds the same."""


def update_shards(slots: list[Slot], update: Update, sum_over_ranks: SumOverRanks) -> None:
    """One update; the gradients are overwritten. Collective."""
    shards = [_own(slot) for slot in slots]
    squares = torch.zeros(len(shards), 2, dtype=torch.float64, device=shards[0].parameter.device)
    for group in groups(shards):
        _turn_into_directions(group, update)
    for column, tensors in enumerate(([s.parameter for s in shards], [s.direction for s in shards])):
        counted = [index for index, s in enumerate(shards) if s.adapts and s.counts and s.parameter.numel()]
        if counted:
            squares[counted, column] = torch.stack(torch._foreach_norm([tensors[index] for index in counted], dtype=torch.float64)).square()
    weights, directions = sum_over_ranks(squares).unbind(dim=1)
    ratios = torch.where((weights != 0.0) & (directions != 0.0), (weights / directions).sqrt(), 1.0).float()
    torch._foreach_mul_([s.direction for s in shards], list(ratios.unbind()))
    torch._foreach_add_([s.parameter for s in shards], [s.direction for s in shards], alpha=-update.learning_rate)


def _own(slot: Slot) -> Shard:
    return Shard(
        pieces.local(slot.parameter),
        pieces.gradient(slot.parameter),
        pieces.local(slot.exp_avg),
        pieces.local(slot.exp_avg_sq),
        slot.adapts,
        pieces.counts_here(slot.parameter),
    )


def _turn_into_directions(shards: list[Shard], update: Update) -> None:
    """Equations 1 to 4 of `lamb`, and the decay of equation 5; its denominators are 4 bytes a parameter."""
    directions, exp_avgs, exp_avg_sqs = [s.direction for s in shards], [s.exp_avg for s in shards], [s.exp_avg_sq for s in shards]
    torch._foreach_mul_(directions, update.gradient_factor)
    torch._foreach_mul_(exp_avgs, update.beta1)
    torch._foreach_add_(exp_avgs, directions, alpha=1.0 - update.beta1)
    torch._foreach_mul_(exp_avg_sqs, update.beta2)
    torch._foreach_addcmul_(exp_avg_sqs, directions, directions, value=1.0 - update.beta2)
    denominators = torch._foreach_mul(exp_avg_sqs, update.inverse_correction2)
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, update.epsilon)
    torch._foreach_copy_(directions, exp_avgs)
    torch._foreach_mul_(directions, update.inverse_correction1)
    torch._foreach_div_(directions, denominators)
    adapted = [s for s in shards if s.adapts]
    if adapted:
        torch._foreach_add_([s.direction for s in adapted], [s.parameter for s in adapted], alpha=update.weight_decay)
