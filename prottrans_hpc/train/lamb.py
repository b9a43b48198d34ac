"""LAMB: You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", algorithm 2.

For each tensor x ("layer" in the paper) with gradient g, at update t, in the order of that algorithm:

    (1)  m_t = beta1 m_(t-1) + (1 - beta1) g_t
    (2)  v_t = beta2 v_(t-1) + (1 - beta2) g_t^2
    (3)  m^_t = m_t / (1 - beta1^t),  v^_t = v_t / (1 - beta2^t)
    (4)  r_t = m^_t / (sqrt(v^_t) + epsilon)
    (5)  x_(t+1) = x_t - eta_t phi(|x_t|) / |r_t + lambda x_t| (r_t + lambda x_t),  with the identity for phi

The trust ratio |x| / |r + lambda x| is 1 where either norm is 0. Biases and norm weights take neither the trust
ratio nor the decay lambda. There are three ways to compute it, with the same result
to rounding (1e-6 relative a step): a C kernel and a plain loop for CPUs, where sweeping memory once for each of a
dozen operations is what costs, and multi-tensor operations for GPUs, where starting kernels is. `lamb_shards` has it for
tensors that ranks hold together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from .. import recipe_optimizers
from . import kernel, pieces
from .optim import SumOverRanks, decays, load_into, unsharded

GROUP_PARAMETERS = 1 << 26
"""Most parameters that a GPU updates at once; a larger tensor goes alone. The planner counts on it."""
_PIECE = 1 << 16
"""Elements that the loop takes at once: six arrays of this size fit into a core's own cache."""


@dataclass(frozen=True)
class Slot:
    """A parameter and its state."""

    parameter: Tensor
    exp_avg: Tensor
    """m_t, equation 1."""
    exp_avg_sq: Tensor
    """v_t, equation 2."""
    adapts: bool
    """Whether the trust ratio and the decay apply."""


@dataclass(frozen=True)
class Update:
    """The numbers of one update."""

    learning_rate: float
    gradient_factor: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    inverse_correction1: float
    """1 / (1 - beta1^t), equation 3."""
    inverse_correction2: float
    """1 / (1 - beta2^t), equation 3."""


Columns = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
"""Parameters, gradients, first and second moments."""


class Lamb:
    """LAMB on whatever the parameters are on."""

    def __init__(self, parameters: dict[str, Tensor], settings: recipe_optimizers.Lamb, sum_over_ranks: SumOverRanks = unsharded) -> None:
        self._settings, self._sum_over_ranks = settings, sum_over_ranks
        self._num_updates = torch.zeros((), dtype=torch.int64)
        self._slots = {name: Slot(p, torch.zeros_like(p), torch.zeros_like(p), decays(name, p)) for name, p in parameters.items()}

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_factor: float = 1.0) -> None:
        """One update; gradients of whole tensors are only read."""
        self._num_updates += 1
        count, chosen = int(self._num_updates.item()), self._settings
        update = Update(
            learning_rate=learning_rate,
            gradient_factor=gradient_factor,
            beta1=chosen.beta1,
            beta2=chosen.beta2,
            epsilon=chosen.epsilon,
            weight_decay=chosen.weight_decay,
            inverse_correction1=1.0 / (1.0 - chosen.beta1**count),
            inverse_correction2=1.0 / (1.0 - chosen.beta2**count),
        )
        slots = [slot for slot in self._slots.values() if slot.parameter.grad is not None]
        if pieces.is_sharded(slot.parameter for slot in slots):
            from .lamb_shards import update_shards  # which is made of this module's parts

            update_shards(slots, update, self._sum_over_ranks)
        elif slots:
            choose(slots)(slots, update)

    def state_dict(self) -> dict[str, Tensor]:
        """First and second moments, and the number of updates."""
        state = {"num_updates": self._num_updates}
        for name, slot in self._slots.items():
            state[f"exp_avg.{name}"] = slot.exp_avg
            state[f"exp_avg_sq.{name}"] = slot.exp_avg_sq
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a saved state in. Raises CheckpointError."""
        load_into(self.state_dict(), state, optimizer="LAMB")


def gradient(slot: Slot) -> Tensor:
    """The gradient of a slot that has one."""
    assert slot.parameter.grad is not None
    return slot.parameter.grad


def update_by_kernel(slots: list[Slot], update: Update) -> None:
    """Two sweeps in C: moments and norms, then the parameters; the sums do not depend on the number of threads."""
    module = kernel.extension()
    assert module is not None
    columns = ([s.parameter for s in slots], [gradient(s) for s in slots], [s.exp_avg for s in slots], [s.exp_avg_sq for s in slots])
    module.step(*kernel_arguments(columns, [slot.adapts for slot in slots], update))


def kernel_arguments(columns: Columns, adapts: Sequence[bool], update: Update) -> tuple[object, ...]:
    """What the C kernel takes."""
    return (
        kernel.addresses(*columns),
        kernel.sizes(*columns),
        bytes(adapts),
        update.learning_rate,
        update.gradient_factor,
        update.beta1,
        update.beta2,
        update.epsilon,
        update.weight_decay,
        update.inverse_correction1,
        update.inverse_correction2,
        torch.get_num_threads(),
    )


def update_by_loop(slots: list[Slot], update: Update) -> None:
    """One piece of a tensor after another, so that what one operation leaves in the cache serves the next."""
    longest = max(slot.parameter.numel() for slot in slots)
    first = slots[0].parameter
    directions, scratch = torch.empty(longest, dtype=first.dtype, device=first.device), torch.empty(_PIECE, dtype=first.dtype, device=first.device)
    for slot in slots:
        _update_one(slot, update, directions[: slot.parameter.numel()], scratch)


def _update_one(slot: Slot, update: Update, directions: Tensor, scratch: Tensor) -> None:
    """Equations 1 to 4 piece by piece, then equation 5."""
    # Copies only where a tensor is not contiguous; then the results are copied back below.
    x, g, m, v = (t.reshape(-1) for t in (slot.parameter, gradient(slot), slot.exp_avg, slot.exp_avg_sq))
    squares = [0.0, 0.0]
    for start in range(0, len(x), _PIECE):
        piece = slice(start, start + _PIECE)
        direction, scaled = directions[piece], scratch[: len(x[piece])]
        torch.mul(g[piece], update.gradient_factor, out=scaled)
        m[piece].mul_(update.beta1).add_(scaled, alpha=1.0 - update.beta1)
        v[piece].mul_(update.beta2).addcmul_(scaled, scaled, value=1.0 - update.beta2)
        torch.mul(v[piece], update.inverse_correction2, out=scaled).sqrt_().add_(update.epsilon)
        torch.mul(m[piece], update.inverse_correction1, out=direction).div_(scaled)
        if slot.adapts:
            direction.add_(x[piece], alpha=update.weight_decay)
            squares = [total + float(torch.dot(part, part)) for total, part in zip(squares, (x[piece], direction), strict=True)]
    ratio = math.sqrt(squares[0] / squares[1]) if slot.adapts and all(squares) else 1.0
    x.add_(directions, alpha=-update.learning_rate * ratio)
    for tensor, flat in ((slot.parameter, x), (slot.exp_avg, m), (slot.exp_avg_sq, v)):
        if flat.data_ptr() != tensor.data_ptr():
            tensor.copy_(flat.view(tensor.shape))


def update_by_foreach(slots: list[Slot], update: Update) -> None:
    """One multi-tensor kernel an operation and group, with 12 bytes a parameter; nothing waits for the device."""
    for group in groups(slots):
        _update_group(group, update)


class Counted(Protocol):
    """What is updated: a slot, or a rank's part of one."""

    @property
    def parameter(self) -> Tensor:
        """Its numbers."""


Held = TypeVar("Held", bound=Counted)


def groups(held: list[Held]) -> Iterator[list[Held]]:
    """Those whose updates are in memory together: what an update needs for a moment is a few bytes a parameter of one group."""
    group: list[Held] = []
    total = 0
    for one in held:
        total += one.parameter.numel()
        if group and total > GROUP_PARAMETERS:
            yield group
            group, total = [], one.parameter.numel()
        group.append(one)
    yield group


def _update_group(slots: list[Slot], update: Update) -> None:
    parameters, gradients = [s.parameter for s in slots], [gradient(s) for s in slots]
    exp_avgs, exp_avg_sqs = [s.exp_avg for s in slots], [s.exp_avg_sq for s in slots]
    scaled = torch._foreach_mul(gradients, update.gradient_factor)
    torch._foreach_mul_(exp_avgs, update.beta1)
    torch._foreach_add_(exp_avgs, scaled, alpha=1.0 - update.beta1)
    torch._foreach_mul_(exp_avg_sqs, update.beta2)
    torch._foreach_addcmul_(exp_avg_sqs, scaled, scaled, value=1.0 - update.beta2)
    denominators = torch._foreach_mul(exp_avg_sqs, update.inverse_correction2)
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, update.epsilon)
    directions = torch._foreach_mul(exp_avgs, update.inverse_correction1)
    torch._foreach_div_(directions, denominators)
    adapted = [index for index, slot in enumerate(slots) if slot.adapts]
    if adapted:
        _adapt([parameters[i] for i in adapted], [directions[i] for i in adapted], update.weight_decay)
    torch._foreach_add_(parameters, directions, alpha=-update.learning_rate)


def _adapt(parameters: list[Tensor], directions: list[Tensor], weight_decay: float) -> None:
    """Add the decay to the directions and multiply each by its trust ratio, in place (equation 5)."""
    torch._foreach_add_(directions, parameters, alpha=weight_decay)
    weight_norms, norms = torch.stack(torch._foreach_norm(parameters)), torch.stack(torch._foreach_norm(directions))
    ratios = torch.where((weight_norms != 0.0) & (norms != 0.0), weight_norms / norms, 1.0)
    torch._foreach_mul_(directions, list(ratios.unbind()))


UPDATES = {"kernel": update_by_kernel, "loop": update_by_loop, "foreach": update_by_foreach}


def choose(slots: list[Slot]) -> Callable[[list[Slot], Update], None]:
    """The fastest way for where the tensors are."""
    if slots[0].parameter.device.type != "cpu":
        return UPDATES["foreach"]
    tensors = [tensor for s in slots for tensor in (s.parameter, gradient(s), s.exp_avg, s.exp_avg_sq)]
    return UPDATES["kernel" if kernel.can_update(tensors) else "loop"]
