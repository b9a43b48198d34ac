"""Ranks over Horovod on its MPI controller, started by an MPI starter (mpirun, jsrun, srun with PMIx).

Horovod's own optimizer wrapper is not used: it averages, its `broadcast_optimizer_state` moves the parameters of a
fresh optimizer, and its fusion of whatever tensors happen to be ready changes the order of summation from run to run
with three or more ranks. Here the buckets are laid out once, by the list of parameters, and nothing else is fused.
"""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import comm_horovod_groups, comm_reduction
from .comm import Json, ParallelModel, check_same, decode, encode, parameter_digest
from .comm_buckets import Bucket, Buckets, lay_out
from .errors import ConfigError, RankLostError, ResourceError, missing_package
from .rank import RankContext
from .recipe_parallel import Parallel
from .whereabouts import inside

_POLL_S = 0.0002

_SETTINGS = {
    "HOROVOD_CONTROLLER": "mpi",
    "HOROVOD_CPU_OPERATIONS": "mpi",
    "HOROVOD_FUSION_THRESHOLD": "0",
}
"""Set before Horovod starts. MPI, because its Gloo controller is 3 times slower and can hang; no fusion: see above."""


def open_horovod(parallel: Parallel, context: RankContext, *, run_dir: Path | None, device: torch.device) -> HorovodComm:
    """Start Horovod. Raises ResourceError (not installed, or without MPI) or ConfigError (not started by an MPI starter)."""
    os.environ.update(_SETTINGS)
    try:
        import horovod.torch as hvd
    except ImportError as error:
        raise missing_package("horovod", "horovod", "parallel.comm = 'horovod'") from error
    if not hvd.mpi_built():
        raise ResourceError("this Horovod was built without MPI: build it again with `make horovod`, or set parallel.comm = 'torch'")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Process sets that can be added cost a round of talk in every cycle of Horovod's.
    hvd.init(process_sets="dynamic" if comm_reduction.wants_nodes(parallel) and context.num_nodes > 1 else None)
    if (hvd.rank(), hvd.size()) != (context.rank, context.world_size):
        found = f"rank {hvd.rank()} of {hvd.size()}"
        hvd.shutdown()
        raise ConfigError(
            f"the starter {context.starter!r} says that this is rank {context.rank} of {context.world_size}, MPI says {found}: "
            "parallel.comm = 'horovod' needs a machine whose starter is an MPI one, such as mpirun; or set parallel.comm = 'torch'"
        )
    return HorovodComm(hvd, context, device, parallel)


class HorovodComm:
    """Horovod's global process set."""

    name = "horovod"

    def __init__(self, hvd: Any, context: RankContext, device: torch.device, settings: Parallel) -> None:
        self._hvd = hvd
        self.rank = context.rank
        self.world_size = context.world_size
        self.device = device
        self.settings = settings
        self.timeout_s = settings.timeout_s
        self._place = [context.node_rank, context.local_rank]
        self._node_groups: comm_reduction.NodeGroups | None = None
        self._is_broken = False

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in MPI's order, which depends on size and world size only."""
        name = f"sum.{tensor.dtype}.{tuple(tensor.shape)}"
        return self.wait(self._hvd.allreduce_async(tensor.detach(), op=self._hvd.Sum, name=name), "an all-reduce")

    def start_sum(self, buffer: Tensor, name: str) -> int:
        """Begin to replace `buffer` by its sum over ranks; give the handle to `wait`."""
        return int(self._hvd.allreduce_async_(buffer, op=self._hvd.Sum, name=name))

    def wait(self, handle: int, what: str) -> Tensor:
        """What an operation gave, of an exchange what was received; Horovod itself would wait for a silent peer for ever."""
        with inside(what):
            return self._outcome(handle, what)

    def _outcome(self, handle: int, what: str) -> Tensor:
        deadline = time.monotonic() + self.timeout_s
        while not self._hvd.poll(handle):
            if time.monotonic() > deadline:
                raise self._lost(what, "no answer")
            time.sleep(_POLL_S)
        try:
            result: Tensor | tuple[Tensor, Tensor] = self._hvd.synchronize(handle)
        except RuntimeError as error:  # HorovodInternalError is one
            raise self._lost(what, str(error).strip().splitlines()[0]) from error
        return result[0] if isinstance(result, tuple) else result

    def _lost(self, what: str, reason: str) -> RankLostError:
        self._is_broken = True
        return RankLostError(
            f"rank {self.rank} of {self.world_size} lost another rank during {what} (time-out {self.timeout_s} s): {reason}. "
            "The last checkpoint is good: run the same command again"
        )

    def barrier(self) -> None:
        """An all-reduce of one number."""
        self.all_reduce_sum(torch.zeros(1))

    def broadcast_object(self, value: Json) -> Json:
        """Rank 0's bytes, through a gather in which the others give nothing."""
        return decode(self._gather(encode(value) if self.rank == 0 else b"", "broadcast_object"))

    def all_gather_object(self, value: Json) -> list[Json]:
        """Horovod gathers arrays of different lengths; a line feed parts them, which JSON has only within strings, escaped."""
        return [decode(part) for part in self._gather(encode(value) + b"\n", "all_gather_object").splitlines()]

    def _gather(self, content: bytes, what: str) -> bytes:
        buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
        return bytes(self.wait(self._hvd.allgather_async(buffer, name=what), what).numpy().data)

    def parallel(self, module: nn.Module, bucket_mib: int) -> ParallelModel:
        """Buckets of gradients, with rank 0's parameters on every rank, checked."""
        tensors = [*module.named_parameters(), *module.named_buffers()]
        handles = [self._hvd.broadcast_async_(tensor.data, 0, name=f"start.{name}") for name, tensor in tensors]
        for handle in handles:
            self.wait(handle, "the start of the model")
        check_same(self, "the parameters", parameter_digest(module))
        return HorovodModel(self, module, bucket_mib, self._reduction())

    def _reduction(self) -> comm_reduction.Reduction | None:
        world = comm_horovod_groups.HorovodGroup(self, self._hvd, self._hvd.global_process_set, "all")
        return comm_reduction.choose(self.settings, world, self._groups() if comm_reduction.wants_nodes(self.settings) else None)

    def _groups(self) -> comm_reduction.NodeGroups | None:
        """What a hierarchical reduction takes, made once; None where it gains nothing."""
        if self._node_groups is None:
            nodes = comm_reduction.node_members(self.all_gather_object(self._place))
            self._node_groups = comm_horovod_groups.make_node_groups(self, self._hvd, nodes) if nodes else None
        return self._node_groups

    def close(self) -> None:
        """Leave; after a lost rank Horovod's own shutdown would wait for it, so the process has to end without."""
        if not self._is_broken:
            self._hvd.shutdown()


class HorovodModel:
    """Sums each bucket as soon as the last backward pass of a step has filled it, and those before it are under way."""

    def __init__(self, comm: HorovodComm, module: nn.Module, bucket_mib: int, reduction: comm_reduction.Reduction | None) -> None:
        self._comm = comm
        self.module = module
        self._reduction = reduction
        self._pipeline = comm_reduction.Pipeline()  # Horovod's waiting is the host's, on GPUs too
        self._handles: list[int] = []
        self._buckets = Buckets(lay_out([p for p in module.parameters() if p.requires_grad], bucket_mib << 20), self._start_sum)

    def no_sync(self) -> AbstractContextManager[None]:
        """Forward and backward in here only add to this rank's gradients."""
        return self._buckets.no_sync()

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()`; outside `no_sync` full buckets are on their way when it returns."""
        loss.backward()  # type: ignore[no-untyped-call]

    def finish_gradients(self) -> None:
        """Send what no gradient completed, then wait for all buckets."""
        self._buckets.start_rest()
        self._pipeline.finish()
        for handle in self._handles:
            self._comm.wait(handle, "the reduction of the gradients")
        self._handles.clear()

    def forget(self) -> None:
        """Drop what compression remembers."""
        if self._reduction is not None:
            self._reduction.forget()

    def zero_gradients(self) -> None:
        """In place: the gradients are views of the buckets."""
        self._buckets.zero()

    def _start_sum(self, index: int, bucket: Bucket) -> None:
        if self._reduction is None:
            self._handles.append(self._comm.start_sum(bucket.buffer, f"gradients.{index}"))
        else:
            self._pipeline.start(self._reduction.steps(index, bucket.buffer, bucket.views))
