"""The first start of a run that goes on from another's weights: which checkpoint it is, its proof, and what is taken from it.

The choice is made once, by rank 0, and kept in init.json: a run that has to begin again, before its first checkpoint
or after non-finite numbers, begins with the same bytes or not at all.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from .. import config, durable
from ..errors import CheckpointError, DataError, ProttransError
from ..run_dir import Init, RunDir, read_run
from . import checkpoint
from .checkpoint import Agree, Checkpoint
from .precision import put_weights
from .session import Session

_log = logging.getLogger(__name__)


@torch.no_grad()
def take_weights(session: Session, init: Init, agree: Agree, *, own: checkpoint.Owned) -> None:
    """Put the ancestor's weights, and its optimizer's state where the run wants that, in place of `own`. Collective; raises CheckpointError."""
    chosen = session.comm.broadcast_object(_choose(session.run_dir, init) if session.comm.rank == 0 else None)
    if "error" in chosen:
        raise CheckpointError(str(chosen["error"]))
    path, found, fault = Path(chosen["checkpoint"]), None, "another rank cannot read it"
    try:
        found = _read(path, chosen["manifest_sha256"], optimizer=init.optimizer, own=own)
    except (CheckpointError, OSError) as error:
        fault = str(error)
    if not agree(found is not None) or found is None:
        raise CheckpointError(f"the checkpoint {path}, whose weights this run is to begin with, cannot be used: {fault}")
    _put(session, init, found)
    _log.info("beginning with the weights of %s%s", path, " and its optimizer's state" if init.optimizer else "")
    if session.comm.rank == 0:
        durable.write_json(session.run_dir.init_json, {**chosen, "optimizer": init.optimizer, "run_id": found.state["run_id"], "step": found.step})


def _choose(run_dir: RunDir, init: Init) -> dict[str, Any]:
    """The checkpoint and the digest of its manifest, or the error that all ranks are to raise."""
    try:
        if run_dir.init_json.is_file():
            values = durable.read_json(run_dir.init_json)
            return {"checkpoint": str(values["checkpoint"]), "manifest_sha256": str(values["manifest_sha256"])}
        if init.checkpoint is not None:
            return {"checkpoint": init.checkpoint, "manifest_sha256": init.manifest_sha256}
        path = _last_of(RunDir(Path(init.asked)))
        return {"checkpoint": str(path), "manifest_sha256": durable.sha256_of(path / durable.MANIFEST)}
    except (ProttransError, OSError, KeyError, TypeError) as error:
        return {"error": f"this run is to begin with the weights of {init.asked}: {error}"}


def _last_of(source: RunDir) -> Path:
    """The last checkpoint of a run that must be done by now: the job before this one may have failed."""
    run, newest = read_run(source), max(source.checkpoint_steps(), default=0)
    if newest < run.last_step:
        raise CheckpointError(f"that run has step {newest} of {run.last_step}; finish it, then start this one again")
    return source.checkpoint(newest)


def _read(path: Path, manifest_sha256: str | None, *, optimizer: bool, own: checkpoint.Owned | None = None) -> Checkpoint:
    try:
        digest = durable.sha256_of(path / durable.MANIFEST)
    except FileNotFoundError as error:
        raise CheckpointError("it is gone") from error
    if digest != manifest_sha256:
        raise CheckpointError(f"it has changed: its manifest had SHA-256 {manifest_sha256}, it now has {digest}")
    return checkpoint.read_checkpoint(path, kinds=("model", "optimizer") if optimizer else ("model",), own=own)


def _put(session: Session, init: Init, found: Checkpoint) -> None:
    own = checkpoint.describe_architecture(session.record, session.shape)
    described = found.state["identity"]["architecture"]
    different = config.differences({key: described[key] for key in ("name", "vocabulary")}, {key: own[key] for key in ("name", "vocabulary")})
    try:
        if different:
            raise DataError("; ".join(different))
        put_weights(session.module, session.masters, found.model)
        if init.optimizer:
            session.optimizer.load_state_dict(found.optimizer)
    except (RuntimeError, DataError, CheckpointError) as error:
        raise CheckpointError(f"the checkpoint {found.path} does not fit this run's model: {error}") from error
