"""Numerical precision on stock torch: autocast, half weights with or without fp32 masters, TF32. What each name means
stands in `precision_levels`.

Autocast is on with half weights, too: it costs nothing where all is half already, sends losses and softmax through fp32,
and lets a model add up in fp32 where it wants to. Norms, whose weights are fp32 with masters (APEX's O2) and half
without (O3), give their result in half.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..precision_levels import LEVELS, Level
from . import pieces
from .optim import Optimizer, copy_into, misfits

Context = Callable[[], AbstractContextManager[object]]
"""Makes a fresh context for one forward pass; the backward pass runs outside it."""

_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def forward_context(precision: str, device: torch.device) -> Context:
    """What to run each forward pass in; sets the device up. Raises ConfigError where it cannot do it."""
    level = LEVELS[precision]
    if device.type == "cuda":
        _check_gpu(precision, level, device)
        # Backward passes run outside the context, on threads of their own: this is a setting of the process.
        torch.set_float32_matmul_precision("high" if level.products == "tf32" else "highest")
    if not level.is_half:
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype=_DTYPES[level.products])


def _check_gpu(precision: str, level: Level, device: torch.device) -> None:
    if level.products in ("bf16", "tf32") and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        other = precision.replace("bf16", "fp16") if "bf16" in precision else "fp32"
        raise ConfigError(
            f"precision = {precision!r} needs a GPU of compute capability 8.0 or later, which {name} is not: set precision = {other!r}, or 'fp32'"
        )


@torch.no_grad()
def lower_weights(module: nn.Module, precision: str) -> dict[str, Tensor]:
    """Make the trained weights half where the precision says so; returns the fp32 masters by the module's names, if any.

    Weights that take no gradient stay as they are, to be saved and exported unchanged.
    """
    level = LEVELS[precision]
    if level.weights == "fp32":
        return {}
    dtype, kept = _DTYPES[level.weights], set[int]()
    for norm in filter(is_norm, module.modules()):
        norm.register_forward_pre_hook(_casting_to(torch.float32 if level.has_masters else dtype))
        norm.register_forward_hook(lambda norm, arguments, result: result.to(dtype))
        if level.has_masters:
            kept |= {id(parameter) for parameter in norm.parameters(recurse=False)}
    if not level.has_masters:
        for buffer in module.buffers():
            buffer.data = buffer.data.to(dtype) if buffer.is_floating_point() else buffer.data
    masters: dict[int, Tensor] = {}
    for parameter in module.parameters():
        if parameter.requires_grad and id(parameter) not in kept:
            masters[id(parameter)] = nn.Parameter(parameter.detach().clone())
            parameter.data = parameter.data.to(dtype)
    if not level.has_masters:
        return {}
    # By every name that a state dict has: a tied weight has several.
    return {name: masters[id(tensor)] for name, tensor in module.state_dict(keep_vars=True).items() if id(tensor) in masters}


@torch.no_grad()
def cut_masters(masters: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Of each whole master this rank's piece, cut as the half weight that the sharded module has under its name. Those of masters on the
    meta device have memory, too, of undefined content."""
    own, cut = module.state_dict(keep_vars=True), dict[int, Tensor]()
    for name, master in masters.items():
        if id(master) not in cut:
            part = torch.empty_like(pieces.local(own[name]), dtype=torch.float32)
            if not master.is_meta:
                part.copy_(pieces.cut_out(master, own[name]))
            cut[id(master)] = nn.Parameter(pieces.wrap(part, own[name]))
    return {name: cut[id(master)] for name, master in masters.items()}


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises; an architecture's own ones are called ...Norm."""
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or type(module).__name__.endswith("Norm")


def _casting_to(dtype: torch.dtype) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def cast(norm: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value for value in arguments)

    return cast


@torch.no_grad()
def put_weights(module: nn.Module, masters: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Load weights into a module and its masters, of a sharded module this rank's pieces. Raises RuntimeError when they do not fit, before masters change."""
    own = module.state_dict()
    if pieces.is_sharded(own.values()):
        faults = misfits({**own, **masters}, weights)
        if faults:
            raise RuntimeError(faults)
        copy_into(own, weights)
    else:
        module.load_state_dict(weights, strict=True)
    copy_into(masters, weights)


class HalfWeights:
    """Lets an optimizer update half weights in fp32: their masters, or copies that live as long as the update."""

    def __init__(self, parameters: Mapping[str, Tensor], masters: Mapping[str, Tensor], build: Callable[[dict[str, Tensor]], Optimizer]) -> None:
        half = {name: parameter for name, parameter in parameters.items() if parameter.dtype != torch.float32}
        self._keeps = bool(masters)
        copies = {name: masters[name] if self._keeps else nn.Parameter(torch.empty_like(parameter, dtype=torch.float32)) for name, parameter in half.items()}
        self._pairs = [(parameter, copies[name]) for name, parameter in half.items()]
        self._optimizer = build({name: copies.get(name, parameter) for name, parameter in parameters.items()})
        self._free()

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_factor: float = 1.0) -> None:
        """One update of the fp32 weights; the half ones are these, rounded."""
        for parameter, copy in self._pairs:
            own, wide = pieces.local(parameter), pieces.local(copy)
            if not self._keeps:
                wide.untyped_storage().resize_(wide.numel() * wide.element_size())
                wide.copy_(own)
            copy.grad = None if parameter.grad is None else pieces.wrap(pieces.gradient(parameter).float(), copy)
        self._optimizer.step(learning_rate, gradient_factor)
        for parameter, copy in self._pairs:
            pieces.local(parameter).copy_(pieces.local(copy))
            copy.grad = None
        self._free()

    def _free(self) -> None:
        if not self._keeps:
            for _, copy in self._pairs:
                pieces.local(copy).untyped_storage().resize_(0)

    def state_dict(self) -> dict[str, Tensor]:
        """The optimizer's own, fp32; masters are saved as the model's weights."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a saved state in. Raises CheckpointError."""
        self._optimizer.load_state_dict(state)
