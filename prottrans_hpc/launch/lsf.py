"""The scheduler LSF 10.1, as on Summit: six pure functions; no I/O here."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import SubmitError
from ..run_dir import RunDir
from .job import Job
from .job_state import State

_STATES = {
    "PEND": State.PENDING,
    "PSUSP": State.PENDING,
    "WAIT": State.PENDING,
    "PROV": State.PENDING,
    "RUN": State.RUNNING,
    "USUSP": State.SUSPENDED,
    "SSUSP": State.SUSPENDED,
    "DONE": State.DONE,
    "EXIT": State.FAILED,
}
_SUBMIT = 'script=$1; shift; exec bsub "$@" <"$script"'


def render_header(job: Job) -> list[str]:
    """The #BSUB lines."""
    machine, allocation = job.machine, job.allocation
    return [
        *([f"#BSUB -P {job.account}"] if job.account else []),
        f"#BSUB -J {job.name}",
        f"#BSUB -q {machine.queue(allocation.queue).name}",
        f"#BSUB -W {walltime(allocation.walltime_min or 0)}",
        *_place_lines(job),
        f"#BSUB -o {job.run_dir.job_log}",
        "#BSUB -wa USR2",
        f"#BSUB -wt {machine.warning_min}",
        "#BSUB -r",
        *machine.header_lines,
    ]


def _place_lines(job: Job) -> list[str]:
    """Any nodes, or in expert mode whole racks: one slot on a launch node and all slots of the compute nodes."""
    nodes, racks, cores = job.allocation.num_nodes, job.allocation.num_racks, job.machine.node.num_cpu_cores
    if racks is None:
        return [f"#BSUB -nnodes {nodes}"]
    launch = "1*{select[((LN)&&(type==any))]order[r15s:pg]span[hosts=1]cu[type=rack:pref=config]}"
    compute = f"{nodes * cores}*{{select[((CN)&&(type==any))]order[r15s:pg]span[ptile={cores}]cu[type=rack:maxcus={racks}]}}"
    return ["#BSUB -csm y", f"#BSUB -n {1 + nodes * cores}", f'#BSUB -R "{launch}+{compute}"']


def walltime(minutes: int) -> str:
    """LSF's hours:minutes; it knows no seconds."""
    return f"{minutes // 60}:{minutes % 60:02d}"


def submit_argv(run_dir: RunDir, after: str | None) -> list[str]:
    """The command that submits the job script; bsub reads directives from standard input only."""
    return ["bash", "-c", _SUBMIT, "submit", str(run_dir.job_script), *(["-w", f"ended({after})"] if after else [])]


def parse_job_id(output: str) -> str:
    """The job id in `Job <123> is submitted to queue <batch>.` Raises SubmitError."""
    match = re.search(r"^Job <(\d+)> is submitted", output, re.MULTILINE)
    if not match:
        raise SubmitError(f"the job may not be submitted: bsub answered {output!r} instead of a job id; look at bjobs before you try again")
    return match[1]


def state_argv(job_ids: Sequence[str]) -> list[str]:
    """The command that tells the states of jobs; bjobs knows ended ones for about an hour."""
    return ["bjobs", "-a", "-noheader", "-o", "jobid stat delimiter='|'", *job_ids]


def parse_states(output: str) -> dict[str, State]:
    """Job id -> state; a job that LSF has forgotten is not in it."""
    found = re.findall(r"^(\d+)\|(\w+)", output, re.MULTILINE)
    return {job_id: _STATES.get(state, State.UNKNOWN) for job_id, state in found}


def cancel_argv(job_id: str) -> list[str]:
    """The command that ends a job: SIGINT and SIGTERM first, then SIGKILL."""
    return ["bkill", job_id]
