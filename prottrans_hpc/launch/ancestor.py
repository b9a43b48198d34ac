"""Runs that go on from another's weights: which checkpoint that is, whether it fits, and which job has to end before.

Only what is on the disk is looked at, without torch; the ranks verify every byte when they take the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import architecture, config, durable
from .. import run_dir as run_dirs
from ..errors import CheckpointError, ConfigError, DataError
from ..machine import Machine
from ..recipe import Recipe
from ..run_dir import Init, RunDir

STATE = "state.json"
"""In every checkpoint folder; tests hold it against the ranks' side."""
_MAY_DIFFER = ("dropout",)
"""Fields of a shape that change no tensor."""


def find(source: Path, recipe: Recipe, *, optimizer: bool, waits: bool, must_exist: bool = True) -> Init:
    """The checkpoint that `source`, a checkpoint or a run that is done, means.

    With `waits` the run need not be done yet: its last checkpoint is taken when the new run first starts. What is not
    there need not be for a dry run. Raises CheckpointError when it is neither, ConfigError when it does not fit.
    """
    asked = source.resolve()
    if (asked / STATE).is_file():
        return _of_checkpoint(asked, asked, recipe, optimizer=optimizer)
    directory = RunDir(asked)
    if not directory.run_json.is_file():
        if not must_exist and not asked.exists():
            return Init(str(asked), optimizer=optimizer)
        raise CheckpointError(f"--init {source} is neither a checkpoint nor a run directory")
    run = run_dirs.read_run(directory)
    newest = max(directory.checkpoint_steps(), default=0)
    if newest >= run.last_step:
        return _of_checkpoint(asked, directory.checkpoint(newest), recipe, optimizer=optimizer)
    if not waits:
        raise ConfigError(
            f"--init {source}: that run has step {newest} of {run.last_step}. Let it end first, name one of its checkpoints, or, on a batch system, "
            "give --after so that this one waits for it in the queue"
        )
    if run.recipe.architecture.name != recipe.architecture.name:
        raise ConfigError(f"--init {source}: that run trains {run.recipe.architecture.name}, this recipe {recipe.architecture.name}")
    return Init(str(asked), optimizer=optimizer)


def job_before(after: str | None, machine: Machine) -> str | None:
    """The id of the job that `--after` means. Raises ConfigError where there is none."""
    if after is None:
        return None
    if machine.scheduler == "local":
        raise ConfigError(f"--after is for batch systems; {machine.name} has none: start this one when the other has ended")
    if RunDir(Path(after)).run_json.is_file():
        jobs = run_dirs.read_jobs(RunDir(Path(after)))
        if jobs is None or jobs.scheduler != machine.scheduler:
            raise ConfigError(f"--after {after}: that run has no job of {machine.scheduler} to wait for")
        return jobs.job_ids[-1]
    if after.isascii() and after.isdecimal():
        return after
    raise ConfigError(f"--after {after!r} is neither the number of a job nor a run directory")


def _of_checkpoint(asked: Path, path: Path, recipe: Recipe, *, optimizer: bool) -> Init:
    try:
        state, digest = durable.read_json(path / STATE), durable.sha256_of(path / durable.MANIFEST)
        described, files = state["identity"]["architecture"], state["files"]
    except (OSError, DataError, KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: {error}") from error
    _check_fits(path, described, recipe)
    if optimizer and not files.get("optimizer"):
        raise ConfigError(f"--init-optimizer: the checkpoint {path} has weights only")
    return Init(str(asked), str(path), digest, optimizer)


def _check_fits(path: Path, described: dict[str, Any], recipe: Recipe) -> None:
    record = architecture.get(recipe.architecture.name)
    wanted = {"name": record.name, "shape": _plain(record.size(recipe.architecture.size).shape), "vocabulary": list(record.vocabulary.tokens)}
    found = {**described, "shape": {key: value for key, value in described["shape"].items() if key not in _MAY_DIFFER}}
    different = config.differences(found, wanted)
    if different:
        raise ConfigError(f"the checkpoint {path} does not fit {recipe.architecture.name} {recipe.architecture.size}: {'; '.join(different)}")


def _plain(shape: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(shape).items() if key not in _MAY_DIFFER and not key.startswith("_")}
