"""The table of schedulers: six pure functions each, and nothing else is known of them anywhere.

None of the functions does any I/O: they make argument vectors and read what the commands printed. `submission.py`
runs the commands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..run_dir import RunDir
from . import local, lsf, slurm
from .job import Job
from .job_state import State


@dataclass(frozen=True)
class Scheduler:
    """How one scheduler is spoken to."""

    render_header: Callable[[Job], list[str]]
    """Directives at the top of the job script."""
    submit_argv: Callable[[RunDir, str | None], list[str]]
    """`(run directory, id of a job that must have ended first or None)` -> the command that submits its job.sh."""
    parse_job_id: Callable[[str], str]
    """Standard output of that command -> job id. Raises SubmitError."""
    state_argv: Callable[[Sequence[str]], list[str]]
    """One command that tells the states of many jobs."""
    parse_states: Callable[[str], Mapping[str, State]]
    """Its standard output -> state by job id; a job that the scheduler has forgotten is not in it."""
    cancel_argv: Callable[[str], list[str]]
    """The command that asks a job to save and stop, or takes a waiting one out of the queue."""
    job_id_variable: str | None = None
    """The environment variable in which a job script finds its own id; None: there is none."""
    inherited_prefixes: tuple[str, ...] = ()
    """Variables of a surrounding job that must not reach a new one."""
    hands_on_environment: bool = False
    """A job would get the whole environment of the shell that submits it: then it is told only what a login knows."""
    exclude_argv: Callable[[str, Sequence[str]], list[str]] | None = None
    """`(job, nodes)` -> the command that keeps a waiting job from these nodes alone; None: it keeps what it asked for."""


SCHEDULERS: dict[str, Scheduler] = {
    "local": Scheduler(local.render_header, local.submit_argv, local.parse_job_id, local.state_argv, local.parse_states, local.cancel_argv),
    "slurm": Scheduler(
        slurm.render_header,
        slurm.submit_argv,
        slurm.parse_job_id,
        slurm.state_argv,
        slurm.parse_states,
        slurm.cancel_argv,
        job_id_variable="SLURM_JOB_ID",
        inherited_prefixes=("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_", "SCANCEL_", "SINFO_", "PMIX_", "PMI_", "OMPI_"),
        # Any --export but ALL makes Slurm log in as the user on the node, which takes seconds to minutes and holds the job when it fails.
        hands_on_environment=True,
        exclude_argv=slurm.exclude_argv,
    ),
    "lsf": Scheduler(
        lsf.render_header,
        lsf.submit_argv,
        lsf.parse_job_id,
        lsf.state_argv,
        lsf.parse_states,
        lsf.cancel_argv,
        job_id_variable="LSB_JOBID",
        inherited_prefixes=("LSB_", "LS_JOBPID", "JSM_", "PMIX_", "PMI_", "OMPI_"),
        hands_on_environment=True,
    ),
}
