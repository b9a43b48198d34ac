"""Saved tensors that ranks hold together (DTensors of tensor-parallel layers): what a policy works on is this rank's part, a plain tensor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from .hooks import Hooks

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_divided(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor. Where nobody has made one, torch's module for them is not imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part; a plain tensor itself."""
    # Not `to_local()`, which makes a new tensor of a parameter: its own lives as long, and counts its versions.
    return tensor._local_tensor if is_divided(tensor) else tensor


@dataclass(frozen=True)
class _Part:
    """What a DTensor's local part became, and how it was a part of the whole."""

    saved: Any
    kind: type[Any]
    mesh: Any
    placements: Any
    shape: torch.Size
    stride: tuple[int, ...]


def by_parts(inner: Hooks, stays: Callable[[Tensor], bool]) -> Hooks:
    """Give `inner` the local part of each DTensor, but for those that stay as they are: it sees them whole, and knows no place for them.

    Two DTensors over one local tensor, and a plain tensor beside them, are one storage to `inner`.
    """

    def pack(tensor: Tensor) -> Any:
        if not is_divided(tensor) or stays(tensor):
            return inner.pack(tensor)
        return _Part(inner.pack(local(tensor)), type(tensor), tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride())

    def unpack(saved: Any) -> Tensor:
        if not isinstance(saved, _Part):
            return inner.unpack(saved)
        with torch.no_grad():
            whole: Tensor = saved.kind.from_local(
                inner.unpack(saved.saved), saved.mesh, saved.placements, run_check=False, shape=saved.shape, stride=saved.stride
            )
        return whole

    return Hooks(pack, unpack)
