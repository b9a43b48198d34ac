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
from . import kernel

NamedParameters = Iterable[tuple[str, Tensor]]


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


def measure_gradients(parameters: Iterable[Tensor], *, scale: float, max_norm: float) -> GradientScale:
    """The global norm and the factor that brings it to at most `max_norm` (0: no limit); the gradients stay as they are.

    Pascanu et al. 2013, algorithm 1. The squares are summed in fp64 in an order that depends on the sizes of the
    tensors only, so equal gradients give equal bits. Waits for the device.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = math.sqrt(_sum_of_squares(gradients)) * abs(scale)
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


def build_optimizer(named_parameters: NamedParameters, settings: recipe_optimizers.Optimizer) -> Optimizer:
    """The recipe's optimizer for all parameters that require gradients; allocates its state."""
    from .adafactor import Adafactor  # after this module's own names, which they use
    from .lamb import Lamb

    optimizers: dict[str, Callable[[dict[str, Tensor], Any], Optimizer]] = {"lamb": Lamb, "adamw": AdamW, "adam": Adam, "adafactor": Adafactor}
    return optimizers[settings.name]({name: parameter for name, parameter in named_parameters if parameter.requires_grad}, settings)


def load_into(own: Mapping[str, Tensor], state: Mapping[str, Tensor], *, optimizer: str) -> None:
    """Copy saved tensors into an optimizer's own, by name. Raises CheckpointError naming what does not fit."""
    faults = [f"{name} is missing" for name in sorted(own.keys() - state.keys())] + [f"{name} is unknown" for name in sorted(state.keys() - own.keys())]
    faults += [
        f"{name} is {state[name].dtype} {tuple(state[name].shape)}, expected {tensor.dtype} {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and (state[name].shape != tensor.shape or state[name].dtype != tensor.dtype)
    ]
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"the saved optimizer state does not fit {optimizer} on this model: {'; '.join(faults[:3])}{more}")
    for name, tensor in own.items():
        tensor.copy_(state[name])


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2), by torch's fused kernel."""

    _KIND: type[torch.optim.Adam] = torch.optim.AdamW

    def __init__(self, parameters: dict[str, Tensor], settings: recipe_optimizers.AdamW | recipe_optimizers.Adam) -> None:
        self._parameters = parameters
        with_decay = [parameter for name, parameter in parameters.items() if decays(name, parameter)]
        without = [parameter for name, parameter in parameters.items() if not decays(name, parameter)]
        groups = [{"params": with_decay, "weight_decay": settings.weight_decay}, {"params": without, "weight_decay": 0.0}]
        self._adam = self._KIND(
            [group for group in groups if group["params"]],
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            fused=True,
        )
        self._num_updates = torch.zeros((), dtype=torch.int64)
        for parameter in parameters.values():
            # torch would make this in its first step; a resume needs somewhere to copy to before that.
            self._adam.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_factor: float = 1.0) -> None:
        """One update; the gradients are scaled in place."""
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        if gradients and gradient_factor != 1.0:
            torch._foreach_mul_(gradients, gradient_factor)
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()
        self._num_updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """First and second moments, and the number of updates."""
        state = {"num_updates": self._num_updates}
        for name, parameter in self._parameters.items():
            state[f"exp_avg.{name}"] = self._adam.state[parameter]["exp_avg"]
            state[f"exp_avg_sq.{name}"] = self._adam.state[parameter]["exp_avg_sq"]
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a saved state in. Raises CheckpointError."""
        load_into(self.state_dict(), state, optimizer=type(self).__name__)
        for parameter in self._parameters.values():
            self._adam.state[parameter]["step"].fill_(float(self._num_updates.item()))


class Adam(AdamW):
    """Kingma and Ba 2015, algorithm 1; weight decay is added to the gradient (L2)."""

    _KIND = torch.optim.Adam
