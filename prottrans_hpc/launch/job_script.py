"""The job script: readable shell around one starter. Pure; the scheduler and the starter never know each other.

`STARTERS` says how each program that starts ranks is called, and as which signal it must be told to stop so that
the ranks hear of it.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from .. import __version__, config
from ..errors import ConfigError
from ..machine import Allocation, Machine
from ..run_dir import RunDir
from .tether import CODE_FILE_PREFIX

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True)
class Job:
    """One gang: all ranks at once run one stage on one run directory."""

    stage: str
    name: str
    """For people and schedulers; `check_name` holds."""
    run_dir: RunDir
    machine: Machine
    allocation: Allocation
    python: str
    """The interpreter of the ranks, an absolute path."""
    flags: tuple[str, ...] = ()
    """For the ranks: ("--quiet",), ("--verbose",) or nothing."""

    def __post_init__(self) -> None:
        config.check_name(self.name, what="the job name")
        for what, text in (("the run directory", str(self.run_dir.path)), ("the Python interpreter", self.python)):
            if _CONTROL.search(text) or not PurePath(text).is_absolute():
                raise ConfigError(f"{what} {text!r} must be an absolute path without control characters")

    @property
    def command(self) -> list[str]:
        """What every rank runs. -P: a torch.py in the current folder is not torch."""
        return [self.python, "-P", "-m", "prottrans_hpc", self.stage, str(self.run_dir.path), *self.flags]

    def module(self, name: str) -> list[str]:
        """The call of a module of the launch side."""
        return [self.python, "-P", "-m", f"prottrans_hpc.launch.{name}"]


@dataclass(frozen=True)
class Starter:
    """A program that starts the ranks of a job."""

    argv: Callable[[Job], list[str]]
    signals: Mapping[str, str]
    """Signal that the script gets -> signal that the starter is sent, so that all ranks are asked to stop."""
    setup: tuple[str, ...] = ()
    """Shell lines that the starter needs."""
    is_ours: bool = False
    """Ours ends with the script; others are tethered to it where no batch system does it."""
    hides_codes: bool = False
    """It ends with a code of its own when a rank fails; the rank leaves its own in the run directory."""


def _processes(job: Job) -> list[str]:
    places = ["--nodes", str(job.allocation.num_nodes), "--ranks-per-node", str(job.allocation.ranks_per_node), "--run-dir", str(job.run_dir.path)]
    # The ranks take signals as soon as Python runs in them; what comes earlier waits.
    return [*job.module("local_ranks"), *places, "--hold-stop-signals", "--", *job.command]


def _mpirun(job: Job) -> list[str]:
    # Without --bind-to none Open MPI would put all threads of a rank on one core.
    return ["mpirun", "-np", str(job.allocation.num_ranks), "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", *_tethered(job, job.command)]


def _torchrun(job: Job) -> list[str]:
    gang = ["--standalone", "--nnodes", "1", "--nproc-per-node", str(job.allocation.num_ranks)]
    watched = [*job.module("tether"), "--codes", str(job.run_dir.path), *job.command]
    return [job.python, "-P", "-m", "torch.distributed.run", *gang, "--no-python", *watched]


def _none(job: Job) -> list[str]:
    return job.command


def _tethered(job: Job, argv: list[str]) -> list[str]:
    return [*job.module("tether"), *argv] if job.machine.scheduler == "local" else argv


_SAME = {"TERM": "TERM", "INT": "TERM", "USR1": "USR1", "USR2": "USR2"}
"""A shell starts background processes with SIGINT ignored; TERM asks for the same and cannot be missed."""

STARTERS: dict[str, Starter] = {
    "processes": Starter(_processes, _SAME, is_ours=True),
    # mpirun passes on USR1 and USR2; TERM and INT would end the ranks before they have saved.
    "mpirun": Starter(
        _mpirun,
        {"TERM": "USR1", "INT": "USR1", "USR1": "USR1", "USR2": "USR2"},
        setup=(
            "# Open MPI refuses to run as root, as one is in many containers, unless told twice.",
            'if [ "$(id -u)" = 0 ]; then',
            "  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1",
            "fi",
        ),
    ),
    # torchrun passes on TERM and dies of USR1 and USR2.
    "torchrun": Starter(_torchrun, {"TERM": "TERM", "INT": "TERM", "USR1": "TERM", "USR2": "TERM"}, hides_codes=True),
    "none": Starter(_none, _SAME),
}


def render(job: Job, header: Sequence[str]) -> bytes:
    """The bytes of the job script; `header` holds the scheduler's directives."""
    starter = STARTERS[job.machine.starter]
    argv = starter.argv(job) if starter.is_ours else _tethered(job, starter.argv(job))
    lines = [
        "#!/bin/bash",
        *header,
        f"# prottrans-hpc {__version__}: {job.stage} {job.name} on {_comment(job.machine.name)}, {num_ranks_text(job.allocation)}",
        "set -euo pipefail",
        f"run_dir={shlex.quote(str(job.run_dir.path))}",
        "",
        "# Whoever comes later finds the exit code in the run directory.",
        f"""trap 'code=$?; printf "%s\\n" "$code" > "$run_dir/{job.run_dir.exit_code.name}" || true; exit "$code"' EXIT""",
        "",
        *_setup_lines(job.machine),
        *_environment_lines(job),
        *starter.setup,
        "",
        *_signal_lines(starter.signals),
        "",
        *_command_lines(argv, job.run_dir),
        *_WAIT_LINES,
        *(_HIDDEN_CODE_LINES if starter.hides_codes else ()),
        *_EXIT_LINES,
    ]
    return os.fsencode("\n".join(lines) + "\n")


def num_ranks_text(allocation: Allocation) -> str:
    """ "2 nodes x 1 rank", for people."""
    nodes, ranks = allocation.num_nodes, allocation.ranks_per_node
    return f"{nodes} {'node' if nodes == 1 else 'nodes'} x {ranks} {'rank' if ranks == 1 else 'ranks'}"


def _comment(text: str) -> str:
    return _CONTROL.sub("?", text)


def _setup_lines(machine: Machine) -> list[str]:
    if not machine.setup_lines:
        return []
    return ["# Modules and virtual environments use variables that are not set.", "set +u", *machine.setup_lines, "set -u", ""]


def _environment_lines(job: Job) -> list[str]:
    lines = [
        f'export PATH={shlex.quote(str(PurePath(job.python).parent))}:"$PATH"',
        f"export OMP_NUM_THREADS={job.allocation.cpu_cores_per_rank}",
        "# With it the ranks of this start know one another from strangers.",
        "PROTTRANS_NONCE=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \\n')",
        "export PROTTRANS_NONCE",
    ]
    if job.allocation.gpus_per_rank == 0:
        lines += ["# The machine profile has no GPUs: ranks must not share one that happens to be there.", "export CUDA_VISIBLE_DEVICES="]
    return lines


def _signal_lines(signals: Mapping[str, str]) -> list[str]:
    return [
        "# A signal goes on to the starter, which tells the ranks: they save a checkpoint and end with 75.",
        "starter='' stop='' interrupted=''",
        "# shellcheck disable=SC2317 # the traps call it",
        "pass_on() {",
        "  stop=$1 interrupted=yes",
        '  if [ -n "$starter" ]; then kill -s "$1" "$starter" 2>/dev/null || true; fi',
        "}",
        *(f"trap 'pass_on {sent}' {received}" for received, sent in signals.items()),
    ]


def _command_lines(argv: Sequence[str], run_dir: RunDir) -> list[str]:
    """The starter in the background, folded into readable lines."""
    lines, line = [], ""
    for word in argv:
        quoted = '"$run_dir"' if word == str(run_dir.path) else shlex.quote(word)
        if line and len(line) + len(quoted) > _LINE_WIDTH:
            lines.append(f"{line} \\")
            line = "   "
        line = f"{line} {quoted}" if line else quoted
    return [*lines, f"{line} &", "starter=$!"]


_LINE_WIDTH = 120
_WAIT_LINES = (
    'if [ -n "$stop" ]; then kill -s "$stop" "$starter" 2>/dev/null || true; fi',
    "",
    "# A signal ends a wait early; the starter's own exit code comes with a later one.",
    "code=''",
    'while [ -z "$code" ] || [ -n "$interrupted" ]; do',
    "  interrupted='' status=0",
    '  wait "$starter" || status=$?',
    '  if [ -z "$code" ] || [ "$status" -ne 127 ]; then code=$status; fi',
    "done",
)
_HIDDEN_CODE_LINES = (
    "# The starter does not pass on the exit codes of the ranks; the first that failed has left its own.",
    f'code_file="$run_dir/{CODE_FILE_PREFIX}$PROTTRANS_NONCE"',
    'if [ "$code" -ne 0 ] && [ -s "$code_file" ]; then code=$(cat "$code_file"); fi',
    'rm -f "$code_file"',
)
_EXIT_LINES = (
    "# Killed by the very signal that asks to stop, before it could be taken: stopped all the same.",
    'if [ -n "$stop" ]; then case "$code" in 130 | 138 | 140 | 143) code=75 ;; esac; fi',
    'exit "$code"',
)
