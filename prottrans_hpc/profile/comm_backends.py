"""The back ends that the communication study compares: what each calls an all-reduce, a reduce-scatter and an all-gather.

Each opens to a `Contender`, or raises a ProttransError that says why it is not to be had here and what to do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..comm import default_device
from ..errors import ConfigError, ResourceError, missing_package
from ..rank import RankContext
from ..recipe_parallel import Parallel

SCOPES = ("world", "node", "between")
"""All ranks; the ranks of each node, all nodes at once; the ranks of equal local rank, all such groups at once."""
COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather")
MPI_STARTERS = ("mpirun", "srun", "jsrun", "horovodrun")

Call = Callable[[], None]
"""One collective on memory of its own; returns when it has ended on this rank."""


@dataclass(frozen=True)
class Gang:
    """Which ranks each scope joins; a scope of one rank is left out."""

    context: RankContext
    members: dict[str, list[int]]
    """Scope -> the ranks of this rank's own group."""


@dataclass(frozen=True)
class Contender:
    """A back end that works here."""

    name: str
    prepare: Callable[[str, str, int], Call]
    """`(collective, scope, numbers)` -> a call on a buffer of so many fp32 numbers, a multiple of the group's size."""
    scopes: tuple[str, ...]
    close: Callable[[], None] = lambda: None


def _torch_calls(backend: str, gang: Gang, device: torch.device, timeout_s: int) -> Contender:
    """gloo or nccl; the default group of the process is gloo's."""
    groups: dict[str, Any] = {}
    for scope, own in gang.members.items():
        if scope == "world" and backend == "gloo":
            groups[scope] = None
        else:
            groups[scope] = dist.new_group(own, backend=backend, timeout=timedelta(seconds=timeout_s), use_local_synchronization=True)
    buffer = functools.cache(lambda purpose, numbers: torch.zeros(numbers, device=device))
    finish: Call = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def prepare(collective: str, scope: str, numbers: int) -> Call:
        group, size = groups[scope], len(gang.members[scope])
        whole, part = buffer("whole", numbers), buffer("part", numbers // size)
        calls: dict[str, Call] = {
            "all_reduce": lambda: dist.all_reduce(whole, group=group),
            "reduce_scatter": lambda: dist.reduce_scatter_single(part, whole, group=group),
            "all_gather": lambda: dist.all_gather_single(whole, part, group=group),
        }

        def call() -> None:
            calls[collective]()
            finish()

        return call

    return Contender(backend, prepare, tuple(groups))


def open_gloo(gang: Gang, timeout_s: int) -> Contender:
    """torch.distributed on CPUs, over TCP."""
    return _torch_calls("gloo", gang, torch.device("cpu"), timeout_s)


def open_nccl(gang: Gang, timeout_s: int) -> Contender:
    """torch.distributed on GPUs."""
    if not torch.cuda.is_available():
        raise ResourceError("nccl joins GPUs, and this rank sees none: take a machine profile with GPUs, and a torch that is built for CUDA")
    device = default_device(gang.context)
    torch.cuda.set_device(device)
    return _torch_calls("nccl", gang, device, timeout_s)


def open_mpi(gang: Gang, timeout_s: int) -> Contender:
    """The MPI library itself, through mpi4py, on CPU memory."""
    _check_starter("mpi", gang.context)
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise missing_package("mpi4py", "mpi", "the back end mpi") from error
    world = MPI.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != (gang.context.rank, gang.context.world_size):
        raise ConfigError(
            f"{gang.context.starter} says that this is rank {gang.context.rank} of {gang.context.world_size}, MPI says {world.Get_rank()} of "
            f"{world.Get_size()}: its process manager does not fit this MPI (Slurm: MpiDefault=pmix); a machine with starter = 'mpirun' does"
        )
    split = {
        "world": world,
        "node": world.Split(gang.context.node_rank, gang.context.rank),
        "between": world.Split(gang.context.local_rank, gang.context.rank),
    }
    buffer = functools.cache(lambda purpose, numbers: np.zeros(numbers, np.float32))

    def prepare(collective: str, scope: str, numbers: int) -> Call:
        comm, size = split[scope], len(gang.members[scope])
        whole, part = buffer("whole", numbers), buffer("part", numbers // size)
        calls: dict[str, Call] = {
            "all_reduce": lambda: comm.Allreduce(MPI.IN_PLACE, whole),
            "reduce_scatter": lambda: comm.Reduce_scatter_block(whole, part),
            "all_gather": lambda: comm.Allgather(part, whole),
        }
        return calls[collective]

    def close() -> None:
        if not MPI.Is_finalized():
            MPI.Finalize()  # the rank ends without Python's shutdown, which would do it

    return Contender("mpi", prepare, tuple(gang.members), close)


def open_horovod(gang: Gang, timeout_s: int) -> Contender:
    """Horovod on its MPI controller, all ranks; it has no groups of its own here."""
    from ..comm_horovod import open_horovod as join

    _check_starter("horovod", gang.context)
    joined = join(Parallel(comm="horovod", timeout_s=timeout_s), gang.context, run_dir=None, device=torch.device("cpu"))
    import horovod.torch as hvd

    buffer = functools.cache(lambda purpose, numbers: torch.zeros(numbers))

    def prepare(collective: str, scope: str, numbers: int) -> Call:
        whole, part = buffer("whole", numbers), buffer("part", numbers // gang.context.world_size)
        name = f"{collective}.{numbers}"
        calls: dict[str, Callable[[], int]] = {
            "all_reduce": lambda: hvd.allreduce_async_(whole, op=hvd.Sum, name=name),
            "reduce_scatter": lambda: hvd.reducescatter_async(whole, op=hvd.Sum, name=name),
            "all_gather": lambda: hvd.allgather_async(part, name=name),
        }

        def call() -> None:
            joined.wait(calls[collective](), collective)

        return call

    return Contender("horovod", prepare, ("world",), joined.close)


def _check_starter(backend: str, context: RankContext) -> None:
    if context.starter not in MPI_STARTERS:
        raise ConfigError(
            f"{backend} takes ranks that an MPI starter began, and {context.starter!r} is none: take a machine with starter = 'mpirun' (laptop_mpi)"
        )


BACKENDS: dict[str, Callable[[Gang, int], Contender]] = {"gloo": open_gloo, "mpi": open_mpi, "horovod": open_horovod, "nccl": open_nccl}
"""Name -> what opens it. Every rank opens those that it needs in this order, and closes them in the reverse one: Horovod
uses an MPI that has been started already, and may end only one that it has started."""
