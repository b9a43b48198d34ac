"""Optimizers: what they share, the global norm of the gradients, and Adam; LAMB and Adafactor stand in modules of their names.

A step is: `measure_gradients` (one sweep, reads only), a decision whether the norm is finite, then
`optimizer.step(learning_rate, gradient_factor)`. The factor carries normalisation by the global count of targets and
clipping in one number, so that neither costs a sweep over memory of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import recipe_optimizers
from ..errors import CheckpointError
from . import kernel, pieces

NamedParameters = Iterable[tuple[str, Tensor]]
SumOverRanks = Callable[[Tensor], Tensor]
"""The sum of a tensor over all ranks, the same bits on every rank: `Comm.all_reduce_sum`."""


class Optimizer(Protocol):
    """Moves parameters by their `.grad`. Its hyper-parameters come from the recipe, never from a checkpoint."""

    def step(self, learning_rate: float, gradient_factor: float = 1.0) -> None:
        """One update with the gradients times `gradient_factor`; `.grad` may be overwritten."""

    def state_dict(self) -> dict[str, Tensor]:
        """The live tensors (not copies) by "<quantity>.<parameter name>", and "num_updates" (int64 scalar)."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a saved state in. Raises CheckpointError when its names, shapes or types are not this optimizer's."""


@dataclass(frozen=True)
class GradientScale:
    """What `measure_gradients` found."""

    norm: float
    """Global L2 norm of the gradients times `scale`, before clipping; not finite if any gradient is not."""
    factor: float
    """What to multiply each gradient by: `scale`, or less where the norm exceeds the limit."""

    @property
    def is_finite(self) -> bool:
        """Whether the step may be taken; the same on all ranks, whose gradients are the same bits."""
        return math.isfinite(self.norm)


def unsharded(tensor: Tensor) -> Tensor:
    """Stands for the sum over ranks where every rank holds whole tensors, and nothing is to be summed."""
    raise AssertionError("sharded tensors need the sum over ranks")


def measure_gradients(parameters: Iterable[Tensor], *, scale: float, max_norm: float, sum_over_ranks: SumOverRanks = unsharded) -> GradientScale:
    """The global norm and the factor that brings it to at most `max_norm` (0: no limit); the gradients stay as they are.

    Pascanu et al. 2013, algorithm 1. The squares are summed in fp64 in an order that depends on the sizes of the
    tensors only, so equal gradients give equal bits. Of sharded ones each rank sums its own, and `sum_over_ranks` (called
    for them only) the rest. Waits for the device.
    """
    having = [parameter for parameter in parameters if parameter.grad is not None]
    if pieces.is_sharded(having):
        # First all gradients, for that may be collective; then those that no lower rank counts.
        gradients = [pieces.gradient(parameter) for parameter in having]
        own = _sum_of_squares([g for g, p in zip(gradients, having, strict=True) if g.numel() and pieces.counts_here(p)])
        total = float(sum_over_ranks(torch.tensor([own], dtype=torch.float64)).item())
    else:
        total = _sum_of_squares([parameter.grad for parameter in having if parameter.grad is not None])
    norm = math.sqrt(total) * abs(scale)
    clips = max_norm > 0.0 and norm > max_norm
    return GradientScale(norm, scale * max_norm / norm if clips else scale)


def _sum_of_squares(gradients: list[Tensor]) -> float:
    if not gradients:
        return 0.0
    if kernel.can_take(gradients):
        return kernel.sum_of_squares(gradients)
    norms = torch.stack([norm.double() for norm in torch._foreach_norm(gradients, dtype=torch.float64)])
    return float(norms.square().sum().item())


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay and LAMB's trust ratio apply: not to biases and norm weights, which are vectors."""
    return parameter.ndim > 1 and not name.endswith(".bias")


def build_optimizer(named_parameters: NamedParameters, settings: recipe_optimizers.Optimizer, sum_over_ranks: SumOverRanks = unsharded) -> Optimizer:
    """The recipe's optimizer for all parameters that require gradients; allocates its state.

    Where any of them is sharded, every rank has to take the same steps, with `sum_over_ranks`.
    """
    from .adafactor import Adafactor  # after this module's own names, which they use
    from .adafactor_shards import ShardedAdafactor
    from .lamb import Lamb

    trained = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
    is_sharded = pieces.is_sharded(trained.values())
    optimizers: dict[str, Callable[[Any], Optimizer]] = {
        "lamb": lambda chosen: Lamb(trained, chosen, sum_over_ranks),
        "adamw": lambda chosen: AdamW(trained, chosen),
        "adam": lambda chosen: Adam(trained, chosen),
        "adafactor": lambda chosen: ShardedAdafactor(trained, chosen, sum_over_ranks) if is_sharded else Adafactor(trained, chosen),
    }
    return optimizers[settings.name](settings)


def load_into(own: Mapping[str, Tensor], state: Mapping[str, Tensor], *, optimizer: str) -> None:
    """Copy saved tensors into an optimizer's own, by name; of sharded ones, this rank's pieces. Raises CheckpointError naming what does not fit."""
    faults = misfits(own, state)
    if faults:
        raise CheckpointError(f"the saved optimizer state does not fit {optimizer} on this model: {faults}")
    copy_into(own, state)


def misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Which saved tensors are missing, unknown, or of another shape or type than one's own; empty where they fit."""
    faults = [f"{name} is missing" for name in sorted(own.keys() - state.keys())] + [f"{name} is unknown" for name in sorted(state.keys() - own.keys())]
    for name in (name for name in own if name in state):
        # A whole tensor of another shape comes without data; a piece that is there is held against this rank's.
        tensor, saved = own[name] if state[name].is_meta else pieces.local(own[name]), pieces.local(state[name])
        if saved.shape != tensor.shape or saved.dtype != tensor.dtype or saved.is_meta:
            faults.append(f"{name} is {saved.dtype} {tuple(saved.shape)}, expected {tensor.dtype} {tuple(tensor.shape)}")
    return "; ".join(faults[:3]) + (f", and {len(faults) - 3} more" if len(faults) > 3 else "")


def copy_into(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy tensors that fit, by name; of sharded ones, this rank's pieces."""
    for name, tensor in own.items():
        pieces.local(tensor).copy_(pieces.local(state[name]))


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2), by torch's fused kernel."""

    _KIND: type[torch.optim.Adam] = torch.optim.AdamW

    def __init__(self, parameters: dict[str, Tensor], settings: recipe_optimizers.AdamW | recipe_optimizers.Adam) -> None:
        self._parameters = parameters
        # torch gets this rank's parts: its kernel takes no list of tensors that are divided in different ways.
        self._parts = {name: torch.nn.Parameter(pieces.local(p).detach()) if pieces.is_divided(p) else p for name, p in parameters.items()}
        with_decay = [self._parts[name] for name, parameter in parameters.items() if decays(name, parameter)]
        without = [self._parts[name] for name, parameter in parameters.items() if not decays(name, parameter)]
        groups = [{"params": with_decay, "weight_decay": settings.weight_decay}, {"params": without, "weight_decay": 0.0}]
        self._adam = self._KIND(
            [group for group in groups if group["params"]],
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            fused=True,
        )
        self._num_updates = torch.zeros((), dtype=torch.int64)
        self._moments = {name: (torch.zeros_like(parameter), torch.zeros_like(parameter)) for name, parameter in parameters.items()}
        for name, part in self._parts.items():
            # torch would make this in its first step; a resume needs somewhere to copy to before that.
            self._adam.state[part] = {
                "step": torch.zeros((), dtype=torch.float32, device=part.device),
                "exp_avg": pieces.local(self._moments[name][0]),
                "exp_avg_sq": pieces.local(self._moments[name][1]),
            }

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_factor: float = 1.0) -> None:
        """One update; the gradients are scaled in place."""
        divided = [(part, parameter) for part, parameter in zip(self._parts.values(), self._parameters.values(), strict=True) if part is not parameter]
        for part, parameter in divided:  # every time anew: FSDP may have moved them
            part.data = pieces.local(parameter)
            part.grad = pieces.gradient(parameter) if parameter.grad is not None else None
        gradients = [part.grad for part in self._parts.values() if part.grad is not None]
        if gradients and gradient_factor != 1.0:
            torch._foreach_mul_(gradients, gradient_factor)
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()
        self._num_updates += 1
        for part, _ in divided:
            part.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """First and second moments, and the number of updates."""
        state = {"num_updates": self._num_updates}
        for name, (exp_avg, exp_avg_sq) in self._moments.items():
            state[f"exp_avg.{name}"] = exp_avg
            state[f"exp_avg_sq.{name}"] = exp_avg_sq
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a saved state in. Raises CheckpointError."""
        load_into(self.state_dict(), state, optimizer=type(self).__name__)
        for part in self._parts.values():
            self._adam.state[part]["step"].fill_(float(self._num_updates.item()))


class Adam(AdamW):
    """Kingma and Ba 2015, algorithm 1; weight decay is added to the gradient (L2)."""

    _KIND = torch.optim.Adam
