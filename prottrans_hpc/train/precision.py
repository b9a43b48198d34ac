"""Numerical precision of the forward pass: fp32, or bf16 autocast over fp32 weights, gradients and optimizer state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from ..errors import ConfigError

Context = Callable[[], AbstractContextManager[object]]
"""Makes a fresh context for one forward pass; the backward pass runs outside it."""


def forward_context(precision: str, device: torch.device) -> Context:
    """What to run each forward pass in. Raises ConfigError where the device cannot do it."""
    return CONTEXTS[precision](device)


def _fp32(device: torch.device) -> Context:
    return contextlib.nullcontext


def _bf16(device: torch.device) -> Context:
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"precision = 'bf16' needs a GPU of compute capability 8.0 or later, which {name} is not: set precision = 'fp32'")
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


CONTEXTS: dict[str, Callable[[torch.device], Context]] = {"fp32": _fp32, "bf16": _bf16}
