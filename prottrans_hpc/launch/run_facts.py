"""Where runs are found, and what the files of one say by themselves; schedulers are asked elsewhere (run_state.py)."""

from __future__ import annotations

import contextlib
import difflib
from dataclasses import dataclass
from pathlib import Path

from .. import run_dir
from ..errors import CheckpointError, ConfigError
from ..run_dir import Jobs, Run, RunDir
from .run_files import Record, last_records, read_code

DEFAULT_FOLDER = Path("runs")
_NUM_RECENT_STEPS = 50


@dataclass(frozen=True)
class RunFacts:
    """What the files of a run say."""

    run_dir: RunDir
    run: Run
    jobs: Jobs | None
    """None: it was never started."""
    recent: tuple[Record, ...]
    """The last lines of metrics.jsonl, oldest first."""
    checkpoint_steps: tuple[int, ...]
    """Ascending."""
    exit_code: int | None
    """Of the latest start that ended by itself since the latest submission."""
    activity: float
    """When a file of the run last changed, in seconds of the epoch."""

    @property
    def name(self) -> str:
        """The name of the run directory."""
        return self.run_dir.path.name

    @property
    def step(self) -> int:
        """Optimizer steps taken, as far as is known."""
        measured = self.recent[-1].get("step") if self.recent else None
        return measured if isinstance(measured, int) else self.saved_step

    @property
    def saved_step(self) -> int:
        """The step of the newest checkpoint; 0 when there is none."""
        return self.checkpoint_steps[-1] if self.checkpoint_steps else 0

    @property
    def loss(self) -> float | None:
        """The newest finite training loss, in nats a target."""
        losses = (record.get("loss") for record in reversed(self.recent))
        return next((float(loss) for loss in losses if isinstance(loss, (int, float))), None)


@dataclass(frozen=True)
class DamagedRun:
    """A run directory whose own files cannot be read."""

    run_dir: RunDir
    problem: str
    activity: float

    @property
    def name(self) -> str:
        """The name of the run directory."""
        return self.run_dir.path.name


def find_runs(folder: Path) -> list[RunDir]:
    """The run directories right in a folder, by name. Raises CheckpointError when the folder is none."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: runs are looked for in ./{DEFAULT_FOLDER} unless --runs names another folder")
    return [RunDir(path.absolute()) for path in sorted(folder.iterdir()) if path.is_dir() and _looks_like_a_run(RunDir(path))]


def find_run(name_or_path: str, folder: Path) -> RunDir:
    """The run that a path, or a name in the folder of runs, means. Raises ConfigError that names the nearest."""
    for path in (folder / name_or_path, Path(name_or_path)):
        if path.is_dir() and _looks_like_a_run(RunDir(path)):
            return RunDir(path.resolve())
    names = [found.path.name for found in find_runs(folder)] if folder.is_dir() else []
    close = difflib.get_close_matches(name_or_path, names, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" if names else "there are none"
    raise ConfigError(f"{name_or_path!r} is neither a run in {folder} nor the path of one; {hint}")


def _looks_like_a_run(candidate: RunDir) -> bool:
    try:
        return any(path.exists() for path in (candidate.run_json, candidate.job_script, candidate.history))
    except OSError:  # a folder of somebody else
        return False


def read_facts(directory: RunDir) -> RunFacts:
    """Read the files of a run. Raises a ProttransError or OSError when they cannot be read."""
    return RunFacts(
        directory,
        run_dir.read_run(directory),
        run_dir.read_jobs(directory),
        tuple(last_records(directory.metrics, _NUM_RECENT_STEPS)),
        tuple(directory.checkpoint_steps()),
        read_exit_code(directory),
        last_activity(directory),
    )


def read_exit_code(directory: RunDir) -> int | None:
    """What the job script wrote when it ended; None when it did not, or the disk was full."""
    return read_code(directory.exit_code)


def last_activity(directory: RunDir) -> float:
    """When one of the files that grow or change with a run last did; 0 when there is none."""
    paths = (
        *(directory.run_json, directory.job_json, directory.job_script, directory.exit_code, directory.history, directory.jobs_log),
        *(directory.metrics, directory.job_log, directory.node_log(0), directory.checkpoints),
    )
    latest = 0.0
    for path in paths:
        with contextlib.suppress(OSError):
            latest = max(latest, path.stat().st_mtime)
    return latest
