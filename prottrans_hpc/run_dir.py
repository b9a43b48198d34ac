"""Every file name of a run directory, and run.json in and out.

A run directory is made by the launch side and read by the ranks; `run.json` is the only thing that both know.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import config, durable
from .errors import CheckpointError, ConfigError, DataError
from .machine import Allocation, Machine
from .recipe import Recipe, recipe_from_json

FORMAT = 1
STOP_FILE_PREFIX = ".stop-"
_CHECKPOINT = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class RunDir:
    """A run directory by its path; every other module asks it for names."""

    path: Path

    @property
    def run_json(self) -> Path:
        """The resolved run: recipe, corpus, machine, allocation."""
        return self.path / "run.json"

    @property
    def environment_json(self) -> Path:
        """What the latest start ran on: hosts, hardware, versions, git commit."""
        return self.path / "environment.json"

    @property
    def history(self) -> Path:
        """One JSON object for each start and each stop, with its cause."""
        return self.path / "history.jsonl"

    @property
    def init_json(self) -> Path:
        """The checkpoint that a run with another's weights began with, written at its first start."""
        return self.path / "init.json"

    @property
    def preflight_json(self) -> Path:
        """What the latest start measured of its nodes before it trained, and whether it went on; absent without a preflight."""
        return self.path / "preflight.json"

    @property
    def preflight_error(self) -> Path:
        """Why the first rank of a preflight failed; there for a moment only."""
        return self.path / ".preflight-error"

    @property
    def job_script(self) -> Path:
        """The script that was submitted, byte for byte."""
        return self.path / "job.sh"

    @property
    def job_json(self) -> Path:
        """Scheduler and job ids of the latest submission."""
        return self.path / "job.json"

    @property
    def jobs_log(self) -> Path:
        """One JSON object for each thing that happened to a batch job of this run: submitted, begun, ended, requeued."""
        return self.path / "jobs.jsonl"

    @property
    def lease(self) -> Path:
        """Which batch job works in this directory now; absent when none does."""
        return self.path / "job.lease.json"

    @property
    def exit_code(self) -> Path:
        """The exit code of the latest start, written by the job script when it ends."""
        return self.path / "job.exit-code"

    @property
    def job_log(self) -> Path:
        """What the job script and rank 0 print when they have no terminal."""
        return self.path / "logs" / "job.log"

    def stop_file(self, nonce: str) -> Path:
        """Asks the ranks of one start to save and stop; its name does not give their nonce away. The job script makes the same one."""
        return self.path / f"{STOP_FILE_PREFIX}{hashlib.sha256(nonce.encode()).hexdigest()[:16]}"

    @property
    def lock(self) -> Path:
        """Locked by the job that uses this directory, for as long as one of its processes lives."""
        return self.path / "job.lock"

    @property
    def metrics(self) -> Path:
        """One JSON object for each optimizer step, written by rank 0."""
        return self.path / "metrics.jsonl"

    @property
    def validation(self) -> Path:
        """One JSON object for each measurement of the validation loss, written by rank 0."""
        return self.path / "validation.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    def node_log(self, node_rank: int) -> Path:
        """The one log file of a node."""
        return self.path / "logs" / f"node-{node_rank:04d}.log"

    @property
    def timings(self) -> Path:
        """The folder of the nodes' ledgers."""
        return self.path / "timings"

    def node_timings(self, node_rank: int) -> Path:
        """One JSON object for each optimizer step: where its time went, mean over a node's ranks; written by the first of them."""
        return self.timings / f"node-{node_rank:04d}.jsonl"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint taken after `step` optimizer steps."""
        return self.checkpoints / f"step-{step:08d}"

    def checkpoint_steps(self) -> list[int]:
        """Steps that have a checkpoint folder, ascending; whether each is intact is another question."""
        if not self.checkpoints.is_dir():
            return []
        matches = (_CHECKPOINT.fullmatch(path.name) for path in self.checkpoints.iterdir())
        return sorted(int(match[1]) for match in matches if match)


@dataclass(frozen=True)
class Jobs:
    """The content of job.json: what was submitted last."""

    scheduler: str
    job_ids: tuple[str, ...]
    """Of a chain in order; a process id of the local scheduler."""
    host: str
    """Where it was submitted."""
    submitted: str
    """UTC, ISO 8601."""
    account: str | None = None
    """The project that the batch system charges."""


@dataclass(frozen=True)
class Init:
    """Whose weights a run begins with, instead of drawing its own."""

    asked: str
    """Absolute path of a run directory or checkpoint, as it was given."""
    checkpoint: str | None = None
    """Absolute path of the checkpoint; None: the last one of the run `asked`, once that is done."""
    manifest_sha256: str | None = None
    """Of the checkpoint's manifest, which holds the SHA-256 of every file; None as above."""
    optimizer: bool = False
    """Whether the state of the optimizer is carried over too; else it begins anew. Steps and the order of samples begin anew in any case."""

    @property
    def choice(self) -> dict[str, Any]:
        """What a person chose: equal in every command that continues the run."""
        return {"asked": self.asked, "optimizer": self.optimizer}


@dataclass(frozen=True)
class Preflight:
    """A measurement of a job's own nodes before its training starts, judged by the rules of `prottrans comm --gate`."""

    gate: float = 3.0
    """A node that takes more than so many times the median keeps the training from starting."""
    limit_s: int = 300
    """A measurement that takes longer has failed."""


@dataclass(frozen=True)
class Run:
    """The content of run.json."""

    run_id: str
    """Random name of this run; checkpoints carry it."""
    created: str
    """UTC, ISO 8601."""
    version: str
    """prottrans_hpc's version that made the run."""
    recipe: Recipe
    recipe_name: str
    corpus: str
    """Absolute path of the corpus."""
    corpus_sha256: str
    """SHA-256 of the corpus's index.json, which holds the SHA-256 of every shard."""
    machine: Machine
    allocation: Allocation
    stop_after_step: int | None
    """End after so many optimizer steps in all, even if the recipe has more; None: the recipe's steps."""
    init: Init | None = None
    """None: the starting weights are drawn from the recipe's seed."""
    preflight: Preflight | None = None
    """None: jobs train at once."""
    command_line: str | None = None
    """The command of the latest start, as a shell takes it; history.jsonl has those of all."""

    @property
    def last_step(self) -> int:
        """The step after which this run's work is done."""
        return min(self.recipe.num_steps, self.stop_after_step or self.recipe.num_steps)


def new_run_id() -> str:
    """A fresh random run id."""
    return secrets.token_hex(8)


def prepare(path: Path) -> RunDir:
    """Create a run directory, readable by its owner only unless the umask and an existing folder say otherwise."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise ConfigError(f"{path} belongs to another user or can be written by others; a run directory must not: chmod go-w it, or choose another --run-dir")
    for folder in ("logs", "checkpoints"):
        (path / folder).mkdir(exist_ok=True, mode=0o700)
    return RunDir(path.resolve())


def write_run(run_dir: RunDir, run: Run) -> None:
    """Write run.json durably."""
    values = {"format": FORMAT, **vars(run)}
    values |= {"recipe": config.to_json(run.recipe), "machine": config.to_json(run.machine), "allocation": config.to_json(run.allocation)}
    values |= {"init": vars(run.init) if run.init else None, "preflight": vars(run.preflight) if run.preflight else None}
    durable.write_json(run_dir.run_json, values)


def write_jobs(run_dir: RunDir, jobs: Jobs) -> None:
    """Write job.json durably."""
    durable.write_json(run_dir.job_json, {**vars(jobs), "job_ids": list(jobs.job_ids)})


def read_jobs(run_dir: RunDir) -> Jobs | None:
    """Read job.json; None when nothing was ever submitted. Raises DataError when it is damaged."""
    try:
        values = durable.read_json(run_dir.job_json)
        job_ids, account = tuple(str(job_id) for job_id in values["job_ids"]), values.get("account")
        return Jobs(str(values["scheduler"]), job_ids, str(values["host"]), str(values["submitted"]), None if account is None else str(account))
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{run_dir.job_json} is damaged: {error!r} is missing or of the wrong kind") from error


def read_run(run_dir: RunDir) -> Run:
    """Read run.json. Raises CheckpointError when the directory is no run, DataError or ConfigError when it is damaged."""
    if not run_dir.run_json.is_file():
        raise CheckpointError(f"{run_dir.path} is not a run directory: it has no run.json")
    values = durable.read_json(run_dir.run_json)
    return parse_run(values, source=str(run_dir.run_json))


def parse_run(values: Any, *, source: str) -> Run:
    """The run that the content of a run.json describes."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source} is no run: it holds a {type(values).__name__}, not an object")
    if values.get("format") != FORMAT:
        raise ConfigError(f"{source} has format {values.get('format')!r}; this version reads {FORMAT}")
    try:
        return Run(
            run_id=str(values["run_id"]),
            created=str(values["created"]),
            version=str(values["version"]),
            recipe=recipe_from_json(values["recipe"], source=source),
            recipe_name=str(values["recipe_name"]),
            corpus=str(values["corpus"]),
            corpus_sha256=str(values["corpus_sha256"]),
            machine=config.parse(Machine, values["machine"], source=source),
            allocation=config.parse(Allocation, values["allocation"], source=source),
            stop_after_step=None if values["stop_after_step"] is None else int(values["stop_after_step"]),
            init=None if values.get("init") is None else config.parse(Init, values["init"], source=source),
            preflight=None if values.get("preflight") is None else config.parse(Preflight, values["preflight"], source=source),
            command_line=None if values.get("command_line") is None else str(values["command_line"]),
        )
    except KeyError as error:
        raise ConfigError(f"{source} lacks the key {error.args[0]!r}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: stop_after_step is {values['stop_after_step']!r}, not a number of steps") from error
