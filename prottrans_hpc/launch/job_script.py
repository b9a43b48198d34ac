"""The job script: readable shell around one starter. Pure; the scheduler and the starter never know each other."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath

from .. import __version__
from ..machine import Machine
from ..run_dir import RunDir
from .job import Job, num_ranks_text, printable_line
from .starters import STARTERS, Starter, tethered
from .tether import CODE_FILE_PREFIX


def render(job: Job, header: Sequence[str]) -> bytes:
    """The bytes of the job script; `header` holds the scheduler's directives."""
    starter = STARTERS[job.machine.starter]
    lines = [
        "#!/bin/bash",
        *header,
        f"# prottrans-hpc {__version__}: {job.stage} {job.name} on {printable_line(job.machine.name)}, {num_ranks_text(job.allocation)}",
        "set -euo pipefail",
        f"run_dir={shlex.quote(str(job.run_dir.path))}",
        "",
        *_exit_trap_lines(job),
        "",
        *setup_lines(job.machine),
        *_environment_lines(job),
        *starter.setup,
        "",
        *(_stop_file_lines if starter.asks_by_file else _signal_lines)(starter.signals),
        "",
        *_begin_lines(job),
        *_preflight_lines(job, starter),
        *_command_lines(_start_argv(job, starter), job.run_dir, starter),
        *_WAIT_LINES,
        *_forget_lines(starter),
        *(_HIDDEN_CODE_LINES if starter.hides_codes else ()),
        *_STOPPED_LINES,
        *_end_lines(job),
        'exit "$code"',
    ]
    return os.fsencode("\n".join(lines) + "\n")


def _exit_trap_lines(job: Job) -> list[str]:
    write = f"""printf "%s\\n" "$code" > "$run_dir/{job.run_dir.exit_code.name}" || true"""
    if job.machine.scheduler == "local":
        return ["# Whoever comes later finds the exit code in the run directory.", f"""trap 'code=$?; {write}; exit "$code"' EXIT"""]
    return [
        "# Whoever comes later finds the exit code in the run directory, unless the directory is another job's.",
        "next=''",
        f"""trap 'code=$?; if [ "$next" != refused ]; then {write}; fi; exit "$code"' EXIT""",
    ]


def _begin_lines(job: Job) -> list[str]:
    """A batch job asks whether the run is its to work on; processes of this computer hold a lock instead."""
    if job.machine.scheduler == "local":
        return []
    return [
        "# One job at a time works in a run directory, and none where nothing is left to do.",
        f"next=$({_own_call(job, 'begin')})",
        'if [ "$next" = finished ]; then exit 0; fi',
        "",
    ]


def _end_lines(job: Job) -> list[str]:
    if job.machine.scheduler == "local":
        return []
    return ["# Notes how the ranks ended, and settles what becomes of this job and of those that wait for it.", f'{_own_call(job, "end")} "$code" || true']


def _preflight_lines(job: Job, starter: Starter) -> list[str]:
    """The ranks of the preflight are started, and waited for, as those of the training are; what they found decides whether these start."""
    if not job.preflight:
        return []
    if job.allocation.num_ranks == 1:
        return ['echo "preflight: one rank has nobody to talk to, so nothing is measured" >&2', ""]
    measuring = _start_argv(replace(job, stage="preflight"), starter)
    argv = [*job.module("preflight"), job.machine.scheduler, str(job.run_dir.path), *job.flags, "--", *measuring]
    at_end = [*_STOPPED_LINES, 'if [ "$code" -ne 0 ]; then', *(f"  {line}" for line in (*_forget_lines(starter), *_end_lines(job))), '  exit "$code"', "fi", ""]
    return [
        "# The network between this job's own nodes is measured first. Where a node is slow, or nothing could be measured, no rank of the training starts.",
        *_command_lines(argv, job.run_dir, replace(starter, asks_by_file=False)),
        *_WAIT_LINES,
        *at_end,
    ]


def _start_argv(job: Job, starter: Starter) -> list[str]:
    """What starts the ranks."""
    return starter.argv(job) if starter.is_ours else tethered(job, starter.argv(job))


def _forget_lines(starter: Starter) -> tuple[str, ...]:
    return ('rm -f "$stop_file"',) if starter.asks_by_file else ()


def _own_call(job: Job, module: str) -> str:
    return f'{shlex.join(job.module(module))} {job.machine.scheduler} "$run_dir"'


def setup_lines(machine: Machine) -> list[str]:
    """What prepares the environment of a job."""
    if not machine.setup_lines:
        return []
    return ["# Modules and virtual environments use variables that are not set.", "set +u", *machine.setup_lines, "set -u", ""]


def _environment_lines(job: Job) -> list[str]:
    lines = [
        f'export PATH={shlex.quote(str(PurePath(job.own_python).parent))}:"$PATH"',
        f"export OMP_NUM_THREADS={job.allocation.cpu_cores_per_rank}",
        "# With it the ranks of this start know one another from strangers.",
        "PROTTRANS_NONCE=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \\n')",
        "export PROTTRANS_NONCE",
    ]
    if job.machine.scheduler == "local":
        lines.append("# Others use this computer, too: a thread that waits for its mates gives its core away.")
        lines.append('export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"')
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


def _stop_file_lines(signals: Mapping[str, str]) -> list[str]:
    return [
        "# What the starter does with a signal is not known. It is shielded from them, and a file asks the ranks instead: rank 0 looks",
        "# for it after every step; then all of them save a checkpoint and end with 75. Its name is that of this start only.",
        'stop_file="$run_dir/.stop-$(printf %s "$PROTTRANS_NONCE" | sha256sum | cut -c 1-16)"',
        "stop='' interrupted=''",
        "# shellcheck disable=SC2317 # the traps call it",
        "pass_on() {",
        "  stop=$1 interrupted=yes",
        """  printf 'SIG%s\\n' "$1" > "$stop_file" || true""",
        "}",
        *(f"trap 'pass_on {sent}' {received}" for received, sent in signals.items()),
    ]


def _command_lines(argv: Sequence[str], run_dir: RunDir, starter: Starter) -> list[str]:
    """The starter in the background, folded into readable lines."""
    lines, line = [], f"(trap '' {' '.join(starter.signals)}; exec" if starter.asks_by_file else ""
    for word in argv:
        quoted = '"$run_dir"' if word == str(run_dir.path) else shlex.quote(word)
        if line and len(line) + len(quoted) > _LINE_WIDTH:
            lines.append(f"{line} \\")
            line = "   "
        line = f"{line} {quoted}" if line else quoted
    if starter.asks_by_file:
        return [*lines, f"{line}) &", "starter=$!", ""]
    return [*lines, f"{line} &", "starter=$!", 'if [ -n "$stop" ]; then kill -s "$stop" "$starter" 2>/dev/null || true; fi', ""]


_LINE_WIDTH = 120
_WAIT_LINES = (
    "# A signal ends a wait early; the starter's own exit code comes with a later one.",
    "code=''",
    'while [ -z "$code" ] || [ -n "$interrupted" ]; do',
    "  interrupted='' status=0",
    '  wait "$starter" || status=$?',
    '  if [ -z "$code" ] || [ "$status" -ne 127 ]; then code=$status; fi',
    "done",
)
_HIDDEN_CODE_LINES = (
    "# The starter may not pass on the exit codes of the ranks; the first that failed has left its own. One that was killed could not:",
    "# the ranks that lost it left 75, which says less than the signal that the starter tells of.",
    f"code_file=\"$run_dir/{CODE_FILE_PREFIX}$PROTTRANS_NONCE\" left=''",
    'if [ -s "$code_file" ]; then left=$(cat "$code_file"); fi',
    'if [ "$left" = 75 ] && [ -z "$stop" ] && [ "$code" -gt 128 ]; then left=\'\'; fi',
    "code=${left:-$code}",
    'rm -f "$code_file"',
)
_STOPPED_LINES = (
    "# Killed by the very signal that asks to stop, before it could be taken: stopped all the same.",
    'if [ -n "$stop" ]; then case "$code" in 130 | 138 | 140 | 143) code=75 ;; esac; fi',
)
