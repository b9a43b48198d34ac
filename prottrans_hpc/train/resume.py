"""Going back to a checkpoint: whether it belongs to this run, and putting its state in place."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from .. import config, recipe, timestamp
from ..comm import Comm
from ..corpus.lanes import own_lanes
from ..corpus.order import SamplePosition, position_from_json
from ..errors import CheckpointError, IdentityError
from ..stage import find
from . import ancestor, checkpoint, environment
from .checkpoint import Checkpoint
from .precision import put_weights
from .saving import LaneTensors
from .schedule import phase_of
from .session import Progress, Session
from .starting_weights import put_starting_weights

_log = logging.getLogger(__name__)


def identity(session: Session) -> dict[str, Any]:
    """What must not change between the starts of a run."""
    return {
        "run_id": session.run.run_id,
        "science": recipe.science(session.run.recipe),
        "corpus_sha256": session.run.corpus_sha256,
        "architecture": checkpoint.describe_architecture(session.record, session.shape),
    }


def training_state(session: Session) -> dict[str, Any]:
    """The content of state.json, but for the files."""
    progress = session.progress
    return {
        "format": checkpoint.FORMAT,
        "run_id": session.run.run_id,
        "step": progress.step,
        "samples": progress.samples,
        "position": progress.position.to_json(),
        "random_numbers": "none to save: all are functions of the seed, the step, the rank and the sample",
        "time": timestamp.now(),
        "world_size": session.comm.world_size,
        "loss_scale": session.loss_scale.to_json() if session.loss_scale else None,
        "divergence": session.divergence.to_json(),
        "versions": environment.versions(),
        "identity": identity(session),
        **({"init": vars(session.run.init)} if session.run.init else {}),
    }


def tensors_of(session: Session) -> dict[str, dict[str, torch.Tensor]]:
    """Everything with many numbers: one copy of the model and of the optimizer's state."""
    return {"model": {**session.module.state_dict(), **session.masters}, "optimizer": dict(session.optimizer.state_dict())}


def memory_of(session: Session) -> LaneTensors | None:
    """What this rank remembers of its lanes; None without lanes, and where the recipe does not have it saved. The same choice on all ranks."""
    if not session.record.lanes or session.run.recipe.checkpoint.lane_memory == "dropped":
        return None
    num_lanes = _num_lanes(session, session.progress.step - 1)
    num_shares = session.layout.num_data_ranks
    tensors = session.memory.tensors(own_lanes(num_lanes, session.data_rank, num_shares).start)
    return LaneTensors(num_lanes, num_shares, tensors) if tensors else None


def _num_lanes(session: Session, step: int) -> int:
    return phase_of(session.run.recipe, step)[1].global_batch_size or 0


def restore(session: Session, *, multiple_of: int = 1) -> str | None:
    """Take up the newest intact checkpoint, or the starting weights when there is none. Collective.

    Those of steps that are no multiple of `multiple_of` are left out, unless there are no others.
    Returns the checkpoint's name. Raises CheckpointError (none is intact) or IdentityError (it is not of this run).
    """
    steps = session.comm.broadcast_object(session.run_dir.checkpoint_steps()[::-1])
    steps = [step for step in steps if step % multiple_of == 0] or steps
    own = functools.partial(own_lanes, rank=session.data_rank, world_size=session.layout.num_data_ranks)
    found = checkpoint.read_newest(session.run_dir, steps, agreement(session.comm), lanes_of=own, own=tensors_of(session))
    if found is None:
        _begin(session)
    else:
        check_identity(found, identity(session))
        _apply(session, found)
    # What compression left out of steps that are undone must not come back: a return within a process is one in a new process.
    session.model.forget()
    session.last_saved = session.progress.step
    session.node_timings.begin_at(session.progress.step)
    if session.records is not None:
        session.records.begin_at(session.progress.step)
    return found.path.name if found else None


def agreement(comm: Comm) -> checkpoint.Agree:
    """A function that tells whether a value is true on all ranks."""

    def all_true(value: bool) -> bool:
        return not comm.all_reduce_sum(torch.tensor([0.0 if value else 1.0], dtype=torch.float64)).item()

    return all_true


def check_identity(found: Checkpoint, expected: dict[str, Any]) -> None:
    """Raise IdentityError listing every field in which a checkpoint is not of this run; log other versions."""
    differences = config.differences(found.state["identity"], expected)
    if differences:
        listed = "; ".join(differences)
        raise IdentityError(
            f"the checkpoint {found.path} is not of this run; these differ (checkpoint -> now): {listed}. Put them back, or train in a new --run-dir"
        )
    for line in config.differences(found.state.get("versions", {}), environment.versions()):
        _log.warning("another version than the checkpoint was written with, so the last bits may differ: %s", line)


@torch.no_grad()
def _apply(session: Session, found: Checkpoint) -> None:
    try:
        put_weights(session.module, session.masters, found.model)
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {found.path} do not fit the model: {error}") from error
    session.optimizer.load_state_dict(found.optimizer)
    if session.loss_scale:
        session.loss_scale.take(found.state["loss_scale"])
    session.divergence.take(found.state.get("divergence"))
    session.progress = Progress(found.step, position_from_json(found.state["position"]), int(found.state["samples"]))
    session.memory.forget()
    if found.memory is not None:
        session.memory.restore(*found.memory)
    elif session.record.lanes and session.progress.position.consumed:
        _log.warning("%s holds no memory of the lanes: they go on with an empty one, so the next steps are not those of an unbroken run", found.path.name)


@torch.no_grad()
def _begin(session: Session) -> None:
    """The state before the first step; the starting weights are there already unless non-finite numbers led back here."""
    if session.progress.step:
        _draw_again(session)
        forget_moments(session)
        if session.loss_scale:
            session.loss_scale.take(None)
        session.divergence.take(None)
    session.memory.forget()
    session.progress = Progress(0, SamplePosition(), 0)
    if session.run.init is not None:
        ancestor.take_weights(session, session.run.init, agreement(session.comm), own=tensors_of(session))


def _draw_again(session: Session) -> None:
    seed = session.run.recipe.seed
    if not session.layout.is_plain:
        put_starting_weights(session.module, session.masters, session.record, session.shape, seed)
        return
    fresh = find(session.record.build)(session.shape)  # drawn in fp32, whatever the weights are held in
    fresh.initialise(seed)
    put_weights(session.module, session.masters, fresh.state_dict())


def forget_moments(session: Session) -> None:
    """The optimizer's state before its first update, moments and number of updates."""
    session.optimizer.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in session.optimizer.state_dict().items()})
