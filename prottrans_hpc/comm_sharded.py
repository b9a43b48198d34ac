"""Models that are cut over the ranks of torch.distributed: FSDP2, its hybrid, tensor parallelism, and their products.

This stands beside `comm_torch`, not in `train`: what crosses between ranks, and that gradients are sums, is the same contract,
and it needs nothing of a training but the module. It is imported where a model is cut only, since torch's DTensor takes
half a second to import.

A tensor group's ranks see the same sequences; each has some columns or rows of the large matrices (Shoeybi et al. 2019,
Megatron-LM) and everything else whole. Over that, FSDP cuts every parameter along its first axis: a layer's weights are
brought together shortly before they are used, and its gradients summed and cut again right behind its backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.utils import _pytree

from .architecture import LossSum
from .comm_torch import TorchComm
from .parallel_layout import ParallelLayout

_AXES = ("replicate", "shard", "tensor")
_STYLES: dict[str, Callable[[], ParallelStyle]] = {"column": ColwiseParallel, "row": RowwiseParallel}
Split = Mapping[str, Literal["column", "row"] | int]
"""As `architecture.TensorParallel.split`."""


class ShardedModel:
    """The ParallelModel of a module that `shard` has cut; its parameters and their gradients are DTensors."""

    def __init__(self, comm: TorchComm, module: FSDPModule) -> None:
        self._comm, self._root = comm, module
        self._units = [part for part in self.module.modules() if isinstance(part, FSDPModule)]

    @property
    def module(self) -> nn.Module:
        """The module itself: FSDP works by hooks."""
        assert isinstance(self._root, nn.Module)
        return self._root

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Copies are not summed in here. Within a copy they are: whole gradients of all layers are what sharding has no room for."""
        self._root.set_requires_all_reduce(False)
        try:
            yield
        finally:
            self._root.set_requires_all_reduce(True)

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()`, which brings weights together and sums gradients layer by layer."""
        with self._comm.watching("the backward pass of a sharded model"):
            loss.backward()  # type: ignore[no-untyped-call]

    def finish_gradients(self) -> None:
        """Nothing to wait for: the backward pass ends with the sums."""

    def zero_gradients(self) -> None:
        """Forget the gradients; the next backward pass makes them afresh."""
        self.module.zero_grad(set_to_none=True)

    def forget(self) -> None:
        """Nothing is left from step to step."""

    def when_gathered(self, note: Callable[[Tensor], None]) -> None:
        """From now on, call `note` with each whole weight (of a tensor group, this rank's part of it) when it has been brought together and before
        it is used. Its memory is given back behind that, and filled again for the backward pass: who keeps saved tensors elsewhere must leave it alone.
        """

        def gathered(unit: nn.Module, _arguments: Any) -> None:
            for part in _own_modules(unit):
                for parameter in part.parameters(recurse=False):
                    note(parameter)

        for part in self._units:
            assert isinstance(part, nn.Module)
            part.register_forward_pre_hook(gathered)  # behind FSDP's own

    @contextlib.contextmanager
    def noting_gradients(self, note: Callable[[str, Tensor], None]) -> Iterator[None]:
        """In here, call `note` with the name of a parameter and this rank's own gradient of all of it (of a tensor group, of this rank's part),
        before it is added to those of other ranks and cut."""
        names = {part: f"{name}." if name else "" for name, part in self.module.named_modules()}
        handles: dict[int, Any] = {}

        def noted(name: str, parameter: Tensor) -> None:
            if parameter.grad is not None:
                note(name, parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad)

        def gathered(unit: nn.Module, _arguments: Any) -> None:
            for part in _own_modules(unit):
                for leaf, parameter in part.named_parameters(recurse=False):
                    if parameter.requires_grad and id(parameter) not in handles:
                        hook: Any = partial(noted, names[part] + leaf)
                        handles[id(parameter)] = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call] # of torch

        hooks = [part.register_forward_pre_hook(gathered) for part in self._units if isinstance(part, nn.Module)]  # behind FSDP's own
        try:
            yield
        finally:
            for handle in (*hooks, *handles.values()):
                handle.remove()

    def around(self, forward: Callable[[], AbstractContextManager[Any]]) -> Callable[[], AbstractContextManager[Any]]:
        """`forward`, where the death of a peer is a RankLostError: a forward pass talks here too."""

        @contextlib.contextmanager
        def entered() -> Iterator[None]:
            with self._comm.watching("the forward pass of a sharded model"), forward():
                if len(self._units) > 1:
                    # Autocast would keep the half copies of all layers until the pass ends: with recomputation, one layer's are enough.
                    torch.set_autocast_cache_enabled(False)  # until autocast ends
                yield
            if not torch.is_grad_enabled():
                # Weights that stay together for a backward pass that does not come: a checkpoint may be taken up before the next forward pass.
                for part in self._units:
                    part.reshard()

        return entered


def shard(comm: TorchComm, module: nn.Module, layout: ParallelLayout, split: Split) -> ShardedModel:
    """Cut a module as `layout` says. Of one on the meta device only this rank's pieces come to have memory, whose content is undefined;
    another's weights must be the same on every rank.

    `split` is empty without tensor groups. Collective.
    """
    if LossSum not in _pytree.SUPPORTED_NODES:  # through it FSDP finds the loss, whose gradient starts its work
        _pytree.register_dataclass(LossSum)
    with comm.watching("the start of a sharded model"):
        mesh = _mesh(comm, layout)
        if layout.num_tensor > 1:
            _share(module, mesh["tensor"], split)
        root = _cut(module, mesh["replicate", "shard"] if layout.num_replicas > 1 else mesh["shard"], frees=layout.num_shards > 1)
        module._apply(lambda tensor: _with_memory(tensor, comm.device))  # type: ignore[no-untyped-call] # of torch
    return ShardedModel(comm, root)


@torch.no_grad()
def _with_memory(tensor: Tensor, device: torch.device) -> Tensor:
    if not tensor.is_meta:
        return tensor
    if not isinstance(tensor, DTensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    part = torch.empty(tensor.to_local().shape, dtype=tensor.dtype, device=device)
    return DTensor.from_local(part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def _share(module: nn.Module, mesh: DeviceMesh, split: Split) -> None:
    """Of every weight that `split` names, leave this rank of a tensor group its part; every rank has the whole, so nothing is sent."""
    for name, part in module.named_modules():
        style = split.get(name.rpartition(".")[2])
        if isinstance(style, str):
            parallelize_module(part, mesh, _STYLES[style](), src_data_rank=None)
        for leaf, parameter in list(part.named_parameters(recurse=False)):
            dimension = split.get(".".join([*name.split("."), leaf][-2:]).lstrip("."))
            if isinstance(dimension, int):
                cut = distribute_tensor(parameter, mesh, [Shard(dimension)], src_data_rank=None)
                part.register_parameter(leaf, nn.Parameter(cut, requires_grad=parameter.requires_grad))


def _mesh(comm: TorchComm, layout: ParallelLayout) -> DeviceMesh:
    mesh = init_device_mesh(comm.device.type, (layout.num_replicas, layout.num_shards, layout.num_tensor), mesh_dim_names=_AXES)
    for axis in _AXES:  # torch gives groups its own default, not that of the first group
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=comm.timeout_s), mesh.get_group(axis))
    return mesh


def _own_modules(unit: nn.Module) -> Iterator[nn.Module]:
    """Those whose weights are brought together with a unit's."""
    yield unit
    for child in unit.children():
        if not isinstance(child, FSDPModule):
            yield from _own_modules(child)


def _cut(module: nn.Module, mesh: DeviceMesh, *, frees: bool) -> FSDPModule:
    """Every layer of a list of layers is brought together by itself, what is left with the root: a layer that is applied
    again and again (ALBERT's) stands in no list, and would be brought together as often. Units are of one type: norms that stay
    fp32 among half weights (APEX's O2) are units of their own, a few kilobytes that stay together until the backward pass is done."""
    if len({parameter.dtype for parameter in module.parameters() if parameter.requires_grad}) > 1:
        for part in list(module.modules()):
            if any(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in part.parameters(recurse=False)):
                fully_shard(part, mesh=mesh, reshard_after_forward=False)
    for layers in module.modules():
        if isinstance(layers, nn.ModuleList):
            for layer in (layer for layer in layers if not isinstance(layer, nn.ModuleList)):
                fully_shard(layer, mesh=mesh, reshard_after_forward=frees)
    root: FSDPModule = fully_shard(module, mesh=mesh)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            # Sums, not means. Without the second, torch asks the back end to divide by 1 as it adds, which gloo cannot.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    return root
