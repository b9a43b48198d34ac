"""How ranks talk: one protocol, and the back end for one rank; torch and Horovod live in `comm_torch` and `comm_horovod`.

Gradients and losses are always summed, never averaged: a loss is a sum with its count of targets, and the caller
divides by the global count, so that world size and accumulation do not change the result. What travels as an
object is JSON, never a pickle. A peer that is gone or hangs ends a collective with RankLostError within
``parallel.timeout_s``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .errors import ConfigError, NumericsError
from .rank import RankContext
from .recipe_parallel import Parallel
from .stage import find

Json = Any
"""What json.dumps takes: None, bool, int, float, str, and lists and dicts of them."""


class ParallelModel(Protocol):
    """A model whose gradients are summed over the ranks.

    A step is: `zero_gradients()`; for every micro batch but the last `with no_sync(): backward(module(batch).loss)`;
    for the last `backward(module(batch).loss)`; `finish_gradients()`.
    """

    @property
    def module(self) -> nn.Module:
        """Call this with a Batch to get a LossSum; the bare module that was given shares its parameters."""

    def no_sync(self) -> AbstractContextManager[None]:
        """Forward and backward in here only add to this rank's gradients."""

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()`, where the death of a peer is a RankLostError."""

    def finish_gradients(self) -> None:
        """After the last backward of a step: `.grad` is the sum over ranks, the same bits on every rank."""

    def zero_gradients(self) -> None:
        """Set all gradients to zero and keep their memory, which the back end may share with its buckets."""

    def forget(self) -> None:
        """Drop what earlier steps have left for later ones (compression may leave something), so that the next is as the first of a start."""


class Comm(Protocol):
    """The ranks of a gang. Every rank calls the same methods in the same order."""

    @property
    def name(self) -> str:
        """Which back end this is."""

    @property
    def rank(self) -> int:
        """0 to world_size - 1."""

    @property
    def world_size(self) -> int:
        """How many ranks there are."""

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks as a new tensor on the same device, the same bits on every rank. float32, float64 or int64."""

    def barrier(self) -> None:
        """Return when every rank has come here."""

    def broadcast_object(self, value: Json) -> Json:
        """Rank 0's value, on every rank; what the others give is ignored."""

    def all_gather_object(self, value: Json) -> list[Json]:
        """Every rank's value, by rank."""

    def parallel(self, module: nn.Module, bucket_mib: int) -> ParallelModel:
        """Copy rank 0's parameters to every rank and sum gradients in buckets, overlapped with the backward pass."""

    def close(self) -> None:
        """Leave the gang. Never waits for other ranks."""


class SoloModel:
    """One rank: its gradients are the sum already."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Nothing to hold back."""
        yield

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients."""
        loss.backward()  # type: ignore[no-untyped-call]

    def finish_gradients(self) -> None:
        """Nothing to wait for."""

    def zero_gradients(self) -> None:
        """Forget the gradients; the next backward pass makes them afresh."""
        self.module.zero_grad(set_to_none=True)

    def forget(self) -> None:
        """Nothing is left from step to step."""


class Solo:
    """The gang of one rank."""

    name = "solo"
    rank = 0
    world_size = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """A copy."""
        return tensor.clone()

    def barrier(self) -> None:
        """Return at once."""

    def broadcast_object(self, value: Json) -> Json:
        """The value as it would arrive elsewhere: through JSON."""
        return decode(encode(value))

    def all_gather_object(self, value: Json) -> list[Json]:
        """A list of the one value."""
        return [decode(encode(value))]

    def parallel(self, module: nn.Module, bucket_mib: int) -> ParallelModel:
        """The module as it is."""
        return SoloModel(module)

    def close(self) -> None:
        """Nothing to leave."""


COMMS = {
    "torch": "prottrans_hpc.comm_torch:open_torch",
    "horovod": "prottrans_hpc.comm_horovod:open_horovod",
}


def open_comm(parallel: Parallel, context: RankContext, *, run_dir: Path | None = None, device: torch.device | None = None) -> Comm:
    """Join the gang that `context` is a place in; one rank needs no back end.

    `run_dir` is where ranks meet when their starter sets no MASTER_ADDR. `device` None takes this rank's GPU where
    there is one. Raises ConfigError, ResourceError (a missing package, a taken port) or RankLostError.
    """
    place = device or default_device(context)
    if context.world_size == 1:
        return Solo(place)
    opener: Callable[..., Comm] = find(COMMS[parallel.comm])
    return opener(parallel, context, run_dir=run_dir, device=place)


def default_device(context: RankContext) -> torch.device:
    """This rank's GPU, or the CPU. A starter may show a rank its own GPU only, or all GPUs of the node."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", context.local_rank % torch.cuda.device_count())


def encode(value: Json) -> bytes:
    """An object as it travels."""
    return json.dumps(value, separators=(",", ":")).encode()


def decode(content: bytes) -> Json:
    """The object that travelled."""
    return json.loads(content)


def check_same(comm: Comm, what: str, digest: bytes) -> None:
    """Raise NumericsError, on every rank, when the ranks do not hold the same digest; the odd ones out are named.

    Costs one all-reduce of a few hundred bytes: equal numbers are those whose variance over the ranks is zero,
    which is exact here because 16-bit pieces and their squares keep their sums far below 2^53.
    """
    pieces = torch.tensor([int.from_bytes(digest[i : i + 2], "big") for i in range(0, len(digest), 2)], dtype=torch.float64)
    sums = [int(value) for value in comm.all_reduce_sum(torch.cat((pieces, pieces * pieces))).tolist()]
    half = len(sums) // 2
    if all(comm.world_size * square == total * total for total, square in zip(sums[:half], sums[half:], strict=True)):
        return
    digests = [str(text) for text in comm.all_gather_object(digest.hex())]
    usual = max(digests, key=digests.count)
    odd = [rank for rank, text in enumerate(digests) if text != usual]
    raise NumericsError(f"{what} differ between the ranks: rank {', '.join(map(str, odd[:8]))} of {comm.world_size} disagree with the others")


def parameter_digest(module: nn.Module) -> bytes:
    """SHA-256 over the names and bits of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.digest()


def require_nonce(environment: Mapping[str, str] = os.environ) -> str:
    """A name that all ranks of this start share and no other start has. Raises ConfigError where nothing gives one."""
    for names in NONCES:
        if all(name in environment for name in names):
            return "-".join(environment[name] for name in names)
    raise ConfigError("the ranks cannot tell this start from another one: set PROTTRANS_NONCE to the same random word for all of them")


NONCES = (
    ("PROTTRANS_NONCE",),
    ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
    # PMIx servers (Open MPI's mpirun, jsrun, srun --mpi=pmix) name each start of a program.
    ("PMIX_NAMESPACE",),
    ("SLURM_JOB_ID", "SLURM_STEP_ID"),
)
"""Variables that name a start, the best first."""
