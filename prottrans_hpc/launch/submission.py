"""Speaking to schedulers: submit, ask, cancel. The only module of the launch side that runs their commands."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence

from ..errors import SubmitError
from ..run_dir import RunDir
from ..terminal import printable
from .job_state import State
from .schedulers import SCHEDULERS, Scheduler

_TIMEOUT_S = 120.0
"""A scheduler's daemon that is busy answers after a minute; one that is down never does."""
_OURS = ("PROTTRANS_RANK", "PROTTRANS_WORLD_SIZE", "PROTTRANS_LOCAL_RANK", "PROTTRANS_LOCAL_WORLD_SIZE", "PROTTRANS_NODE_RANK", "PROTTRANS_NONCE")


def submit(scheduler: str, run_dir: RunDir, *, after: str | None = None, keep_open: Sequence[int] = ()) -> str:
    """Submit the job script of a run directory; the job id. Raises SubmitError with what the scheduler said.

    `after` is a job that must have ended, however, before this one starts. `keep_open` are descriptors for a local job.
    """
    speech = SCHEDULERS[scheduler]
    return speech.parse_job_id(_call(speech.submit_argv(run_dir, after), "submit the job", speech, keep_open))


def states(scheduler: str, job_ids: Sequence[str]) -> dict[str, State]:
    """The states of jobs, by one query; those that the scheduler has forgotten are left out. Raises SubmitError when it does not answer."""
    if not job_ids:
        return {}
    speech = SCHEDULERS[scheduler]
    found = speech.parse_states(_call(speech.state_argv(job_ids), "tell the state of jobs", speech, check=False))
    return {job_id: found[job_id] for job_id in job_ids if job_id in found}


def cancel(scheduler: str, job_id: str) -> None:
    """Ask a job to save and stop. Raises SubmitError with what the scheduler said."""
    speech = SCHEDULERS[scheduler]
    _call(speech.cancel_argv(job_id), f"cancel job {job_id}", speech)


def scrubbed(environment: Mapping[str, str], prefixes: Sequence[str]) -> dict[str, str]:
    """An environment without what a surrounding job, or a rank, left in it: an inherited binding slows or breaks a new job."""
    return {key: value for key, value in environment.items() if not key.startswith(tuple(prefixes)) and key not in _OURS}


def _call(argv: Sequence[str], purpose: str, speech: Scheduler, keep_open: Sequence[int] = (), *, check: bool = True) -> str:
    try:
        done = subprocess.run(
            list(argv),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=_TIMEOUT_S,
            env=scrubbed(os.environ, speech.inherited_prefixes),
            pass_fds=tuple(keep_open),
            check=False,
        )
    except FileNotFoundError:
        raise SubmitError(f"cannot {purpose}: there is no command {argv[0]!r} here. Run this on a login node of the machine, or use --dry-run") from None
    except subprocess.TimeoutExpired:
        raise SubmitError(f"cannot {purpose}: {argv[0]} did not answer within {_TIMEOUT_S:.0f} s. Look whether it was done before you try again") from None
    if check and done.returncode:
        said = " ".join(printable(line, 400) for line in done.stderr.splitlines() if line.strip())
        raise SubmitError(f"cannot {purpose}: {argv[0]} says: {said or f'exit code {done.returncode}'}")
    return done.stdout
