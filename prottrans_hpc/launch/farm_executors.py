"""How each scheduler is asked, through submitit, for a job of a farm: one submitit executor from the shape of the job.

The scheduler is what the machine profile says; submitit's own detection is never used.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..machine import Machine, usable_cpu_cores

if TYPE_CHECKING:
    from submitit.core.core import PicklingExecutor

_FOREVER_MIN = 60 * 24 * 365
_ARRAY_SIZE = 1_000
"""Slurm and LSF refuse larger arrays unless the site says otherwise."""


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


def largest_array(machine: Machine) -> int:
    """Jobs that are submitted together, and so many at most are in the queue at the same time."""
    return min(_ARRAY_SIZE, machine.max_queued_jobs or _ARRAY_SIZE)


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
        # All of the memory: exclusive nodes alone give the site's default share of it.
        "additional_parameters": {"requeue": True, "mem": "0", **_slurm_options(machine.header_lines)},
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


EXECUTORS: dict[str, Callable[[JobShape], PicklingExecutor]] = {"local": _local, "slurm": _slurm, "lsf": _lsf}


def _setup_lines(shape: JobShape) -> list[str]:
    return ["set -eo pipefail", *shape.machine.setup_lines, f'export PATH={shlex.quote(str(Path(shape.python).parent))}:"$PATH"']
