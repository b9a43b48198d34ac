"""Adafactor: Shazeer and Stern 2018, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", as T5 used it.

For each matrix X with gradient G, at update t: algorithm 4 with the decay of section 7.2 and without a first moment:

    (1)  b_t = 1 - t^-0.8
    (2)  R_t = b_t R_(t-1) + (1 - b_t) (mean over each row of G^2 + epsilon);  C_t likewise over each column
    (3)  U_t = G / sqrt(R_t C_t / mean(R_t))
    (4)  U^_t = U_t / max(1, rms(U_t) / d)
    (5)  X_t = X_(t-1) - rate max(smallest scale, rms(X_(t-1))) U^_t

A vector has the whole second moment instead of R and C; a tensor of more dimensions is a stack of matrices with one
rms. The rate is the schedule's: T5's is 1 / sqrt(max(t, 10,000)). The same as transformers' Adafactor with
relative_step = False, to rounding; torch's own bounds the rate by 1 / sqrt(t) and adds epsilon elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from .. import recipe_optimizers
from .optim import decays, load_into

_PIECE = 1 << 17
"""Elements of a block of rows that are taken at once on a CPU, where a core's own cache then holds them."""


class Moments(Protocol):
    """The second moments of one tensor, and the update that they give."""

    def tensors(self) -> dict[str, Tensor]:
        """What has to be saved, by quantity."""

    def renew(self, gradient: Tensor, factor: float, keep: Tensor, epsilon: float) -> Tensor:
        """Equations 2 and 3 for the gradient times `factor`; returns the sum of squares of U, a scalar."""

    def apply(self, parameter: Tensor, gradient: Tensor, rate: Tensor) -> None:
        """Add `rate` times U to the parameter."""


class Whole:
    """A moment an element."""

    def __init__(self, parameter: Tensor) -> None:
        self._squares = torch.zeros_like(parameter)
        self._update = torch.empty(0)

    def tensors(self) -> dict[str, Tensor]:
        """One of the parameter's shape."""
        return {"exp_avg_sq": self._squares}

    def renew(self, gradient: Tensor, factor: float, keep: Tensor, epsilon: float) -> Tensor:
        """Vectors are small: U itself is kept until it is applied."""
        scaled = gradient * factor
        self._squares.lerp_(scaled.square().add_(epsilon), 1.0 - keep)
        self._update = scaled.mul_(self._squares.rsqrt())
        return self._update.square().sum()

    def apply(self, parameter: Tensor, gradient: Tensor, rate: Tensor) -> None:
        """Frees U."""
        parameter.addcmul_(self._update, rate)
        self._update = torch.empty(0)


class Factored:
    """A moment a row and a moment a column of each matrix; U is computed twice, which costs less than to keep it."""

    def __init__(self, parameter: Tensor) -> None:
        shape = parameter.shape
        self._rows, self._columns = parameter.new_zeros(shape[:-1]), parameter.new_zeros(shape[:-2] + shape[-1:])
        self._factors: list[tuple[Tensor, Tensor]] = []

    def tensors(self) -> dict[str, Tensor]:
        """Without the last dimension, and without the one before it."""
        return {"exp_avg_sq_row": self._rows, "exp_avg_sq_col": self._columns}

    def renew(self, gradient: Tensor, factor: float, keep: Tensor, epsilon: float) -> Tensor:
        """Two sweeps over the gradient."""
        num_rows, num_columns = gradient.shape[-2:]
        self._factors, total = [], gradient.new_zeros(())
        for matrix, rows, columns in zip(_stack(gradient, 2), _stack(self._rows, 1), _stack(self._columns, 1), strict=True):
            row_squares, column_squares = _squares(matrix)
            rows.lerp_(row_squares.mul_(factor * factor / num_columns).add_(epsilon), 1.0 - keep)
            columns.lerp_(column_squares.mul_(factor * factor / num_rows).add_(epsilon), 1.0 - keep)
            row_factors, column_factors = (rows / rows.mean()).rsqrt_().mul_(factor), columns.rsqrt()
            self._factors.append((row_factors, column_factors))
            for start, block in _blocks(matrix):
                total += torch.linalg.vector_norm(block * column_factors, dim=1).mul_(row_factors[start : start + len(block)]).square_().sum()
        return total

    def apply(self, parameter: Tensor, gradient: Tensor, rate: Tensor) -> None:
        """One sweep over both."""
        for target, matrix, (row_factors, column_factors) in zip(_stack(parameter, 2), _stack(gradient, 2), self._factors, strict=True):
            row_rates = (row_factors * rate)[:, None]
            for start, block in _blocks(matrix):
                piece = slice(start, start + len(block))
                target[piece].addcmul_(block * column_factors, row_rates[piece])
        self._factors = []


class Adafactor:
    """Adafactor on whatever the parameters are on; nothing waits for the device."""

    def __init__(self, parameters: dict[str, Tensor], settings: recipe_optimizers.Adafactor) -> None:
        self._settings, self._parameters = settings, parameters
        self._num_updates = torch.zeros((), dtype=torch.int64)
        self._moments: dict[str, Moments] = {name: Factored(p) if p.ndim > 1 else Whole(p) for name, p in parameters.items()}

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_factor: float = 1.0) -> None:
        """One update; the gradients are only read."""
        self._num_updates += 1
        chosen, count = self._settings, int(self._num_updates.item())
        for name, parameter in self._parameters.items():
            gradient, moments = parameter.grad, self._moments[name]
            if gradient is None or not parameter.numel():
                continue
            keep = parameter.new_tensor(1.0 - count**-chosen.decay_exponent)
            rate = parameter.new_tensor(learning_rate)
            if chosen.scale_by_parameter:
                rate *= _rms(parameter).clamp(min=chosen.smallest_scale)
            squares = moments.renew(gradient, gradient_factor, keep, chosen.epsilon)
            if chosen.weight_decay and decays(name, parameter):
                parameter.mul_(1.0 - chosen.weight_decay * rate)
            moments.apply(parameter, gradient, -rate / ((squares / parameter.numel()).sqrt() / chosen.clip_update).clamp(min=1.0))

    def state_dict(self) -> dict[str, Tensor]:
        """The second moments, and the number of updates."""
        moments = {f"{quantity}.{name}": tensor for name, moments in self._moments.items() for quantity, tensor in moments.tensors().items()}
        return {"num_updates": self._num_updates, **moments}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a saved state in. Raises CheckpointError."""
        load_into(self.state_dict(), state, optimizer="Adafactor")


def _rms(tensor: Tensor) -> Tensor:
    result: Tensor = torch.linalg.vector_norm(tensor) / tensor.numel() ** 0.5
    return result


def _stack(tensor: Tensor, num_dimensions: int) -> Iterator[Tensor]:
    """Views of the matrices (2) or vectors (1) that a tensor is a stack of."""
    if tensor.ndim == num_dimensions:
        yield tensor
    else:
        for part in tensor.unbind(0):
            yield from _stack(part, num_dimensions)


def _blocks(matrix: Tensor) -> Iterator[tuple[int, Tensor]]:
    """A matrix's rows, some at a time on a CPU, all at once elsewhere, with the number of the first."""
    num_rows = max(1, _PIECE // matrix.shape[1]) if matrix.device.type == "cpu" else len(matrix)
    for start in range(0, len(matrix), num_rows):
        yield start, matrix[start : start + num_rows]


def _squares(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of squares of each row and of each column."""
    rows, columns = [], matrix.new_zeros(matrix.shape[1])
    for _, block in _blocks(matrix):
        squares = block.square()
        rows.append(squares.sum(dim=1))
        columns += squares.sum(dim=0)
    return torch.cat(rows), columns
