"""The jobs of a farm, through submitit, on each scheduler: submit, ask which are alive, cancel; and the dry run.

The scheduler is what the machine profile says; submitit's own detection is never used. submitit starts the jobs, but
is not asked how they ended: that would load pickles, and on Slurm need a database that not every site has.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import SubmitError
from ..terminal import printable
from . import submission
from .farm_executors import EXECUTORS, JobShape, largest_array
from .farm_item import run as run_command
from .schedulers import SCHEDULERS

if TYPE_CHECKING:
    from submitit.local.local import LocalJob

_TIMEOUT_S = 120
_IDS_PER_CALL = 500
_ENDED_ALREADY = re.compile("already (finished|completing or completed)|No matching job found|Invalid job id|is being terminated", re.IGNORECASE)
"""What scancel and bkill say of jobs that need no end any more."""
_ENDED = frozenset(
    "COMPLETED FAILED BOOT_FAIL NODE_FAIL CANCELLED REVOKED PREEMPTED TIMEOUT DEADLINE OUT_OF_MEMORY FORGOTTEN".split()  # noqa: SIM905 - read as a list
)
"""Of Slurm, and of what lsf_executor makes of LSF's; any other state is alive."""


class Jobs(Protocol):
    """The jobs of a farm on one scheduler."""

    max_submitted: int
    """So many may be handed over at the same time."""
    query_every_s: float

    def submit(self, commands: Sequence[Sequence[str]]) -> list[str]:
        """Submit a job for each command, at most `max_submitted`; their ids. Raises SubmitError."""

    def alive(self, job_ids: Sequence[str]) -> Mapping[str, bool] | None:
        """Which of the jobs may still do something; None when the scheduler does not say."""

    def cancel(self, job_ids: Sequence[str]) -> str | None:
        """Ask for their end; why that could not be done, or None."""


class LocalJobs:
    """Processes of this computer, through submitit's local executor."""

    query_every_s = 0.2

    def __init__(self, shape: JobShape) -> None:
        self.max_submitted = shape.num_at_once
        self._executor = EXECUTORS["local"](shape)
        self._jobs: dict[str, LocalJob[Any]] = {}

    def submit(self, commands: Sequence[Sequence[str]]) -> list[str]:
        """See Jobs."""
        jobs: list[Any] = self._executor.map_array(run_command, [list(command) for command in commands])
        self._jobs |= {str(job.job_id): job for job in jobs}
        return [str(job.job_id) for job in jobs]

    def alive(self, job_ids: Sequence[str]) -> Mapping[str, bool] | None:
        """See Jobs. Those that another process started end with it."""
        return {job_id: job_id in self._jobs and not self._jobs[job_id].done() for job_id in job_ids}

    def cancel(self, job_ids: Sequence[str]) -> str | None:
        """See Jobs."""
        jobs = [self._jobs[job_id] for job_id in job_ids if job_id in self._jobs]
        for job in jobs:
            job.cancel()
        end = time.monotonic() + 10
        while any(not job.done() for job in jobs) and time.monotonic() < end:
            time.sleep(0.05)
        return None


class BatchJobs:
    """Jobs of Slurm or LSF."""

    query_every_s = 30.0

    def __init__(self, shape: JobShape) -> None:
        scheduler = shape.machine.scheduler
        need = {"slurm": ("srun", "sbatch"), "lsf": ("bsub",)}[scheduler]
        if missing := [program for program in need if shutil.which(program) is None]:
            raise SubmitError(
                f"{shape.machine.name} is used through {scheduler}, but there is no command {missing[0]!r} here. "
                "Run this on a login node of the machine, or use --dry-run"
            )
        self._executor = EXECUTORS[scheduler](shape)
        self._scheduler = scheduler
        self.max_submitted = largest_array(shape.machine)

    def submit(self, commands: Sequence[Sequence[str]]) -> list[str]:
        """See Jobs."""
        with _stated_environment(self._scheduler):
            try:
                jobs: list[Any] = self._executor.map_array(run_command, [list(command) for command in commands])
            except (RuntimeError, OSError) as error:
                said = " ".join(printable(line, 300) for line in str(error).splitlines() if line.strip())
                raise SubmitError(f"cannot submit the jobs of the farm: {said or type(error).__name__}") from error
        return [str(job.job_id) for job in jobs]

    def alive(self, job_ids: Sequence[str]) -> Mapping[str, bool] | None:
        """See Jobs."""
        numbers = sorted({job_id.partition("_")[0] for job_id in job_ids})
        states: dict[str, str] = {}
        for start in range(0, len(numbers), _IDS_PER_CALL):
            found = (_slurm_states if self._scheduler == "slurm" else _lsf_states)(numbers[start : start + _IDS_PER_CALL])
            if found is None:
                return None
            states |= found
        return {job_id: states.get(job_id, "FORGOTTEN") not in _ENDED for job_id in job_ids}

    def cancel(self, job_ids: Sequence[str]) -> str | None:
        """See Jobs. Whole arrays, of which all elements are ours: a command line has no room for 100,000 ids."""
        program = {"slurm": "scancel", "lsf": "bkill"}[self._scheduler]
        numbers = sorted({job_id.partition("_")[0] for job_id in job_ids})
        for start in range(0, len(numbers), _IDS_PER_CALL):
            done = _call(self._scheduler, [program, *numbers[start : start + _IDS_PER_CALL]])
            if done is None:
                return f"{program} does not answer"
            lines = [line for line in done.stderr.splitlines() if line.strip() and not _ENDED_ALREADY.search(line)]
            if done.returncode and lines:
                return f"{program} says: {printable(lines[0], 300)}"
        return None


def open_jobs(shape: JobShape) -> Jobs:
    """The jobs of a farm on the scheduler that the machine profile names. Raises SubmitError where that is not installed."""
    return LocalJobs(shape) if shape.machine.scheduler == "local" else BatchJobs(shape)


def render(shape: JobShape, commands: Sequence[Sequence[str]]) -> str:
    """What would be submitted first: the script of the array, or the commands."""
    if shape.machine.scheduler == "local":
        return "".join(f"{shlex.join(command)}\n" for command in commands)
    executor: Any = EXECUTORS[shape.machine.scheduler](shape)
    num_elements = min(len(commands), largest_array(shape.machine))
    if shape.machine.scheduler == "slurm" and num_elements > 1:
        executor.parameters["map_count"] = num_elements
    elif num_elements > 1:
        executor._array_size = num_elements
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    return text


def _slurm_states(numbers: Sequence[str]) -> dict[str, str] | None:
    done = _call("slurm", ["squeue", "--noheader", "--states=all", "--array", "--format=%i|%T", f"--jobs={','.join(numbers)}"])
    # Slurm forgets ended jobs after some minutes; when it knows none of them it says so.
    if done is None or (done.returncode and "Invalid job id" not in done.stderr):
        return None
    return dict(re.findall(r"^\s*(\d+(?:_\d+)?)\|([A-Z_]+)", done.stdout, re.MULTILINE))


def _lsf_states(numbers: Sequence[str]) -> dict[str, str] | None:
    from .lsf_executor import FORGOTTEN, read_states, states_argv

    done = _call("lsf", states_argv(numbers))
    found = read_states(done.stdout) if done is not None else {}
    if not found:
        return None
    states = {job_id: info["State"] for job_id, info in found.items()}
    known = {job_id.partition("_")[0] for job_id in states}
    # A number of which nothing at all is said is not forgotten: bjobs may have been cut off.
    return states if known.issuperset(numbers) or FORGOTTEN in states.values() else None


def _call(scheduler: str, words: Sequence[str]) -> subprocess.CompletedProcess[str] | None:
    """Run a command of the scheduler, which heeds nothing that a person has set for their own use of it; None when it does not answer."""
    environment = submission.scrubbed(os.environ, SCHEDULERS[scheduler].inherited_prefixes)
    try:
        return subprocess.run(
            list(words),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (subprocess.TimeoutExpired, OSError):
        return None


@contextmanager
def _stated_environment(scheduler: str) -> Iterator[None]:
    """submitit hands on our environment: while it submits, that is what submission.py would hand on."""
    before = dict(os.environ)
    clean = submission.scrubbed(before, SCHEDULERS[scheduler].inherited_prefixes)
    if SCHEDULERS[scheduler].hands_on_environment:
        clean = submission.stated(clean)
    try:
        for name in before.keys() - clean.keys():
            del os.environ[name]
        yield
    finally:
        os.environ.update(before)
