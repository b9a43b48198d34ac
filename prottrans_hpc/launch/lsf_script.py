"""The script of a submitit job on LSF: parameters in, text out. Pure; `lsf_executor.py` submits it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_PLAIN = re.compile(r"[A-Za-z0-9._:@/,=+%-]+")
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\"\\$`]")

WARNING_FILE = "SUBMITIT_LSF_WARNING_FILE"
"""Names the file that appears when LSF warns a job whose tasks no signal reaches."""
REQUEUE_SUFFIX = ".requeue"
"""Of the file by which such a task asks its script to be queued again."""


@dataclass(frozen=True)
class LsfParameters:
    """What `update_parameters(lsf_NAME=...)` may set. Raises ValueError for what LSF or a shell would misread."""

    job_name: str = "submitit"
    walltime_min: int = 5
    nodes: int = 1
    tasks_per_node: int = 1
    cpus_per_task: int = 1
    gpus_per_node: int = 0
    mem_gb: float | None = None
    """Of a node. For allocation "slots" only: elsewhere a job has its nodes to itself."""
    queue: str | None = None
    project: str | None = None
    """What is charged (-P)."""
    allocation: Literal["slots", "nodes"] = "slots"
    """How a job asks for its place: -n with span[ptile], as on most clusters, or -nnodes and jsrun, as on Summit."""
    array_parallelism: int = 256
    """Elements of an array that run at the same time."""
    signal_delay_s: int = 120
    """From the warning signal to the end of the walltime; LSF counts minutes, so it is rounded up."""
    rerunnable: bool = True
    """Start again when the host fails."""
    stderr_to_stdout: bool = False
    setup: Sequence[str] = ()
    """Shell lines before the command."""
    launcher: Sequence[str] | None = None
    """Words that start the tasks; None: jsrun for "nodes", mpirun for several tasks in "slots", nothing for one."""
    directives: Sequence[str] = ()
    """More directives, each as it follows #BSUB."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.job_name):
            raise ValueError(f"the job name {self.job_name!r} must be 1 to 64 letters, digits, '.', '_' or '-', not starting with '.' or '-'")
        for name in ("walltime_min", "nodes", "tasks_per_node", "cpus_per_task", "array_parallelism"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.allocation not in ("slots", "nodes"):
            raise ValueError(f"allocation is 'slots' or 'nodes', not {self.allocation!r}")
        if self.gpus_per_node % self.tasks_per_node:
            raise ValueError(f"{self.gpus_per_node} GPUs of a node cannot be shared equally by {self.tasks_per_node} tasks")
        for line in self.directives:
            if re.search(r"[\x00-\x1f]", line):
                raise ValueError(f"the directive {line!r} must be one line")
        if any(re.match(r"\s*#\s*BSUB", line) for text in self.setup for line in text.splitlines()):
            raise ValueError("setup holds shell lines; directives belong into `directives`")

    @property
    def num_tasks(self) -> int:
        """Of a job, or of each element of an array."""
        return self.nodes * self.tasks_per_node


PARAMETERS = frozenset(field.name for field in fields(LsfParameters))


def render(command: str, parameters: LsfParameters, *, folder: str, stdout: str, stderr: str, array_size: int | None, warning_signal: str) -> str:
    """The script. `command` is a shell command already; the paths of the logs may hold LSF's %J and %I; `folder` is seen by all nodes."""
    directives = _directives(parameters, array_size, warning_signal)
    directives.append(f"-o {quoted('the path of the log', stdout)}")
    if not parameters.stderr_to_stdout:
        directives.append(f"-e {quoted('the path of the log', stderr)}")
    words = " ".join([*map(shlex.quote, launcher(parameters)), command])
    lines = ["#!/bin/bash", *(f"#BSUB {directive}" for directive in (*directives, *parameters.directives)), ""]
    lines += [*parameters.setup, *([""] if parameters.setup else []), "export SUBMITIT_EXECUTOR=lsf"]
    lines += _by_file(words, folder, warning_signal) if parameters.allocation == "nodes" else _by_signal(words, warning_signal)
    return "\n".join([*lines, ""])


def _by_signal(words: str, warning_signal: str) -> list[str]:
    return [
        "# LSF sends the warning to every process of the job; this shell must outlive it, the task knows what to do.",
        f"trap : {warning_signal}",
        words,
    ]


def _by_file(words: str, folder: str, warning_signal: str) -> list[str]:
    return [
        "# What jsrun does with a signal is not known, and compute nodes have no brequeue: warning and requeue go by files.",
        'job=$LSB_JOBID; if [ "${LSB_JOBINDEX:-0}" != 0 ]; then job="${LSB_JOBID}[$LSB_JOBINDEX]"; fi',
        f'export {WARNING_FILE}={shlex.quote(folder)}/".warned-$job"',
        f'rm -f "${WARNING_FILE}" "${WARNING_FILE}{REQUEUE_SUFFIX}"',
        f"""trap 'touch "${WARNING_FILE}" || :' {warning_signal}""",
        f"(trap '' {warning_signal}; exec {words}) &",
        "task=$! code=0",
        "# A signal ends a wait early.",
        'while kill -0 "$task" 2>/dev/null; do code=0; wait "$task" || code=$?; done',
        f'rm -f "${WARNING_FILE}"',
        f'if [ -e "${WARNING_FILE}{REQUEUE_SUFFIX}" ]; then',
        f'  rm -f "${WARNING_FILE}{REQUEUE_SUFFIX}"',
        '  brequeue "$job" && sleep 600',
        "fi",
        'exit "$code"',
    ]


def _directives(parameters: LsfParameters, array_size: int | None, warning_signal: str) -> list[str]:
    name = parameters.job_name
    if array_size is not None:
        name = f'"{name}[1-{array_size}]%{min(array_size, parameters.array_parallelism)}"'
    lines = [f"-J {name}"]
    for flag, what, value in (("-P", "the project", parameters.project), ("-q", "the queue", parameters.queue)):
        lines += [f"{flag} {quoted(what, value)}"] if value is not None else []
    lines += [f"-W {parameters.walltime_min // 60}:{parameters.walltime_min % 60:02d}", *_place(parameters)]
    # LSF counts whole minutes, and a warning must come after the start.
    warning_min = min(-(-parameters.signal_delay_s // 60), parameters.walltime_min - 1)
    lines += [f"-wa {warning_signal}", f"-wt {warning_min}"] if warning_min > 0 else []
    return [*lines, "-r" if parameters.rerunnable else "-rn"]


def _place(parameters: LsfParameters) -> list[str]:
    if parameters.allocation == "nodes":
        return [f"-nnodes {parameters.nodes}"]
    per_node = parameters.tasks_per_node * parameters.cpus_per_task
    lines = [f"-n {parameters.nodes * per_node}", f'-R "span[ptile={per_node}]"']
    if parameters.gpus_per_node:
        lines.append(f'-gpu "num={parameters.gpus_per_node}"')
    if parameters.mem_gb is not None:
        # rusage reserves, per host; a limit (-M) would be per process on some sites and per job on others.
        lines.append(f'-R "rusage[mem={round(parameters.mem_gb * 1024)}MB]"')
    return lines


def launcher(parameters: LsfParameters) -> list[str]:
    """The words in front of the command that start all tasks."""
    if parameters.launcher is not None:
        return list(parameters.launcher)
    tasks, per_node, cores = parameters.num_tasks, parameters.tasks_per_node, parameters.cpus_per_task
    if parameters.allocation == "nodes":
        # The script runs on a launch node; only jsrun reaches the compute nodes. Its defaults differ between sites.
        shares = {"-n": tasks, "-r": per_node, "-a": 1, "-c": cores, "-g": parameters.gpus_per_node // per_node}
        return ["jsrun", *(str(word) for share in shares.items() for word in share), "-b", f"packed:{cores}", "-l", "gpu-cpu", "-d", "packed"]
    return ["mpirun", "-np", str(tasks), "--map-by", f"ppr:{per_node}:node", "--bind-to", "none"] if tasks > 1 else []


def quoted(what: str, value: Any) -> str:
    """A word of a directive. Raises ValueError for text that LSF or a shell could take apart or expand."""
    text = str(value)
    if _UNSAFE.search(text) or not text or text.startswith("-"):
        raise ValueError(f"{what} {text!r} cannot stand in a job script: it is empty, begins with '-', or has control characters, quotes, \\ or $")
    return text if _PLAIN.fullmatch(text) else f'"{text}"'
