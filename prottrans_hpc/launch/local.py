"""The scheduler "local": this computer, at once. The same six pure functions as every scheduler; no I/O here.

A job in the background is a shell in a session of its own; its process id is the job id.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import ConfigError, SubmitError
from ..run_dir import RunDir
from .job import Job
from .job_state import State

_SUBMIT = 'setsid -- bash "$1" >>"$2" 2>&1 </dev/null & echo "$!"'


def render_header(job: Job) -> list[str]:
    """Directives of the scheduler: none."""
    return []


def submit_argv(run_dir: RunDir, after: str | None) -> list[str]:
    """The command that starts the job script in the background and prints the job id. Nothing queues here, so `after` must be None."""
    if after is not None:
        raise ConfigError("the local scheduler runs a job at once and cannot chain it after another: leave --chain out")
    return ["bash", "-c", _SUBMIT, "submit", str(run_dir.job_script), str(run_dir.job_log)]


def parse_job_id(output: str) -> str:
    """The job id in what the submit command printed. Raises SubmitError."""
    match = re.fullmatch(r"\s*(\d+)\s*", output)
    if not match:
        raise SubmitError(f"the job was not started: the shell answered {output!r} instead of a process id")
    return match[1]


def state_argv(job_ids: Sequence[str]) -> list[str]:
    """The command that tells the states of jobs. Not ps, which a bare system lacks."""
    return ["grep", "-s", "-H", "^State:", *(f"/proc/{job_id}/status" for job_id in job_ids)]


def parse_states(output: str) -> dict[str, State]:
    """Job id -> state, from the state command's output; a job that has ended is not in it."""
    found = re.findall(r"^/proc/(\d+)/status:State:\s+(\S)", output, re.MULTILINE)
    return {job_id: State.RUNNING if letter in "RSDTt" else State.UNKNOWN for job_id, letter in found if letter not in "ZX"}


def cancel_argv(job_id: str) -> list[str]:
    """The command that asks a job to save and stop."""
    return ["bash", "-c", 'kill -s TERM -- "$1"', "cancel", job_id]
