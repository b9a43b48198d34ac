"""Adafactor where ranks hold pieces of tensors: the same algorithm as `adafactor`, in two all-reduces a step.

The first brings every rank the sums of squares of all whole rows and columns, which are few beside the elements, so
that each keeps these moments whole and the same bits. The second brings the squares of updates and parameters, of which
there are two numbers a tensor. The moments of vectors are cut as the vectors are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import recipe_optimizers
from . import pieces
from .optim import SumOverRanks, decays, load_into


@dataclass(frozen=True)
class Update:
    """The numbers of one update."""

    learning_rate: float
    gradient_factor: float
    keep: float
    """b_t, equation 1 of `adafactor`."""
    settings: recipe_optimizers.Adafactor


class VectorShard:
    """A moment an element."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self._squares = torch.zeros_like(parameter)

    def tensors(self) -> dict[str, Tensor]:
        """One of the parameter's shape, cut as it is."""
        return {"exp_avg_sq": self._squares}

    def sums(self) -> list[Tensor]:
        """Nothing that other ranks have to add to."""
        return []

    def renew(self, sums: list[Tensor], update: Update) -> None:
        """Equation 2."""
        squares = (pieces.gradient(self.parameter) * update.gradient_factor).square_().add_(update.settings.epsilon)
        pieces.local(self._squares).lerp_(squares, 1.0 - update.keep)

    def direction(self, update: Update) -> Tensor:
        """This rank's part of U, equation 3."""
        return pieces.local(self._squares).rsqrt().mul_(update.gradient_factor).mul_(pieces.gradient(self.parameter))


class MatrixShard:
    """A moment a row and a moment a column of each matrix, all of them on every rank."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        shape, part = tuple(parameter.shape), pieces.local(parameter)
        self._rows, self._columns = part.new_zeros(shape[:-1]), part.new_zeros(shape[:-2] + shape[-1:])
        self._own = tuple(slice(begin, end) for begin, end in pieces.division_of(parameter).box_of(pieces.own_rank()))

    def tensors(self) -> dict[str, Tensor]:
        """Without the last dimension, and without the one before it."""
        return {"exp_avg_sq_row": self._rows, "exp_avg_sq_col": self._columns}

    def sums(self) -> list[Tensor]:
        """What this rank adds to the sums of squares of whole rows and columns."""
        rows, columns = torch.zeros_like(self._rows), torch.zeros_like(self._columns)
        if pieces.counts_here(self.parameter):
            squares = pieces.gradient(self.parameter).square()
            rows[self._own[:-1]] = squares.sum(dim=-1)
            columns[self._own[:-2] + self._own[-1:]] = squares.sum(dim=-2)
        return [rows, columns]

    def renew(self, sums: list[Tensor], update: Update) -> None:
        """Equation 2."""
        for moments, squares, length in zip((self._rows, self._columns), sums, (self.parameter.shape[-1], self.parameter.shape[-2]), strict=True):
            mean_squares = squares.view_as(moments) * (update.gradient_factor**2 / length)
            moments.lerp_(mean_squares.add_(update.settings.epsilon), 1.0 - update.keep)

    def direction(self, update: Update) -> Tensor:
        """This rank's part of U, equation 3."""
        row_factors = (self._rows / self._rows.mean(dim=-1, keepdim=True)).rsqrt_().mul_(update.gradient_factor)
        columns = self._columns[self._own[:-2] + self._own[-1:]].rsqrt()
        return pieces.gradient(self.parameter) * row_factors[self._own[:-1]].unsqueeze(-1) * columns.unsqueeze(-2)


Part = VectorShard | MatrixShard


class ShardedAdafactor:
    """Adafactor on parameters of which some or all are DTensors. Every rank takes the same steps."""

    def __init__(self, parameters: dict[str, Tensor], settings: recipe_optimizers.Adafactor, sum_over_ranks: SumOverRanks) -> None:
        self._settings, self._sum_over_ranks = settings, sum_over_ranks
        self._num_updates = torch.zeros((), dtype=torch.int64)
        self._parts: dict[str, Part] = {name: MatrixShard(p) if p.ndim > 1 else VectorShard(p) for name, p in parameters.items()}

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_factor: float = 1.0) -> None:
        """One update; the gradients are only read. Collective."""
        self._num_updates += 1
        keep = 1.0 - int(self._num_updates.item()) ** -self._settings.decay_exponent
        step_shards(self._parts, Update(learning_rate, gradient_factor, keep, self._settings), self._sum_over_ranks)

    def state_dict(self) -> dict[str, Tensor]:
        """The second moments, and the number of updates."""
        moments = {f"{quantity}.{name}": tensor for name, part in self._parts.items() for quantity, tensor in part.tensors().items()}
        return {"num_updates": self._num_updates, **moments}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a saved state in. Raises CheckpointError."""
        load_into(self.state_dict(), state, optimizer="Adafactor")


def step_shards(parts: Mapping[str, Part], update: Update, sum_over_ranks: SumOverRanks) -> None:
    """One update of all parameters that have gradients. Collective."""
    named = [(name, part) for name, part in parts.items() if part.parameter.grad is not None and part.parameter.numel()]
    if not named:
        return
    device = pieces.local(named[0][1].parameter).device
    own = [part.sums() for _, part in named]
    sums = iter(_sum_stacked([tensor for tensors in own for tensor in tensors], sum_over_ranks))
    for (_, part), tensors in zip(named, own, strict=True):
        part.renew([next(sums) for _ in tensors], update)
    squares = torch.zeros(len(named), 2, dtype=torch.float64, device=device)
    for index, (_, part) in enumerate(named):
        if pieces.counts_here(part.parameter):
            squares[index, 0], squares[index, 1] = _square_sum(part.direction(update)), _square_sum(pieces.local(part.parameter))
    for (name, part), (of_update, of_parameter) in zip(named, sum_over_ranks(squares).unbind(), strict=True):
        _apply(name, part, update, (of_update, of_parameter))


def _apply(name: str, part: Part, update: Update, squares: tuple[Tensor, Tensor]) -> None:
    """Equations 4 and 5."""
    chosen, parameter = update.settings, pieces.local(part.parameter)
    rms_update, rms_parameter = ((total / part.parameter.numel()).sqrt().to(parameter.dtype) for total in squares)
    rate = rms_parameter.clamp(min=chosen.smallest_scale) * update.learning_rate if chosen.scale_by_parameter else parameter.new_tensor(update.learning_rate)
    if chosen.weight_decay and decays(name, part.parameter):
        parameter.mul_(1.0 - chosen.weight_decay * rate)
    parameter.addcmul_(part.direction(update), -rate / (rms_update / chosen.clip_update).clamp(min=1.0))


def _sum_stacked(tensors: list[Tensor], sum_over_ranks: SumOverRanks) -> list[Tensor]:
    if not tensors:
        return []
    flat = sum_over_ranks(torch.cat([tensor.flatten() for tensor in tensors]))
    return list(torch.split(flat, [tensor.numel() for tensor in tensors]))


def _square_sum(tensor: Tensor) -> Tensor:
    result: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float64).square()
    return result
