"""Which checkpoints stay, and how the others, and what killed saves left, are removed."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from .. import durable, errors
from ..recipe import Checkpointing
from ..run_dir import RunDir

_log = logging.getLogger(__name__)


def replace_folder(temporary: Path, final: Path) -> None:
    """Rename a sealed folder into place; one already there can only be a damaged checkpoint that the start skipped."""
    if final.exists():
        _log.warning("replacing the damaged checkpoint %s", final)
        durable.remove_folder(final)
    durable.rename_into_place(temporary, final)


def steps_to_keep(steps: list[int], policy: Checkpointing, *, newest: int) -> set[int]:
    """Which of the checkpointed steps stay once `newest` is saved. Later ones are damaged; their own save replaces them."""
    older = sorted(step for step in steps if step <= newest)
    for_ever = {step for step in older if policy.keep_every_steps and step % policy.keep_every_steps == 0}
    return set(older[-max(1, policy.keep_last) :]) | for_ever | {step for step in steps if step > newest}


def prune(run_dir: RunDir, policy: Checkpointing, *, newest: int) -> None:
    """Remove the checkpoints that the policy does not keep; what cannot be removed is a warning, not a failure."""
    steps = run_dir.checkpoint_steps()
    for step in sorted(set(steps) - steps_to_keep(steps, policy, newest=newest)):
        try:
            durable.remove_folder(run_dir.checkpoint(step))
        except OSError as error:
            _log.warning("the old checkpoint of step %d stays: %s", step, errors.explain(error))


def remove_later(run_dir: RunDir, step: int) -> None:
    """Rank 0 after a rollback: remove what was saved after the step that the run went back to."""
    for later in [other for other in run_dir.checkpoint_steps() if other > step]:
        durable.remove_folder(run_dir.checkpoint(later))


def remove_leftovers(run_dir: RunDir) -> list[str]:
    """Rank 0 at a start: remove what killed saves of this run left. Such names are never read, so no reader is disturbed."""
    ours = tuple(f".{path.name}." for path in (run_dir.metrics, run_dir.validation, run_dir.environment_json))
    found = [path for path in run_dir.checkpoints.iterdir() if durable.is_temporary(path)]
    found += [path for path in run_dir.path.iterdir() if durable.is_temporary(path) and path.name.startswith(ours)]
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return sorted(path.name for path in found)
