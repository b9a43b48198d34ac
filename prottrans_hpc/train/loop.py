"""The training loop, in one place, in the order in which things happen."""

from __future__ import annotations

import enum
import hashlib
import logging
import resource
import time
from collections.abc import Callable
from typing import Any

import torch

from .. import whereabouts
from ..errors import NumericsError, RequeueRequested
from . import attribution, health, preemption, resume, retention
from .loader import LoadedStep, Loader
from .schedule import phase_of
from .session import Progress, Session
from .step import StepResult, means_of_parts, take_step
from .timing import Clock, by_name
from .validation import Validator, perplexity

_log = logging.getLogger(__name__)


class Ending(enum.Enum):
    """Why a stretch of steps ended."""

    DONE = enum.auto()
    STOP_REQUESTED = enum.auto()
    NOT_FINITE = enum.auto()
    DIVERGED = enum.auto()


def train(session: Session) -> None:
    """Take the steps that are left. Raises RequeueRequested (a signal; the state is saved) or NumericsError."""
    if _told_to_stop(session):
        raise RequeueRequested(_stop_message(session))
    validator = Validator(session)
    validator.catch_up()
    while True:
        with session.open_loader() as loader:
            ending = _take_steps(session, loader, validator)
        if ending not in _WAYS_BACK:
            break
        with whereabouts.patiently("going back to a checkpoint"):
            _WAYS_BACK[ending](session)
    with whereabouts.patiently("the last save"):
        session.saver.drain()
    if ending is Ending.STOP_REQUESTED:
        raise RequeueRequested(_stop_message(session))


def _take_steps(session: Session, loader: Loader, validator: Validator) -> Ending:
    skipped_in_a_row, clock, first_step, last_step = 0, Clock(), session.progress.step, session.run.last_step
    session.timing.begin()
    for loaded in session.timing.waits_for(loader):
        _enter_phase(session, loaded)
        whereabouts.step_begins(loaded.step + 1, is_first=loaded.step == first_step)
        result = take_step(session, loaded)
        clock.step_taken(data_wait_s=loader.wait_s)
        health.tell_slow_nodes(session, step=loaded.step + 1)
        session.progress = Progress(loaded.step + 1, loaded.position_after, session.progress.samples + _samples_of(loaded, result)[0])
        if not (result.is_finite or result.has_overflowed):
            attribution.explain(session, loaded, result.own_losses)
        if not result.has_overflowed:
            skipped_in_a_row = 0 if result.is_finite else skipped_in_a_row + 1
        step, ends, stops = session.progress.step, session.progress.step == last_step, result.status.stop > 0
        if skipped_in_a_row >= session.run.recipe.non_finite_limit or (ends and skipped_in_a_row):
            return Ending.NOT_FINITE
        if result.is_finite and _is_diverging(session, result):
            return Ending.DIVERGED
        if validator.is_due(step) and (ends or not stops):
            with clock.apart(), session.timing.part(None):
                _tell_validation(validator.measure())
        # While steps are being skipped, or a spike may begin, the last state that is known to be good is on disk: leave it the newest one.
        saves = (ends or stops or (_save_is_due(session) and not session.divergence.is_suspicious)) and not skipped_in_a_row
        if saves:
            with session.timing.part("checkpoint"):
                clock.checkpoint_s = _stage(session)
        _record(session, loaded, result, clock)
        if saves:
            with session.timing.part("checkpoint"):
                session.saver.start()
        if ends or stops:
            return Ending.DONE if ends else Ending.STOP_REQUESTED
    return Ending.DONE


def _enter_phase(session: Session, loaded: LoadedStep) -> None:
    """At a phase's first step, drop the optimizer's moments where the recipe says so; a checkpoint of the border still holds them."""
    index, phase, done = phase_of(session.run.recipe, loaded.step)
    if index > 0 and done == 0 and phase.optimizer_state == "reset":
        resume.forget_moments(session)
        _log.info("phase %d begins after step %d with a new state of the optimizer", index, loaded.step)


def _samples_of(loaded: LoadedStep, result: StepResult) -> tuple[int, str]:
    """Samples of the whole step, and what tells which; the same on every rank and for every number of ranks."""
    if loaded.lane_sums is None:
        return len(loaded.samples), hashlib.blake2b(loaded.sample_ids.tobytes(), digest_size=8).hexdigest()
    num_samples, fingerprint = result.status.lane_sums
    return int(num_samples), f"{int(fingerprint):016x}"


def _save_is_due(session: Session) -> bool:
    every = session.run.recipe.checkpoint.every_steps
    return session.progress.step // every > session.last_saved // every


def _stage(session: Session) -> float:
    """Copy the state aside; returns for how many seconds this held training up."""
    began = time.perf_counter()
    with whereabouts.patiently("copying the checkpoint aside"):
        session.saver.stage(session.progress.step, resume.training_state(session), resume.tensors_of(session), resume.memory_of(session))
    session.last_saved = session.progress.step
    return time.perf_counter() - began


def _told_to_stop(session: Session) -> bool:
    flag = torch.tensor([float(preemption.requested())], dtype=torch.float64)
    return session.comm.all_reduce_sum(flag).item() > 0


def _go_back(session: Session) -> None:
    """Take up the last good checkpoint, once for the same trouble. Raises NumericsError the second time."""
    step = session.progress.step
    session.saver.drain()
    if session.run.recipe.schedule.decay == "exponential_rise":
        raise NumericsError(f"the sweep of the learning rate ends at step {step}, where the loss or the gradients are not finite")
    if session.failed_at is not None and session.last_saved <= session.failed_at:
        raise NumericsError(
            f"the loss or the gradients were not finite up to step {step}, and again after going back to step {session.last_saved}. "
            "The last good checkpoint is kept, the log lists the samples; a lower learning rate, a longer warm-up or precision = 'fp32' may help"
        )
    session.failed_at = step
    name = resume.restore(session)
    _log.warning("non-finite numbers up to step %d: all ranks went back to %s and try once more", step, name or "the starting weights")
    if session.records is not None:
        session.records.event("went back", step=step, to=session.progress.step, cause="non-finite loss or gradients")


def _is_diverging(session: Session, result: StepResult) -> bool:
    """Watch the loss; a spike is told, and is True where the recipe wants to go back."""
    spike = session.divergence.observe(result.status.mean_loss)
    if spike is None:
        return False
    step, action = session.progress.step, session.run.recipe.divergence.action
    _log.warning("the loss spikes at step %d: %.4f, %.1f robust deviations above the median %.4f", step, spike.loss, spike.z_score, spike.median)
    if session.records is not None:
        session.records.event("spike", step=step, loss=spike.loss, median=spike.median, z_score=round(spike.z_score, 2), action=action)
    return action == "rollback"


def _roll_back(session: Session) -> None:
    """Take up the last checkpoint from before a spike, with a lower learning rate. Raises NumericsError when that was done too often."""
    step, rate_factor, num_rollbacks = session.progress.step, session.divergence.rate_factor, session.divergence.num_rollbacks
    session.saver.drain()
    if not session.divergence.may_roll_back:
        raise NumericsError(
            f"the loss spikes again at step {step}, after {num_rollbacks} rollbacks that brought the learning rate down to {rate_factor:g} of the recipe's. "
            "`prottrans pretrain --lr-range` finds the limit; a lower optimizer.learning_rate or a longer warm-up may help"
        )
    # Where a signal stopped an earlier start there is a checkpoint that an unbroken run lacks: all must go back to the same one.
    name = resume.restore(session, multiple_of=session.run.recipe.checkpoint.every_steps)
    session.divergence.lower(rate_factor, num_rollbacks)
    factor = session.divergence.rate_factor
    _log.warning("all ranks went back to %s and go on with %g of the learning rate", name or "the starting weights", factor)
    if session.records is not None:
        retention.remove_later(session.run_dir, session.progress.step)
        session.records.event("went back", step=step, to=session.progress.step, cause="the loss spiked", rate_factor=factor)


_WAYS_BACK: dict[Ending, Callable[[Session], None]] = {Ending.NOT_FINITE: _go_back, Ending.DIVERGED: _roll_back}


def _stop_message(session: Session) -> str:
    done = f"after step {session.progress.step} of {session.run.last_step}" if session.progress.step else "before the first step"
    saved = f"the state of step {session.last_saved} is saved" if session.last_saved else "there was nothing to save yet"
    return f"stopped by a signal ({preemption.cause()}) {done}; {saved}. Run the same command again to go on"


def _record(session: Session, loaded: LoadedStep, result: StepResult, clock: Clock) -> None:
    """Rank 0: the line of metrics.jsonl, and now and then one in the log."""
    if session.records is None:
        return
    step_s = clock.lap()
    record = metrics_of(session, loaded, result) | {
        "residues_per_s": round(result.status.num_residues / step_s, 1),
        "tokens_per_s": round(result.status.num_tokens / step_s, 1),
        "mfu": result.status.flops / step_s / session.peak_flops if session.peak_flops else None,
        "step_s": round(step_s, 6),
        "data_wait_s": round(clock.data_wait_s, 6),
        "checkpoint_s": round(clock.checkpoint_s, 6),
        "ledger": by_name(result.status.ledger),
        "memory_mib": _memory_mib(session.comm.device),
    }
    session.records.step(record)
    if clock.line_is_due() or session.progress.step == session.run.last_step:
        _tell_progress(session, record)


def metrics_of(session: Session, loaded: LoadedStep, result: StepResult) -> dict[str, Any]:
    """What a step's numbers are apart from timings: the same for every run of the same recipe, corpus and world size."""
    status, is_finite = result.status, result.is_finite
    num_samples, order = _samples_of(loaded, result)
    return {
        "step": session.progress.step,
        "phase": loaded.phase,
        "epoch": loaded.position_after.epoch,
        "samples": session.progress.samples,
        "order": order,
        "loss": status.mean_loss if is_finite else None,
        "perplexity": perplexity(status.mean_loss) if is_finite else None,
        "accuracy": status.num_correct / max(status.num_targets, 1.0) if is_finite else None,
        **means_of_parts(session, status.parts, status.num_targets, is_finite=is_finite),
        "lr": result.learning_rate,
        "grad_norm": result.gradient_norm,
        "num_sequences": num_samples,
        "num_residues": int(status.num_residues),
        "num_tokens": int(status.num_tokens),
        "num_targets": int(status.num_targets),
        "skipped": not is_finite,
        **({} if result.loss_scale is None else {"loss_scale": result.loss_scale}),
    }


def _memory_mib(device: torch.device) -> float:
    """Peak of this rank: of the GPU where there is one, else resident memory."""
    if device.type == "cuda":
        # Active, not allocated: memory that copies on other streams still use cannot be had by anybody else.
        return round(int(torch.cuda.memory_stats(device).get("active_bytes.all.peak", 0)) / 2**20, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1)


def _tell_progress(session: Session, record: dict[str, Any]) -> None:
    loss = "non-finite loss, skipped" if record["skipped"] else f"loss {record['loss']:.4f}, accuracy {record['accuracy']:.3f}"
    _log.info("step %d of %d: %s, lr %.3g, %s residues/s", record["step"], session.run.last_step, loss, record["lr"], f"{record['residues_per_s']:,.0f}")


def _tell_validation(record: dict[str, Any]) -> None:
    _log.info("validation after step %d: loss %.4f, accuracy %.3f", record["step"], record["loss"], record["accuracy"])
