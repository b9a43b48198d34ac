"""Which piece of a whole tensor this rank holds: everything of a plain tensor, the local part of a DTensor.

FSDP2 and tensor parallelism give DTensors over meshes whose ranks lie in row-major order; `division` needs no more than
that. Everything else about sharding (optimizers, norms, checkpoints) is built on the few functions here.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from .division import Box, Cut, Division, volume

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


def is_divided(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor. Where nobody has made one, half a second of importing torch's module for them is saved."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of them is held by several ranks together; the same on every rank."""
    return any(map(is_divided, tensors))


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """This rank's part, in the same memory; a plain tensor itself."""
    if not is_divided(tensor):
        return tensor
    part: Tensor = tensor.to_local()
    return part


def gradient(parameter: Tensor) -> Tensor:
    """This rank's part of a gradient, cut as its parameter is; sums that ranks hold open are closed. Collective then."""
    found = parameter.grad
    assert found is not None
    if is_divided(parameter) and is_divided(found) and found.placements != parameter.placements:
        found = parameter.grad = found.redistribute(placements=parameter.placements)
    return local(found)


def own_rank() -> int:
    """This rank's number; 0 where there is but one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def division_of(tensor: Tensor) -> Division:
    """How a tensor is divided over the ranks."""
    if not is_divided(tensor):
        return Division(tuple(tensor.shape))
    return Division(tuple(tensor.shape), _cuts(tensor.device_mesh, tuple(tensor.placements), tensor.ndim))


@functools.lru_cache(maxsize=1024)
def _cuts(mesh: DeviceMesh, placements: tuple[Placement, ...], num_dimensions: int) -> tuple[Cut, ...]:
    """The cuts in the order in which they were made: FSDP cuts what tensor parallelism has cut before (a strided shard), though its axis comes first."""
    ranks = mesh.mesh
    plain: list[Cut] = []
    strided: list[Cut] = []
    for axis, placement in enumerate(placements):
        if placement.is_replicate() or ranks.shape[axis] == 1:
            continue
        dimension = getattr(placement, "dim", None)
        assert dimension is not None, f"{placement} is no finished tensor"
        first, second = (int(ranks.select(axis, index).flatten()[0]) for index in (0, 1))
        cut = Cut(dimension % num_dimensions, ranks.shape[axis], second - first)
        (strided if getattr(placement, "split_factor", 1) > 1 else plain).append(cut)
    return (*plain, *reversed(strided))


def counts_here(tensor: Tensor) -> bool:
    """Whether this rank is the one among those with the same piece whose numbers enter a sum over all ranks."""
    rank = own_rank()
    return division_of(tensor).first_holder(rank) == rank


def piece_name(name: str, division: Division, box: Box) -> str:
    """What a piece is called in a file: a tensor that is not cut keeps its name."""
    return f"{name}[{','.join(f'{begin}:{end}' for begin, end in box)}]" if division.cuts else name


def own_piece(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What this rank holds of a tensor, under the name that it has in a file; nothing where it holds nothing."""
    if not is_divided(tensor):
        return {name: tensor}
    division, part = division_of(tensor), local(tensor)
    box = division.box_of(own_rank())
    assert tuple(end - begin for begin, end in box) == tuple(part.shape), f"rank {own_rank()} holds {tuple(part.shape)} of {name}, not {box}"
    return {piece_name(name, division, box): part} if volume(box) else {}


def cut_out(whole: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor, what this rank holds of `like`."""
    if not is_divided(like):
        return whole
    return whole[tuple(slice(begin, end) for begin, end in division_of(like).box_of(own_rank()))]


def elsewhere(part: Tensor, like: Tensor) -> Tensor:
    """A tensor in the memory of `part`, divided as `like` is, whatever device that memory is of: `wrap` would move it to that of `like`."""
    return type(like)(part, like._spec, requires_grad=False) if is_divided(like) else part  # as FSDP2 makes what it keeps on the host


def largest_numel(tensor: Tensor) -> int:
    """Elements of the largest piece that any rank holds; the same on every rank."""
    return volume(division_of(tensor).box_of(0))  # no part is larger than the first


def wrap(part: Tensor, like: Tensor) -> Tensor:
    """A tensor in the memory of `part`, divided as `like` is."""
    if not is_divided(like):
        return part
    arguments: dict[str, Any] = {"run_check": False, "shape": like.shape, "stride": like.stride()}
    wrapped: Tensor = type(like).from_local(part, like.device_mesh, like.placements, **arguments)
    return wrapped
