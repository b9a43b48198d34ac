"""LAMB where ranks hold pieces of tensors: the same algorithm as `lamb`, with norms of whole tensors.

Moments and directions need nothing from other ranks. The squares of all norms travel together in one all-reduce between
the two halves of an update. On a CPU these are the two sweeps of the C kernel, the second of which computes the
directions again; elsewhere multi-tensor operations, and till then a direction stays where the gradient was. So sharding costs no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import kernel, pieces
from .lamb import Columns, Slot, Update, groups, kernel_arguments
from .optim import SumOverRanks


@dataclass(frozen=True)
class Shard:
    """This rank's part of a slot."""

    parameter: Tensor
    gradient: Tensor
    """Which the direction may replace."""
    exp_avg: Tensor
    exp_avg_sq: Tensor
    adapts: bool
    counts: bool
    """Whether its numbers enter the norms from here, not from another rank that holds the same."""


@dataclass(frozen=True)
class Halves:
    """One way to compute an update."""

    renew_moments: Callable[[list[Shard], Update], Tensor]
    """Equations 1 to 4; fp64 [shards, 2]: squares of this rank's part of the parameters and of their directions, where the trust ratio applies."""
    renew_parameters: Callable[[list[Shard], Update, Tensor], None]
    """Equation 5, with the trust ratios, fp64 [shards]."""


def update_shards(slots: list[Slot], update: Update, sum_over_ranks: SumOverRanks) -> None:
    """One update; the gradients may be overwritten. Collective."""
    shards = [_own(slot) for slot in slots]
    halves = HALVES["kernel" if kernel.can_update([tensor for column in _columns(shards) for tensor in column]) else "foreach"]
    squares = halves.renew_moments(shards, update)
    squares[[index for index, s in enumerate(shards) if not (s.adapts and s.counts)]] = 0.0
    halves.renew_parameters(shards, update, trust_ratios(sum_over_ranks(squares)))


def trust_ratios(squares: Tensor) -> Tensor:
    """|x| / |r + lambda x| of equation 5, fp64 [tensors], from the squares of both, fp64 [tensors, 2]; 1 where either is 0."""
    weights, directions = squares.unbind(dim=1)
    return torch.where((weights != 0.0) & (directions != 0.0), (weights / directions).sqrt(), 1.0)


def _own(slot: Slot) -> Shard:
    return Shard(
        pieces.local(slot.parameter),
        pieces.gradient(slot.parameter),
        pieces.local(slot.exp_avg),
        pieces.local(slot.exp_avg_sq),
        slot.adapts,
        pieces.counts_here(slot.parameter),
    )


def _columns(shards: list[Shard]) -> Columns:
    return [s.parameter for s in shards], [s.gradient for s in shards], [s.exp_avg for s in shards], [s.exp_avg_sq for s in shards]


def _first_sweep(shards: list[Shard], update: Update) -> Tensor:
    module = kernel.extension()
    assert module is not None  # can_take said so
    squares = bytearray(module.moments(*kernel_arguments(_columns(shards), [s.adapts for s in shards], update)))
    return torch.frombuffer(squares, dtype=torch.float64).view(len(shards), 2)


def _second_sweep(shards: list[Shard], update: Update, ratios: Tensor) -> None:
    module = kernel.extension()
    assert module is not None
    module.parameters(*kernel_arguments(_columns(shards), [s.adapts for s in shards], update), ratios.numpy())


def _turn_into_directions(shards: list[Shard], update: Update) -> Tensor:
    squares = torch.zeros(len(shards), 2, dtype=torch.float64, device=shards[0].parameter.device)
    for group in groups(shards):
        _turn_group(group, update)
    filled = [index for index, s in enumerate(shards) if s.adapts and s.parameter.numel()]
    for column, tensors in enumerate(_columns(shards)[:2]):
        if filled:
            squares[filled, column] = torch.stack(torch._foreach_norm([tensors[index] for index in filled], dtype=torch.float64)).square()
    return squares


def _turn_group(shards: list[Shard], update: Update) -> None:
    """Equations 1 to 4 of `lamb`, and the decay of equation 5; its denominators are 4 bytes a parameter."""
    _, directions, exp_avgs, exp_avg_sqs = _columns(shards)
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
        torch._foreach_add_([s.gradient for s in adapted], [s.parameter for s in adapted], alpha=update.weight_decay)


def _go(shards: list[Shard], update: Update, ratios: Tensor) -> None:
    directions = [s.gradient for s in shards]
    torch._foreach_mul_(directions, list(ratios.float().unbind()))
    torch._foreach_add_([s.parameter for s in shards], directions, alpha=-update.learning_rate)


HALVES = {"kernel": Halves(_first_sweep, _second_sweep), "foreach": Halves(_turn_into_directions, _go)}
