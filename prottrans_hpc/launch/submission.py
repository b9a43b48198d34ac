"""Speaking to schedulers: submit, ask, cancel, requeue. The only module of the launch side that runs their commands."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence

from .. import errors
from ..errors import SubmitError
from ..run_dir import RunDir
from ..terminal import printable, warn
from .job_state import State
from .own_job import VITALS
from .schedulers import SCHEDULERS, Scheduler

TIMEOUT_S = 120.0
"""A scheduler's daemon that is busy answers after a minute; one that is down never does."""
_OURS = (
    "PROTTRANS_RANK",
    "PROTTRANS_WORLD_SIZE",
    "PROTTRANS_LOCAL_RANK",
    "PROTTRANS_LOCAL_WORLD_SIZE",
    "PROTTRANS_NODE_RANK",
    "PROTTRANS_NONCE",
    "PROTTRANS_EXIT_CODE_FILE",
)
_KEPT = ("SLURM_CONF",)
"""Where a site's commands find their configuration; not about any job."""
_STATED = re.compile(
    r"HOME|USER|LOGNAME|SHELL|PATH|LANG|LC_\w+|TZ|SLURM_CONF"
    r"|LSF_(ENV|BIN|LIB|SERVER)DIR|XLSF_UIDDIR"
    r"|BASH_ENV|BASH_FUNC_.*|MODULESHOME|MODULEPATH|MODULEPATH_ROOT|MODULES_CMD|LMOD_\w+"  # so that `module load` works; not what is loaded
)
"""All that a job may have from the shell that submits it, where a scheduler would hand on everything."""


class MaybeSubmittedError(SubmitError):
    """The scheduler did not say whether it took a job."""


class InterruptedSubmissionError(MaybeSubmittedError):
    """Ctrl-C came before the scheduler's answer."""

    exit_code = errors.INTERRUPTED


def submit(scheduler: str, run_dir: RunDir, *, after: str | None = None, keep_open: Sequence[int] = ()) -> str:
    """Submit the job script of a run directory; the job id. Raises SubmitError with what the scheduler said.

    `after` is a job that must have ended, however, before this one starts. `keep_open` are descriptors for a local job.
    """
    speech = SCHEDULERS[scheduler]
    argv, doubt = speech.submit_argv(run_dir, after), f"The job may be in the queue: look for {run_dir.path.name} there before you try again"
    try:
        said = _call(argv, "submit the job", speech, timeout_s=TIMEOUT_S, keep_open=keep_open, submits=True)
    except _NoAnswerError as error:
        raise MaybeSubmittedError(f"{error}. {doubt}") from error.__cause__
    except KeyboardInterrupt as error:
        raise InterruptedSubmissionError(f"interrupted before {argv[0]} had answered. {doubt}") from error
    return speech.parse_job_id(said)


def states(scheduler: str, job_ids: Sequence[str], *, timeout_s: float = TIMEOUT_S) -> dict[str, State]:
    """The states of jobs, by one query; those that the scheduler has forgotten are left out.

    Raises SubmitError when it does not answer: that a job is gone is known only from a scheduler that says so.
    """
    if not job_ids:
        return {}
    speech = SCHEDULERS[scheduler]
    found = speech.parse_states(_call(speech.state_argv(job_ids), "tell the state of jobs", speech, timeout_s=timeout_s, excused=_FORGOTTEN[scheduler]))
    return {job_id: found[job_id] for job_id in job_ids if job_id in found}


_FORGOTTEN = {
    "local": r"\s*",  # grep finds no such process, and says nothing
    "slurm": r"\s*(slurm_load_jobs error: Invalid job id specified\s*)+",
    "lsf": r"\s*(Job <[\d\[\]]+> is not found\s*|No (unfinished )?job found\s*)+",
}
"""What the state command says on standard error, and fails, when it knows none or not all of the jobs."""


def cancel(scheduler: str, job_id: str, *, timeout_s: float = TIMEOUT_S) -> None:
    """Ask a job to save and stop. Raises SubmitError with what the scheduler said."""
    speech = SCHEDULERS[scheduler]
    _call(speech.cancel_argv(job_id), f"cancel job {job_id}", speech, timeout_s=timeout_s)


def exclude(scheduler: str, job_id: str, nodes: Sequence[str], *, timeout_s: float) -> bool:
    """Keep a job that waits from these nodes and no others; False where the scheduler cannot. Raises SubmitError with what it said."""
    speech = SCHEDULERS[scheduler]
    if speech.exclude_argv is None:
        return False
    _call(speech.exclude_argv(job_id, nodes), f"keep job {job_id} from {', '.join(nodes)}", speech, timeout_s=timeout_s)
    return True


def is_being_preempted(scheduler: str, job_id: str, *, timeout_s: float) -> bool:
    """Whether a job must make room for another and would be lost if it just ended. Raises SubmitError."""
    vitals = VITALS[scheduler]
    if vitals.facts_argv is None:
        return False
    said = _call(vitals.facts_argv(job_id), f"tell about job {job_id}", SCHEDULERS[scheduler], timeout_s=timeout_s)
    return vitals.is_being_preempted(said)


def lost_nodes(scheduler: str, nodes: Sequence[str], *, timeout_s: float) -> list[str]:
    """Those nodes that the scheduler knows to be down; [] for one that cannot be asked, or does not answer, of which it warns."""
    vitals = VITALS[scheduler]
    if vitals.lost_nodes_argv is None or not nodes:
        return []
    try:
        said = _call(vitals.lost_nodes_argv(nodes), "tell the states of nodes", SCHEDULERS[scheduler], timeout_s=timeout_s)
    except SubmitError as error:
        warn(str(error))
        return []
    return vitals.parse_lost_nodes(said)


def requeue(scheduler: str, job_id: str, *, timeout_s: float) -> None:
    """Have a running job ended and started again under its own id. Raises SubmitError with what the scheduler said."""
    _call(VITALS[scheduler].requeue_argv(job_id), f"requeue job {job_id}", SCHEDULERS[scheduler], timeout_s=timeout_s)


def ask(scheduler: str, argv: Sequence[str], purpose: str) -> str:
    """Standard output of a scheduler's command that only tells. Raises SubmitError with what it said when it failed."""
    return _call(argv, purpose, SCHEDULERS[scheduler], timeout_s=TIMEOUT_S)


def stated(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment of which a job's setup_lines know what is in it: what a person has loaded, activated or exported stays behind."""
    return {key: value for key, value in environment.items() if _STATED.fullmatch(key)}


def scrubbed(environment: Mapping[str, str], prefixes: Sequence[str]) -> dict[str, str]:
    """An environment without what a surrounding job, or a rank, left in it: an inherited binding slows or breaks a new job."""
    return {key: value for key, value in environment.items() if key in _KEPT or not (key.startswith(tuple(prefixes)) or key in _OURS)}


class _NoAnswerError(SubmitError):
    """A command that ran into its time limit; what it was to do may have been done."""


def _call(
    argv: Sequence[str],
    purpose: str,
    speech: Scheduler,
    *,
    timeout_s: float,
    keep_open: Sequence[int] = (),
    excused: str | None = None,
    submits: bool = False,
) -> str:
    """Standard output of a command. A failure is a SubmitError unless all that it says on standard error matches `excused`."""
    environment = scrubbed(os.environ, speech.inherited_prefixes)
    try:
        done = subprocess.run(
            list(argv),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=timeout_s,
            env=stated(environment) if submits and speech.hands_on_environment else environment,
            pass_fds=tuple(keep_open),
            check=False,
        )
    except FileNotFoundError:
        raise SubmitError(f"cannot {purpose}: there is no command {argv[0]!r} here. Run this on a login node of the machine, or use --dry-run") from None
    except subprocess.TimeoutExpired as error:
        raise _NoAnswerError(f"cannot {purpose}: {argv[0]} did not answer within {timeout_s:.0f} s") from error
    if done.returncode and not (excused is not None and re.fullmatch(excused, done.stderr)):
        said = " ".join(printable(line, 400) for line in done.stderr.splitlines() if line.strip())
        raise SubmitError(f"cannot {purpose}: {argv[0]} says: {said or f'exit code {done.returncode}'}")
    return done.stdout
