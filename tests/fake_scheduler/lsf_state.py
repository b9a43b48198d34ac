"""The state folder of the stand-in for LSF: one JSON file a job, one for the cluster, and requests to the daemon.

Commands (`bsub`, `bjobs`, `bkill`, `brequeue`) and the daemon are separate programs, as in LSF; this folder is how they
meet. It is named by the environment variable FAKE_LSF. Job ids go on counting when everything is started again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

Job = dict[str, Any]
FINISHED = ("DONE", "EXIT")
_ELEMENT = 1_000_000
"""Element k of the array 1001 is kept as job k * _ELEMENT + 1001."""
HOUR = 60

SUMMIT = {
    "launch_host": "batch1",
    "racks": 256,
    "nodes_per_rack": 18,
    "cores": 42,
    "gpus": 6,
    # Least nodes, most nodes, most minutes.
    "queues": {
        "batch": [[1, 45, 2 * HOUR], [46, 91, 6 * HOUR], [92, 921, 12 * HOUR], [922, 2764, 24 * HOUR], [2765, 4608, 24 * HOUR]],
        "killable": [[1, 45, 24 * HOUR], [46, 91, 24 * HOUR]],
    },
    "preemptable_after_min": {"killable": [[1, 45, 2 * HOUR], [46, 91, 6 * HOUR]]},
    "max_queued": 100,
    # How long a minute takes here, how long LSF waits between the signals with which it ends a job, and from SIGUSR2 to SIGKILL past -W.
    "minute_s": 60.0,
    "terminate_interval_s": 10.0,
    "kill_after_min": 10,
    "clock_ahead_s": 0.0,
}


@dataclass(frozen=True)
class State:
    """The folder."""

    folder: Path

    @property
    def cluster(self) -> dict[str, Any]:
        """What the cluster is like: SUMMIT, with whatever a test has changed."""
        path = self.folder / "cluster.json"
        return {**SUMMIT, **(json.loads(path.read_text()) if path.exists() else {})}

    @property
    def hosts(self) -> list[str]:
        """The compute hosts, rack after rack: a001n01, a001n02, ..."""
        cluster = self.cluster
        return [f"a{rack:03d}n{node:02d}" for rack in range(1, cluster["racks"] + 1) for node in range(1, cluster["nodes_per_rack"] + 1)]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Alone with the state."""
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def next_id(self) -> int:
        """A job id that was never given before. The caller holds the lock."""
        path = self.folder / "next-id"
        number = int(path.read_text()) if path.exists() else 1001
        path.write_text(str(number + 1))
        return number

    def job_folder(self, job_id: int) -> Path:
        return self.folder / "jobs" / str(job_id)

    def read(self, job_id: int) -> Job | None:
        try:
            job: Job = json.loads((self.job_folder(job_id) / "job.json").read_text())
            return job
        except FileNotFoundError:
            return None

    def write(self, job: Job) -> None:
        folder = self.job_folder(job["id"])
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / "job.json.new"
        new.write_text(json.dumps(job, indent=1))
        new.rename(folder / "job.json")

    def jobs(self) -> list[Job]:
        """All jobs in the order in which they were submitted."""
        ids = sorted(int(path.name) for path in (self.folder / "jobs").glob("*") if path.name.isdigit())
        return [job for job_id in ids if (job := self.read(job_id))]

    def find(self, text: str) -> list[Job]:
        """The jobs that `1001`, or the element of an array that `1001[3]`, names on a command line: none, one, or all of an array."""
        match = re.fullmatch(r"(\d+)(?:\[(\d+)\])?", text)
        if not match:
            refuse(f"{text}: Illegal job ID.")
        if match[2] or self.read(int(match[1])):
            job = self.read(element_id(int(match[1]), int(match[2] or 0)))
            return [job] if job else []
        return [job for job in self.jobs() if job["number"] == int(match[1])]

    def ask(self, job_id: int, **request: Any) -> None:
        """Leave a request for the daemon: {"what": "signal" | "kill" | "requeue" | "preempt" | "host failure", ...}."""
        with self.locked(), (self.folder / "requests.jsonl").open("a") as file:
            file.write(json.dumps({"id": job_id, **request}) + "\n")

    @contextlib.contextmanager
    def requests(self) -> Iterator[list[Job]]:
        """The requests since the last time, which are there as files until the block has dealt with them. For the daemon."""
        path, taken = self.folder / "requests.jsonl", self.folder / "requests-taken.jsonl"
        with self.locked():
            if path.exists():
                path.rename(taken)
        yield [json.loads(line) for line in taken.read_text().splitlines()] if taken.exists() else []
        taken.unlink(missing_ok=True)


def element_id(number: int, index: int) -> int:
    """Under which id an element of an array is kept; index 0 is a job that is no array."""
    return index * _ELEMENT + number


def public_id(job: Job) -> str:
    """What LSF calls a job: `1001` or `1001[3]`."""
    return f"{job['number']}[{job['index']}]" if job["index"] else str(job["number"])


def here() -> State:
    """The state folder that the environment names."""
    folder = Path(os.environ["FAKE_LSF"])
    folder.mkdir(parents=True, exist_ok=True)
    return State(folder)


def refuse(message: str) -> NoReturn:
    """LSF's commands say why on standard error and end with 255."""
    print(message, file=sys.stderr)
    sys.exit(255)


_TERM = re.compile(r"\s*(?:(ended|done|started)\(\s*(\d+)\s*\)|(&&|\|\|))")


def dependency_terms(expression: str) -> list[tuple[str, int] | str]:
    """`ended(12) && done(13)` as [("ended", 12), "&&", ("done", 13)]. Raises ValueError for anything else."""
    terms: list[tuple[str, int] | str] = []
    position = 0
    while expression[position:].strip():
        match = _TERM.match(expression, position)
        if not match or bool(match[3]) != bool(len(terms) % 2):
            raise ValueError(expression)
        terms.append(match[3] or (match[1], int(match[2])))
        position = match.end()
    if len(terms) % 2 == 0:
        raise ValueError(expression)
    return terms


def is_satisfied(expression: str, state: State) -> bool:
    """Whether a job with this dependency may start; && and || are read from left to right."""
    conditions = {"ended": FINISHED, "done": ("DONE",), "started": ("RUN", *FINISHED)}
    value = True
    operator = "&&"
    for term in dependency_terms(expression):
        if isinstance(term, str):
            operator = term
            continue
        job = state.read(term[1])
        holds = job is not None and job["stat"] in conditions[term[0]]
        value = (value and holds) if operator == "&&" else (value or holds)
    return value
