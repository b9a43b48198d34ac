"""How far a run is, from its files alone."""

from __future__ import annotations

from dataclasses import dataclass

from .. import durable
from ..errors import DataError
from ..run_dir import RunDir, read_run


@dataclass(frozen=True)
class Progress:
    """What is on the disk."""

    step: int
    """Of the newest checkpoint; 0: there is none."""
    last_step: int | None
    """After which the run is done; None: this directory's stage has no steps."""

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return self.last_step is not None and self.step >= self.last_step


def read_progress(run_dir: RunDir) -> Progress:
    """The progress of a run directory. Raises what `read_run` raises when its run.json is damaged."""
    steps = run_dir.checkpoint_steps()
    last_step = read_run(run_dir).last_step if run_dir.run_json.exists() else None
    while steps and not _looks_whole(run_dir, steps[-1]):
        steps.pop()
    return Progress(steps[-1] if steps else 0, last_step)


def _looks_whole(run_dir: RunDir, step: int) -> bool:
    """Whether all files of a checkpoint are there with their sizes; the ranks compare every byte."""
    folder = run_dir.checkpoint(step)
    try:
        return all((folder / name).stat().st_size == seal.num_bytes for name, seal in durable.read_manifest(folder).items())
    except (OSError, DataError):
        return False
