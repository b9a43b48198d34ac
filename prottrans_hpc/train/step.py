"""One optimizer step: forward and backward over the micro batches, the status all-reduce, the update."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..architecture import Batch
from . import preemption
from .loader import LoadedStep
from .optim import measure_gradients
from .schedule import learning_rate
from .session import Session

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Status:
    """What every rank tells in the one all-reduce of a step; afterwards the sums, the same bits on every rank."""

    stop: float
    """Ranks that got a signal to stop."""
    loss: float
    """Nats."""
    num_correct: float
    num_targets: float
    num_residues: float
    num_tokens: float
    flops: float

    @property
    def mean_loss(self) -> float:
        """Nats a target."""
        return self.loss / max(self.num_targets, 1.0)


@dataclass(frozen=True)
class StepResult:
    """How a step went, equal on all ranks."""

    status: Status
    learning_rate: float
    gradient_norm: float
    is_finite: bool
    """Whether the update was made; when not, the step only consumed its samples."""


def take_step(session: Session, loaded: LoadedStep) -> StepResult:
    """Take one step on this rank, together with all others. Raises, on all ranks, when a save in the background failed."""
    torch.manual_seed(step_seed(session.run.recipe.seed, step=loaded.step, rank=session.comm.rank))
    session.model.zero_gradients()
    losses, num_correct = _forward_backward(session, loaded)
    status = _exchange(session, loaded, losses, num_correct)
    # The loss is a sum; dividing by the global count here makes the result independent of ranks and accumulation.
    scale = measure_gradients(session.module.parameters(), scale=1.0 / max(status.num_targets, 1.0), max_norm=session.run.recipe.optimizer.clip_norm)
    rate = learning_rate(session.run.recipe, loaded.step)
    is_finite = math.isfinite(status.loss) and scale.is_finite
    if is_finite:
        session.optimizer.step(rate, scale.factor)
    else:
        _tell_non_finite(session, loaded, losses)
    return StepResult(status, rate, scale.norm, is_finite)


def step_seed(seed: int, *, step: int, rank: int) -> int:
    """The seed of the random numbers that a model draws itself (dropout): nothing of it needs to be saved."""
    return int.from_bytes(hashlib.blake2b(f"model {seed} {step} {rank}".encode(), digest_size=8).digest(), "big") >> 1


def _forward_backward(session: Session, loaded: LoadedStep) -> tuple[Tensor, Tensor]:
    """Gradients summed over micro batches and ranks; the loss of each micro batch, and the correct targets, stay on the device."""
    losses: list[Tensor] = []
    num_correct: list[Tensor] = []
    last = len(loaded.micro_batches) - 1
    for index, batch in enumerate(on_device(loaded.micro_batches, session.comm.device)):
        if index < last:
            with session.model.no_sync():
                _one(session, batch, losses, num_correct)
        else:
            _one(session, batch, losses, num_correct)
    session.model.finish_gradients()
    return torch.stack(losses), torch.stack(num_correct).sum()


def _one(session: Session, batch: Batch, losses: list[Tensor], num_correct: list[Tensor]) -> None:
    with session.forward():
        result = session.model.module(batch)
    session.model.backward(result.loss)
    losses.append(result.loss.detach().double())
    num_correct.append(result.num_correct.detach().double())


def on_device(batches: tuple[Batch, ...], device: torch.device) -> Iterator[Batch]:
    """The batches with their tensors on the device; from pinned memory the copies run beside its work."""
    for batch in batches:
        if device.type == "cpu":
            yield batch
        else:
            tensors: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in vars(batch).items() if isinstance(value, Tensor)}
            yield replace(batch, **tensors)


def _exchange(session: Session, loaded: LoadedStep, losses: Tensor, num_correct: Tensor) -> Status:
    loss, correct = torch.stack((losses.sum(), num_correct)).tolist()  # waits for the device
    flops = session.record.flops(session.shape, loaded.lengths.tolist()) if session.peak_flops else 0.0
    own = (float(preemption.requested()), loss, correct, float(loaded.num_targets), float(loaded.num_residues), float(loaded.num_tokens), flops)
    summed = session.comm.all_reduce_sum(torch.tensor([*own, *session.saver.report()], dtype=torch.float64)).tolist()
    session.saver.receive(summed[len(own) :])
    return Status(*summed[: len(own)])


def _tell_non_finite(session: Session, loaded: LoadedStep, losses: Tensor) -> None:
    """Log which samples were in the step; the rank that met the number says in which micro batch."""
    where = f"step {loaded.step + 1}, rank {session.comm.rank}"
    bad = [batch for batch, loss in zip(loaded.micro_batches, losses.tolist(), strict=True) if not math.isfinite(loss)]
    for batch in bad:
        _log_ids(f"non-finite loss in {where}, in a micro batch of the samples", batch.sample_ids.tolist())
    if session.comm.rank == 0:
        _log_ids(f"the loss or a gradient of step {loaded.step + 1} is not finite; all ranks skip it. It had the samples", loaded.sample_ids.tolist())


def _log_ids(message: str, ids: list[int]) -> None:
    for start in range(0, len(ids), 300):  # a log line holds about 4,000 characters
        _log.warning("%s %s", message, " ".join(map(str, ids[start : start + 300])))
