"""Every file name of a farm's folder, and farm.json: which jobs there are and how each stands.

farm.json is replaced durably at every change, so that a later start of the same command knows what is done, what
is in the queue, and what has to be run again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from .. import durable
from ..errors import ConfigError, DataError

FORMAT = 2
State = Literal["waiting", "submitting", "submitted", "done", "failed"]
STATES = get_args(State)
_OUTCOME = re.compile(r"(\d{5,})\.try-(\d+)\.([0-9a-f]+)\.json")


@dataclass(frozen=True)
class FarmFiles:
    """The names in a farm's folder."""

    folder: Path

    @property
    def state(self) -> Path:
        """The jobs and how they stand."""
        return self.folder / "farm.json"

    @property
    def submitit(self) -> Path:
        """submitit's own files."""
        return self.folder / "submitit"

    def job(self, number: int) -> Path:
        """What a job runs, and the token of the submission that may run it: without the file, or with another token, a job ends by itself."""
        return self.folder / "jobs" / f"{number:05d}.json"

    def request(self, number: int, share: int) -> Path:
        """The request of one of a job's commands."""
        return self.folder / "jobs" / f"{number:05d}.{share}.request.json"

    def outcome(self, number: int, attempt: int, token: str) -> Path:
        """How a try of a job ended; written on its node. Two submissions never share one."""
        return self.folder / "jobs" / f"{number:05d}.try-{attempt}.{token}.json"

    def log(self, number: int) -> Path:
        """What a job printed, all tries."""
        return self.folder / "logs" / f"{number:05d}.log"

    def prepare(self) -> None:
        """Make the folders. Raises ConfigError when others could write there."""
        for folder in (self.folder, self.folder / "jobs", self.folder / "logs", self.submitit):
            FarmFiles(folder).prepare_folder()

    def prepare_folder(self) -> None:
        """Make one folder, readable by its owner only. Raises ConfigError when others could write there: submitit's pickles are code."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = self.folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise ConfigError(f"{self.folder} belongs to another user or can be written by others; a farm's folder must not: chmod go-w it, or remove it")

    def outcomes(self) -> set[tuple[int, int, str]]:
        """(number, try, token) of every outcome that is there."""
        found = (_OUTCOME.fullmatch(name) for name in os.listdir(self.folder / "jobs"))
        return {(int(match[1]), int(match[2]), match[3]) for match in found if match}

    def code(self, number: int, attempt: int, token: str) -> int:
        """The exit code of a try."""
        return int(durable.read_json(self.outcome(number, attempt, token))["code"])


@dataclass
class FarmJob:
    """One node's work: a job of the batch system, or an element of an array."""

    outputs: tuple[str, ...]
    """It is done when these files are there."""
    state: State = "waiting"
    """"submitting": the scheduler was asked and has not answered, so that a job may be in the queue of which nothing is known."""
    job_id: str | None = None
    """Of the latest submission."""
    num_tries: int = 0
    """Submissions so far."""
    codes: list[int | None] = field(default_factory=list)
    """Exit code of each try that ended; None: killed without a word."""
    token: str = ""
    """Of the latest submission; a job knows by it whether it is still wanted."""

    @property
    def has_output(self) -> bool:
        """Whether everything that it should write is there."""
        return all(Path(output).exists() for output in self.outputs)


def write_state(files: FarmFiles, name: str, scheduler: str, jobs: Sequence[FarmJob]) -> None:
    """Write farm.json durably."""
    durable.write_json(files.state, {"format": FORMAT, "name": name, "scheduler": scheduler, "jobs": [vars(job) for job in jobs]})


def read_state(files: FarmFiles) -> tuple[str, list[FarmJob]] | None:
    """Scheduler and jobs of an earlier start; None when there was none. Raises DataError when farm.json is damaged."""
    try:
        values = durable.read_json(files.state)
        if values["format"] != FORMAT or any(job["state"] not in STATES for job in values["jobs"]):
            raise ValueError(f"format {values['format']!r}, or an unknown state")
        return str(values["scheduler"]), [_job(job) for job in values["jobs"]]
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{files.state} is damaged ({error}): make sure that none of its jobs is in the queue, and remove {files.folder}") from error


def _job(values: dict[str, Any]) -> FarmJob:
    return FarmJob(tuple(values["outputs"]), values["state"], values["job_id"], int(values["num_tries"]), list(values["codes"]), str(values["token"]))
