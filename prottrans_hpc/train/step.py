"""One optimizer step: forward and backward over the micro batches, the status all-reduce, the update."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from .. import whereabouts
from ..architecture import Batch, LossSum
from . import preemption
from .loader import LoadedStep
from .optim import measure_gradients
from .schedule import learning_rate
from .session import Session
from .timing import compute_s

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
    parts: tuple[float, ...] = ()
    """Sums of the addends of the loss that the architecture names, nats."""
    lane_sums: tuple[float, ...] = ()
    """With lanes, the fields of `loader.LaneSums` over all ranks."""
    ledger: tuple[float, ...] = ()
    """Seconds of each of `timing.PARTS`, mean over the ranks."""

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
    loss_scale: float | None = None
    """That the gradients were computed with, in fp16."""
    has_overflowed: bool = False
    """Not finite, and a smaller scale of the loss is expected to help: nothing to worry about."""
    own_losses: tuple[float, ...] = ()
    """Of a step that was skipped: of this rank's micro batches, nats; not equal on all ranks."""


def take_step(session: Session, loaded: LoadedStep) -> StepResult:
    """Take one step on this rank, together with all others. Raises, on all ranks, when a save in the background failed."""
    torch.manual_seed(step_seed(session.run.recipe.seed, step=loaded.step, rank=session.data_rank))
    session.model.zero_gradients()
    scaling = session.loss_scale
    multiplier = scaling.multiplier(session.run.recipe.phases[loaded.phase]) if scaling else 1.0
    losses, num_correct, parts = _forward_backward(session, loaded, multiplier)
    status = _exchange(session, loaded, losses, torch.cat((num_correct[None], parts)))
    # The loss is a sum; dividing by the global count here makes the result independent of ranks and accumulation.
    inverse = 1.0 / (multiplier * max(status.num_targets, 1.0))
    with session.timing.part("optimizer"):
        scale = measure_gradients(
            session.module.parameters(),
            scale=inverse,
            max_norm=session.run.recipe.optimizer.clip_norm,
            sum_over_ranks=session.timing.timed("exposed_comm", session.comm.all_reduce_sum),
        )
    rate = learning_rate(session.run.recipe, loaded.step) * session.divergence.rate_factor
    is_finite = math.isfinite(status.loss) and scale.is_finite
    loss_scale, has_overflowed = scaling.value if scaling else None, False
    if is_finite:
        with session.timing.part("optimizer"):
            session.optimizer.step(rate, scale.factor)
        if scaling:
            scaling.grow()
    else:
        if not math.isfinite(status.loss):
            session.memory.forget()
        has_overflowed = scaling is not None and math.isfinite(status.loss) and scaling.back_off()
        _tell_skipped(session, loaded, losses, has_overflowed=has_overflowed)
    own_losses = () if is_finite else tuple(losses.tolist())
    return StepResult(status, rate, scale.norm, is_finite, loss_scale, has_overflowed, own_losses)


def step_seed(seed: int, *, step: int, rank: int) -> int:
    """The seed of the random numbers that a model draws itself (dropout): nothing of it needs to be saved."""
    return int.from_bytes(hashlib.blake2b(f"model {seed} {step} {rank}".encode(), digest_size=8).digest(), "big") >> 1


def _forward_backward(session: Session, loaded: LoadedStep, multiplier: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients times `multiplier`, summed over micro batches and ranks; the loss of each micro batch, the correct targets and the sums of
    the loss's parts stay on the device."""
    if loaded.begins_lanes:
        session.memory.forget()
    losses: list[Tensor] = []
    sums = torch.zeros(1 + len(session.record.loss_parts), dtype=torch.float64, device=session.comm.device)
    batches = with_token_counts(session, loaded.micro_batches)
    last = len(batches) - 1
    for index, batch in enumerate(on_device(batches, session.comm.device)):
        with session.model.no_sync() if index < last else contextlib.nullcontext():
            losses.append(_one(session, session.memory.put_into(batch, index), sums, multiplier, index))
    with session.timing.part("exposed_comm"):
        session.model.finish_gradients()
    return torch.stack(losses), sums[0], sums[1:]


def _one(session: Session, batch: Batch, sums: Tensor, multiplier: float, index: int) -> Tensor:
    with session.timing.part("forward"), session.forward():
        result: LossSum = session.model.module(batch)
    with session.timing.part("backward"):
        session.model.backward(result.loss if multiplier == 1.0 else result.loss * multiplier)
    sums += counted(result)
    session.memory.take(index, result.memory)
    whereabouts.moved()
    loss: Tensor = result.loss.detach().double()
    return loss


def counted(result: LossSum) -> Tensor:
    """What a batch adds to the correct targets and to the sums of the loss's parts, fp64 [1 + parts]."""
    num_correct: Tensor = result.num_correct.detach().double()[None]
    return num_correct if result.parts is None else torch.cat((num_correct, result.parts.double()))


def with_token_counts(session: Session, batches: tuple[Batch, ...]) -> tuple[Batch, ...]:
    """The batches, told how many tokens the step has a target over all ranks where the model's loss needs that. Collective then."""
    if not session.record.counts_tokens:
        return batches
    own = torch.tensor([sum(len(batch.tokens) for batch in batches), sum(len(batch.targets) for batch in batches)], dtype=torch.float64)
    with session.timing.part("exposed_comm"):
        num_tokens, num_targets = session.comm.all_reduce_sum(own).tolist()
    return tuple(replace(batch, tokens_per_target=num_tokens / max(num_targets, 1.0)) for batch in batches)


def means_of_parts(session: Session, sums: Sequence[float], num_targets: float, *, is_finite: bool = True) -> dict[str, float | None]:
    """The addends of the loss by name, each a mean."""
    return {name: total / max(num_targets, 1.0) if is_finite else None for name, total in zip(session.record.loss_parts, sums, strict=True)}


def on_device(batches: tuple[Batch, ...], device: torch.device) -> Iterator[Batch]:
    """The batches with their tensors on the device; from pinned memory the copies run beside its work."""
    for batch in batches:
        if device.type == "cpu":
            yield batch
        else:
            tensors: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in vars(batch).items() if isinstance(value, Tensor)}
            yield replace(batch, **tensors)


def _exchange(session: Session, loaded: LoadedStep, losses: Tensor, sums: Tensor) -> Status:
    session.timing.end_lap()
    with whereabouts.inside("the work of the device"):  # which may wait for other ranks' gradients
        loss, correct, *parts = torch.cat((losses.sum()[None], sums)).tolist()
    ledger = session.timing.read()
    flops = session.record.flops(session.shape, loaded.lengths.tolist()) if session.peak_flops else 0.0
    own = (float(preemption.requested()), loss, correct, float(loaded.num_targets), float(loaded.num_residues), float(loaded.num_tokens), flops, *parts)
    lane_sums = tuple(map(float, astuple(loaded.lane_sums))) if loaded.lane_sums else ()
    own += lane_sums
    if not session.counts:
        own = (own[0], *(0.0 for _ in own[1:]))
    session.stragglers.add(compute_s(ledger), loaded.num_tokens)
    session.node_timings.put(loaded.step + 1, ledger)
    addends = (own, session.stragglers.report(loaded.step + 1), session.saver.report(), (1.0, *ledger))
    with session.timing.part("exposed_comm"):
        summed = iter(session.comm.all_reduce_sum(torch.tensor(list(chain(*addends)), dtype=torch.float64)).tolist())
    status, paces, saves, (num_ledgers, *seconds) = ([*islice(summed, len(each))] for each in addends)
    session.stragglers.receive(paces)
    session.saver.receive(saves)
    session.node_timings.write(loaded.step + 1)
    num_plain = len(own) - len(parts) - len(lane_sums)
    added = status[num_plain:]
    means = tuple(value / num_ledgers for value in seconds)
    return replace(Status(*status[:num_plain]), parts=tuple(added[: len(parts)]), lane_sums=tuple(added[len(parts) :]), ledger=means)


def _tell_skipped(session: Session, loaded: LoadedStep, losses: Tensor, *, has_overflowed: bool) -> None:
    """Log which samples were in the step; the rank that met the number says in which micro batch."""
    if has_overflowed:
        if session.comm.rank == 0 and session.loss_scale:
            _log.info("gradients of step %d overflow fp16: the step is skipped, the loss scale is now %g", loaded.step + 1, session.loss_scale.value)
        return
    where = f"step {loaded.step + 1}, rank {session.comm.rank}"
    bad = [batch for batch, loss in zip(loaded.micro_batches, losses.tolist(), strict=True) if not math.isfinite(loss)]
    for batch in bad:
        _log_ids(f"non-finite loss in {where}, in a micro batch of the samples", batch.sample_ids.tolist())
    if session.comm.rank == 0:
        _log_ids(f"the loss or a gradient of step {loaded.step + 1} is not finite; all ranks skip it. It had the samples", loaded.sample_ids.tolist())


def _log_ids(message: str, ids: list[int]) -> None:
    for start in range(0, len(ids), 300):  # a log line holds about 4,000 characters
        _log.warning("%s %s", message, " ".join(map(str, ids[start : start + 300])))
