"""Ranks over torch.distributed: gloo on CPUs, NCCL on GPUs."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import Store  # type: ignore[attr-defined] # torch does not declare what it exports

from . import comm_reduction, comm_rendezvous, comm_torch_groups
from .comm import Json, ParallelModel, check_same, decode, encode, parameter_digest
from .comm_buckets import Bucket, Buckets, lay_out
from .comm_lost import is_lost_peer
from .errors import RankLostError
from .rank import RankContext
from .recipe_parallel import Parallel
from .whereabouts import inside


def open_torch(parallel: Parallel, context: RankContext, *, run_dir: Path | None, device: torch.device) -> TorchComm:
    """Meet the other ranks. Raises ConfigError, ResourceError or RankLostError."""
    store = comm_rendezvous.connect(context, timeout_s=parallel.timeout_s, run_dir=run_dir)
    if comm_rendezvous.loopback_only() or context.num_nodes == 1:
        _use_loopback()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    comm = TorchComm(context, device, parallel.timeout_s, store, settings=parallel)
    _keep_flight_records(run_dir)
    with comm.watching("the first meeting"):
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=context.rank,
            world_size=context.world_size,
            timeout=timedelta(seconds=parallel.timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
        places = comm.all_gather_object([context.hostname, context.node_rank, context.local_rank])
        comm.hosts = [str(place[0]) for place in places]
        comm.nodes = comm_reduction.node_members([place[1:] for place in places])
    return comm


def _keep_flight_records(run_dir: Path | None) -> None:
    """Have torch remember its last collectives, which the watchdog shows, and NCCL write them down itself when one times out."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "200")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    if run_dir is not None:
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(run_dir / "logs" / "collectives-rank-"))


def _use_loopback() -> None:
    """Keep gloo on the loopback interface where all ranks share a host: nobody else can connect, and no name need resolve."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])


_GLOO_NOISE = re.compile(r"^\[[^]]*\.(?:cc|cpp|h):\d+\] |\. This (?:may|is|could) .*$")
"""A line of its source before what gloo says, and advice that leads nowhere after it."""
_MAX_NAMED = 8
"""Lost ranks that a message names."""
_LETTING_GO_S = 5.0
"""Longest wait at the end for gloo's threads, which need some microseconds unless the machine is overloaded."""


class TorchComm:
    """The default process group."""

    name = "torch"

    def __init__(self, context: RankContext, device: torch.device, timeout_s: int, store: Store | None = None, settings: Parallel | None = None) -> None:
        self.rank = context.rank
        self.world_size = context.world_size
        self.device = device
        self.timeout_s = timeout_s
        self.hosts: list[str] = []
        """Where each rank runs, once they have met."""
        self.nodes: list[list[int]] | None = None
        """The ranks of each node where a hierarchical reduction has something to gain."""
        self.settings = settings or Parallel(timeout_s=timeout_s)
        self._store = store
        self._held: list[Tensor] = []
        self._node_groups: comm_reduction.NodeGroups | None = None

    def hold(self, *tensors: Tensor) -> None:
        """Keep what a collective works on until the back end has let go of it, which it does a moment after the collective.

        Were its thread the last to hold a tensor that Python has dropped, it would need the interpreter's lock, and abort
        the process if the interpreter is shutting down by then.
        """
        self._held = [tensor for tensor in self._held if _is_held_elsewhere(tensor)] + list(tensors)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks; gloo's and NCCL's order of summation depends on size and world size only."""
        result = tensor.detach().to(self.device, copy=True)
        self.hold(result)
        with self.watching("an all-reduce"):
            dist.all_reduce(result)
            return result.to(tensor.device)  # from a GPU only this waits

    def barrier(self) -> None:
        """An all-reduce of one number: unlike `dist.barrier` it takes the group's own device and time-out."""
        self.all_reduce_sum(torch.zeros(1))

    def broadcast_object(self, value: Json) -> Json:
        """Two broadcasts: the length, then the bytes."""
        content = encode(value) if self.rank == 0 else b""
        size = torch.tensor([len(content)], device=self.device)
        with self.watching("a broadcast"):
            dist.broadcast(size, src=0)
            buffer = _bytes_tensor(content, int(size.item())).to(self.device)
            self.hold(size, buffer)
            dist.broadcast(buffer, src=0)
        return decode(_content(buffer, int(size.item())))

    def all_gather_object(self, value: Json) -> list[Json]:
        """Two all-gathers: the lengths, then the bytes, padded to the longest."""
        content = encode(value)
        with self.watching("an all-gather"):
            size, sizes = torch.tensor([len(content)], device=self.device), torch.empty(self.world_size, dtype=torch.int64, device=self.device)
            dist.all_gather_single(sizes, size)
            longest = int(sizes.max().item())
            buffer, gathered = _bytes_tensor(content, longest).to(self.device), torch.empty(self.world_size * longest, dtype=torch.uint8, device=self.device)
            self.hold(size, sizes, buffer, gathered)
            dist.all_gather_single(gathered, buffer)
        rows = gathered.view(self.world_size, longest)
        return [decode(_content(row, int(size))) for row, size in zip(rows, sizes.tolist(), strict=True)]

    def parallel(self, module: nn.Module, bucket_mib: int) -> ParallelModel:
        """Buckets of gradients, with rank 0's parameters on every rank, checked."""
        with self.watching("the start of the model"):
            model = TorchModel(self, module, bucket_mib, comm_reduction.choose(self.settings, comm_torch_groups.TorchGroup(None, self.hold), self._groups()))
        check_same(self, "the parameters", parameter_digest(module))
        return model

    def _groups(self) -> comm_reduction.NodeGroups | None:
        """What a hierarchical reduction takes, made once; None where nothing wants it or it gains nothing."""
        if self._node_groups is None and self.nodes is not None and comm_reduction.wants_nodes(self.settings):
            is_cuda = self.device.type == "cuda"
            self._node_groups = comm_torch_groups.make_node_groups(self.nodes, self.rank, timeout_s=self.timeout_s, is_cuda=is_cuda, hold=self.hold)
        return self._node_groups

    def close(self) -> None:
        """Without this a process can abort at exit."""
        deadline = time.monotonic() + _LETTING_GO_S
        while any(_is_held_elsewhere(tensor) for tensor in self._held) and time.monotonic() < deadline:
            time.sleep(0.001)
        if dist.is_initialized():
            dist.destroy_process_group()

    @contextlib.contextmanager
    def watching(self, what: str, *, waits: bool = True) -> Iterator[None]:
        """Turn what gloo, NCCL and the store raise when a peer is gone or silent into RankLostError."""
        try:
            with inside(what, waits=waits):
                yield
        except (RuntimeError, OSError) as error:
            if not is_lost_peer(error):
                raise
            reason = _GLOO_NOISE.sub("", str(error).strip().splitlines()[0])
            raise RankLostError(
                f"rank {self.rank} of {self.world_size} lost {self._whom()} during {what} (time-out {self.timeout_s} s): {reason}. "
                "The last checkpoint is good: run the same command again"
            ) from error

    def _whom(self) -> str:
        """The ranks that are gone, with their hosts, as far as can be found out."""
        missing = comm_rendezvous.missing_ranks(self._store, self.rank, self.world_size) if self._store is not None and self.hosts else []
        if not missing:
            return "another rank"
        named = [f"rank {rank} on {self.hosts[rank]}" for rank in missing[:_MAX_NAMED]]
        return ", ".join(named) + (f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else "")


def _bytes_tensor(content: bytes, size: int) -> Tensor:
    return torch.frombuffer(bytearray(content.ljust(size, b" ")), dtype=torch.uint8)


def _content(tensor: Tensor, size: int) -> bytes:
    return bytes(tensor[:size].cpu().numpy().data)


class TorchModel:
    """Sums each bucket of gradients beside the backward pass of a step that fills it."""

    def __init__(self, comm: TorchComm, module: nn.Module, bucket_mib: int, reduction: comm_reduction.Reduction | None = None) -> None:
        self._comm = comm
        self.module = module
        self._sums: list[dist.Work] = []
        self._pipeline = comm_reduction.Pipeline(torch.cuda.Stream(comm.device) if comm.device.type == "cuda" else None)  # type: ignore[no-untyped-call]
        self._reduction = reduction
        self._buckets = Buckets(lay_out([p for p in module.parameters() if p.requires_grad], bucket_mib << 20), self._start_sum)
        self._take_from_first_rank()

    def _take_from_first_rank(self) -> None:
        """Rank 0's parameters, a bucket at a time, and what else the module holds."""
        for bucket in self._buckets.buckets:
            with torch.no_grad():
                bucket.buffer.copy_(torch.cat([parameter.reshape(-1) for parameter in bucket.parameters]))
                self._broadcast(bucket.buffer)
                for parameter, view in zip(bucket.parameters, bucket.views, strict=True):
                    parameter.copy_(view)
                bucket.buffer.zero_()
        for tensor in (*(parameter for parameter in self.module.parameters() if not parameter.requires_grad), *self.module.buffers()):
            self._broadcast(tensor)

    def _broadcast(self, tensor: Tensor) -> None:
        same_memory = tensor.detach()
        self._comm.hold(same_memory)
        dist.broadcast(same_memory, src=0)

    def no_sync(self) -> AbstractContextManager[None]:
        """Forward and backward in here only add to this rank's gradients."""
        return self._buckets.no_sync()

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()`; outside `no_sync` each bucket is on its way as soon as it is full."""
        with self._comm.watching("the start of the reduction of the gradients", waits=False):
            loss.backward()  # type: ignore[no-untyped-call]

    def finish_gradients(self) -> None:
        """Wait for the buckets."""
        with self._comm.watching("the reduction of the gradients"):
            self._buckets.start_rest()
            for work in self._sums:
                work.wait()
            self._pipeline.finish()
        self._sums.clear()

    def zero_gradients(self) -> None:
        """In place: the gradients are views of the buckets."""
        self._buckets.zero()

    def forget(self) -> None:
        """Drop what compression remembers."""
        if self._reduction is not None:
            self._reduction.forget()

    def _start_sum(self, index: int, bucket: Bucket) -> None:
        """Begin to sum a bucket in place."""
        if self._reduction is not None:
            self._pipeline.start(self._reduction.steps(index, bucket.buffer, bucket.views))
            return
        same_memory = bucket.buffer.detach()
        self._comm.hold(same_memory)
        work = dist.all_reduce(same_memory, async_op=True)
        assert work is not None  # only a rank outside the group gets None
        self._sums.append(work)


def _is_held_elsewhere(tensor: Tensor) -> bool:
    """Whether more than the Python object holds it."""
    return int(tensor._use_count()) > 1  # type: ignore[attr-defined]
