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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import ConfigError, SubmitError
from ..machine import Machine, usable_cpu_cores
from ..terminal import printable
from . import submission
from .farm_item import run as run_command
from .schedulers import SCHEDULERS

if TYPE_CHECKING:
    from submitit.core.core import PicklingExecutor
    from submitit.local.local import LocalJob

_TIMEOUT_S = 120
_ARRAY_SIZE = 1_000
"""Slurm and LSF refuse larger arrays unless the site says otherwise."""
_FOREVER_MIN = 60 * 24 * 365
_ENDED = frozenset(
    "COMPLETED FAILED BOOT_FAIL NODE_FAIL CANCELLED REVOKED PREEMPTED TIMEOUT DEADLINE OUT_OF_MEMORY FORGOTTEN".split()  # noqa: SIM905 - read as a list
)
"""Of Slurm, and of what lsf_executor makes of LSF's; any other state is alive."""


@dataclass(frozen=True)
class JobShape:
    """What one job of a farm asks for: always one node."""

    machine: Machine
    name: str
    folder: Path
    """Of submitit's files."""
    python: str
    """The interpreter on the nodes."""
    num_at_once: int
    """Jobs that may run at the same time."""
    walltime_min: int | None
    queue: str | None
    account: str | None


class Jobs(Protocol):
    """The jobs of a farm on one scheduler."""

    max_submitted: int | None
    """So many may be handed over at the same time; None: all, the scheduler holds them back itself."""
    query_every_s: float

    def submit(self, commands: Sequence[Sequence[str]]) -> list[str]:
        """Submit a job for each command; their ids. Raises SubmitError."""

    def alive(self, job_ids: Sequence[str]) -> Mapping[str, bool] | None:
        """Which of the jobs may still do something; None when the scheduler does not say."""

    def cancel(self, job_ids: Sequence[str]) -> None:
        """End them."""


class LocalJobs:
    """Processes of this computer, through submitit's local executor."""

    query_every_s = 0.2

    def __init__(self, shape: JobShape) -> None:
        self.max_submitted: int | None = shape.num_at_once
        self._executor = _local(shape)
        self._jobs: dict[str, LocalJob[Any]] = {}

    def submit(self, commands: Sequence[Sequence[str]]) -> list[str]:
        """See Jobs."""
        jobs: list[Any] = self._executor.map_array(run_command, [list(command) for command in commands])
        self._jobs |= {str(job.job_id): job for job in jobs}
        return [str(job.job_id) for job in jobs]

    def alive(self, job_ids: Sequence[str]) -> Mapping[str, bool] | None:
        """See Jobs. Those that another process started end with it."""
        return {job_id: job_id in self._jobs and not self._jobs[job_id].done() for job_id in job_ids}

    def cancel(self, job_ids: Sequence[str]) -> None:
        """See Jobs."""
        jobs = [self._jobs[job_id] for job_id in job_ids if job_id in self._jobs]
        for job in jobs:
            job.cancel()
        end = time.monotonic() + 10
        while any(not job.done() for job in jobs) and time.monotonic() < end:
            time.sleep(0.05)


class BatchJobs:
    """Jobs of Slurm or LSF."""

    max_submitted: int | None = None
    query_every_s = 30.0

    def __init__(self, shape: JobShape) -> None:
        scheduler = shape.machine.scheduler
        need = {"slurm": ("srun", "sbatch"), "lsf": ("bsub",)}[scheduler]
        if missing := [program for program in need if shutil.which(program) is None]:
            raise SubmitError(
                f"{shape.machine.name} is used through {scheduler}, but there is no command {missing[0]!r} here. "
                "Run this on a login node of the machine, or use --dry-run"
            )
        self._executor = _EXECUTORS[scheduler](shape)
        self._scheduler = scheduler

    def submit(self, commands: Sequence[Sequence[str]]) -> list[str]:
        """See Jobs."""
        jobs: list[Any] = []
        with _scrubbed_environment(self._scheduler):
            try:
                for start in range(0, len(commands), _ARRAY_SIZE):
                    jobs += self._executor.map_array(run_command, [list(command) for command in commands[start : start + _ARRAY_SIZE]])
            except (RuntimeError, OSError) as error:
                said = " ".join(printable(line, 300) for line in str(error).splitlines() if line.strip())
                raise SubmitError(f"cannot submit the jobs of the farm: {said or type(error).__name__}") from error
        return [str(job.job_id) for job in jobs]

    def alive(self, job_ids: Sequence[str]) -> Mapping[str, bool] | None:
        """See Jobs."""
        numbers = sorted({job_id.partition("_")[0] for job_id in job_ids})
        states = (_slurm_states if self._scheduler == "slurm" else _lsf_states)(numbers)
        return None if states is None else {job_id: states.get(job_id, "FORGOTTEN") not in _ENDED for job_id in job_ids}

    def cancel(self, job_ids: Sequence[str]) -> None:
        """See Jobs."""
        if self._scheduler == "slurm":
            words = ["scancel", *job_ids]
        else:
            from .lsf_executor import lsf_id

            words = ["bkill", *map(lsf_id, job_ids)]
        _call(words)


def open_jobs(shape: JobShape) -> Jobs:
    """The jobs of a farm on the scheduler that the machine profile names. Raises SubmitError where that is not installed."""
    return LocalJobs(shape) if shape.machine.scheduler == "local" else BatchJobs(shape)


def render(shape: JobShape, commands: Sequence[Sequence[str]]) -> str:
    """What would be submitted: the script of the array, or the commands."""
    if shape.machine.scheduler == "local":
        return "".join(f"{shlex.join(command)}\n" for command in commands)
    executor: Any = _EXECUTORS[shape.machine.scheduler](shape)
    if shape.machine.scheduler == "slurm" and len(commands) > 1:
        executor.parameters["map_count"] = len(commands)
    elif len(commands) > 1:
        executor._array_size = len(commands)
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    return text


def _python_words(shape: JobShape) -> str:
    # submitit puts these in front of `-u -m submitit...`; with -P a submitit.py in the current folder is not submitit.
    return shlex.join([*shape.machine.launcher_prefix, shape.python, "-P"])


def _local(shape: JobShape) -> PicklingExecutor:
    from submitit.local.local import LocalExecutor

    executor = LocalExecutor(shape.folder, python=_python_words(shape))
    executor.update_parameters(timeout_min=_FOREVER_MIN, gpus_per_node=shape.machine.node.num_gpus, stderr_to_stdout=True)
    return executor


def _slurm(shape: JobShape) -> PicklingExecutor:
    from submitit.slurm.slurm import SlurmExecutor

    class AnywhereSlurmExecutor(SlurmExecutor):
        """One that can be built, for a dry run, where there is no srun."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    machine, node, queue = shape.machine, shape.machine.node, shape.machine.queue(shape.queue)
    partition = getattr(queue, "partition", None)
    executor = AnywhereSlurmExecutor(shape.folder, python=_python_words(shape))
    parameters = {
        "job_name": shape.name,
        "partition": queue.name if partition is None else partition or None,
        "qos": queue.qos,
        "account": shape.account,
        "time": shape.walltime_min,
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": usable_cpu_cores(node),
        "gpus_per_node": node.num_gpus or None,
        "exclusive": True,
        "signal_delay_s": 60 * machine.warning_min,
        "array_parallelism": shape.num_at_once,
        "stderr_to_stdout": True,
        "setup": [*_setup_lines(shape), f"export SRUN_CPUS_PER_TASK={usable_cpu_cores(node)}"],
        "additional_parameters": {"requeue": True, **_slurm_options(machine.header_lines)},
    }
    # submitit's own default would be refused where accounting knows no such key.
    executor.update_parameters(wckey=None, **{name: value for name, value in parameters.items() if value is not None})
    return executor


def _slurm_options(lines: Sequence[str]) -> dict[str, str | bool]:
    """The profile's #SBATCH lines as submitit takes them. Raises ConfigError for one that it cannot."""
    found: dict[str, str | bool] = {}
    for line in lines:
        match = re.fullmatch(r"#SBATCH\s+(?:--(?P<long>[a-z][a-z-]*)|-(?P<short>[A-Za-z]))(?:[= ]\s*(?P<value>\S.*))?", line.strip())
        name = match and (match["long"] or _SHORT_OPTIONS.get(match["short"]))
        if not match or not name or name in found:
            raise ConfigError(f"header_lines: a farm takes lines of the form '#SBATCH --option=value' only, an option once, not {line!r}")
        found[name] = match["value"].strip("\"'") if match["value"] is not None else True
    return found


_SHORT_OPTIONS = {"A": "account", "C": "constraint", "G": "gpus", "L": "licenses", "M": "clusters", "S": "core-spec", "p": "partition", "q": "qos"}


def _lsf(shape: JobShape) -> PicklingExecutor:
    from .lsf_executor import LsfExecutor

    machine, node = shape.machine, shape.machine.node
    executor = LsfExecutor(shape.folder, python=_python_words(shape))
    parameters = {
        "job_name": shape.name,
        "queue": machine.queue(shape.queue).name,
        "project": shape.account,
        "walltime_min": shape.walltime_min,
        "nodes": 1,
        "tasks_per_node": 1,
        "cpus_per_task": usable_cpu_cores(node),
        "gpus_per_node": node.num_gpus,
        "allocation": "nodes" if machine.starter == "jsrun" else "slots",
        "signal_delay_s": 60 * machine.warning_min,
        "array_parallelism": shape.num_at_once,
        "stderr_to_stdout": True,
        "setup": _setup_lines(shape),
        "directives": [line.strip().removeprefix("#BSUB").strip() for line in machine.header_lines],
    }
    executor.update_parameters(**{name: value for name, value in parameters.items() if value is not None})
    return executor


_EXECUTORS: dict[str, Callable[[JobShape], PicklingExecutor]] = {"local": _local, "slurm": _slurm, "lsf": _lsf}


def _setup_lines(shape: JobShape) -> list[str]:
    return [*shape.machine.setup_lines, f'export PATH={shlex.quote(str(Path(shape.python).parent))}:"$PATH"']


def _slurm_states(numbers: Sequence[str]) -> dict[str, str] | None:
    done = _call(["squeue", "--noheader", "--states=all", "--array", "--format=%i|%T", f"--jobs={','.join(numbers)}"])
    # Slurm forgets ended jobs after some minutes; when it knows none of them it says so.
    if done is None or (done.returncode and "Invalid job id" not in done.stderr):
        return None
    return dict(re.findall(r"^\s*(\d+(?:_\d+)?)\|([A-Z_]+)", done.stdout, re.MULTILINE))


def _lsf_states(numbers: Sequence[str]) -> dict[str, str] | None:
    from .lsf_executor import FORGOTTEN, read_states, states_argv

    done = _call(states_argv(numbers))
    found = read_states(done.stdout) if done is not None else {}
    if not found:
        return None
    states = {job_id: info["State"] for job_id, info in found.items()}
    known = {job_id.partition("_")[0] for job_id in states}
    # A number of which nothing at all is said is not forgotten: bjobs may have been cut off.
    return states if known.issuperset(numbers) or FORGOTTEN in states.values() else None


def _call(words: Sequence[str]) -> subprocess.CompletedProcess[str] | None:
    """Run a command of the scheduler; None when it does not answer."""
    try:
        return subprocess.run(list(words), stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False)
    except (subprocess.TimeoutExpired, FileNotFoundError):
        return None


@contextmanager
def _scrubbed_environment(scheduler: str) -> Iterator[None]:
    """submitit hands on our environment; what a surrounding job left in it must not reach a new one."""
    before = dict(os.environ)
    clean = submission.scrubbed(before, SCHEDULERS[scheduler].inherited_prefixes)
    try:
        for name in before.keys() - clean.keys():
            del os.environ[name]
        yield
    finally:
        os.environ.update(before)
