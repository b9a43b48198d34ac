"""All points of a scaling study inside one allocation: a job script that runs theirs one after another, and the report behind them."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace

from .. import __version__, durable, run_dir
from ..run_dir import RunDir
from ..scaling_study import StudyPoint, write_study
from . import gang, submission
from .gang import Plan
from .job import Job, printable_line
from .job_script import render, setup_lines
from .scale import Order, plan_of
from .schedulers import SCHEDULERS

REPORT = "scale-report"
"""The stage."""


def plans_of(order: Order, missing: Sequence[StudyPoint]) -> list[Plan]:
    """The points as runs."""
    return [plan_of(order, point, order.folder.next_attempt(point)) for point in missing]


def inner_script(plan: Plan) -> bytes:
    """What runs a point within the allocation: its job script without directives."""
    return render(plan.job, [])


def outer_job(order: Order, plans: Sequence[Plan]) -> Job:
    """The job that holds the largest point."""
    largest = max(plans, key=lambda plan: plan.allocation.num_nodes)
    return replace(largest.job, stage="scale", name=f"scale-{gang.usable_name(order.folder.path.name)}"[:64], run_dir=order.folder.job)


def render_outer(order: Order, plans: Sequence[Plan]) -> bytes:
    """The job script of the allocation. Pure."""
    job = outer_job(order, plans)
    report = [*job.module("stage_process"), REPORT, str(_request(order.folder.job))]
    lines = [
        "#!/bin/bash",
        *SCHEDULERS[job.machine.scheduler].render_header(job),
        f"# prottrans-hpc {__version__}: a scaling study of {len(plans)} points on {printable_line(job.machine.name)}, one after another",
        "set -uo pipefail",
        f"exit_file={shlex.quote(str(job.run_dir.exit_code))}",
        """trap 'code=$?; printf "%s\\n" "$code" > "$exit_file" || true; exit "$code"' EXIT""",
        "",
        "# A signal goes on to the point that runs; those after it are left for the next job.",
        "point='' stop='' code=0",
        "# shellcheck disable=SC2317 # the traps call it",
        'pass_on() { stop=$1; if [ -n "$point" ]; then kill -s "$1" "$point" 2>/dev/null || true; fi; }',
        *(f"trap 'pass_on {name}' {name}" for name in ("TERM", "INT", "USR1", "USR2")),
        "measure() {",
        '  if [ -n "$stop" ]; then return; fi',
        "  local status=''",
        '  bash "$1/job.sh" &',
        "  point=$!",
        '  while [ -z "$status" ] || kill -0 "$point" 2>/dev/null; do status=0; wait "$point" || status=$?; done',
        "  point=''",
        '  if [ "$status" -ne 0 ]; then echo "$1 ended with exit code $status" >&2; code=$status; else rm -rf "$1/checkpoints"; fi',
        "}",
        "",
        *(f"measure {shlex.quote(str(plan.run_dir.path))}" for plan in plans),
        "",
        *setup_lines(job.machine),
        f"{shlex.join(report)} || true",
        'if [ -n "$stop" ]; then exit 75; fi',
        'exit "$code"',
    ]
    return os.fsencode("\n".join(lines) + "\n")


def _request(job: RunDir) -> os.PathLike[str]:
    return job.path / "report.json"


def submit(order: Order, missing: Sequence[StudyPoint]) -> RunDir:
    """Write everything down and submit the one job; where its script and its log are."""
    plans = plans_of(order, missing)
    write_study(order.folder, order.study)
    for plan in plans:
        gang.set_up(plan, inner_script(plan))
    outer = run_dir.prepare(order.folder.job.path)
    durable.write_json(outer.path / "report.json", {"out": str(order.folder.path)})
    durable.write_bytes(outer.job_script, render_outer(order, plans))
    job_id = submission.submit(order.machine.scheduler, outer)
    for directory in (outer, *(plan.run_dir for plan in plans)):
        gang.belongs_to(directory, order.machine.scheduler, job_id, account=order.account)
    return outer


def write_scripts(order: Order, missing: Sequence[StudyPoint], *, one_job: bool) -> None:
    """Print what would run, for a dry run."""
    plans = plans_of(order, missing)
    sys.stdout.flush()
    for script in [render_outer(order, plans), *map(inner_script, plans)] if one_job else [plan.script for plan in plans]:
        sys.stdout.buffer.write(script + b"\n")
