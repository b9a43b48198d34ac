"""The scheduler LSF 10.1, as on Summit: six pure functions, and the hosts of a job from its environment."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import ConfigError, SubmitError
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
    # Its host does not answer: the job may still run there.
    "UNKWN": State.UNKNOWN,
    "ZOMBI": State.UNKNOWN,
}
_REASONS = {
    "TERM_RUNLIMIT": State.TIMEOUT,
    "TERM_DEADLINE": State.TIMEOUT,
    "TERM_PREEMPT": State.PREEMPTED,
    "TERM_MEMLIMIT": State.OUT_OF_MEMORY,
    "TERM_OWNER": State.CANCELLED,
    "TERM_FORCE_OWNER": State.CANCELLED,
    "TERM_ADMIN": State.CANCELLED,
    "TERM_FORCE_ADMIN": State.CANCELLED,
    "TERM_REMOVE_HUNG_JOB": State.NODE_LOST,
    "TERM_ZOMBIE": State.NODE_LOST,
    "TERM_EXTERNAL_SIGNAL": State.FAILED,
}
"""How bjobs explains that a job has the state EXIT."""
_CANCEL = 'case "$(bjobs -a -noheader -o stat "$1")" in RUN*) exec bkill -s USR1 "$1" ;; *) exec bkill "$1" ;; esac'
_SUBMIT = 'script=$1; shift; exec bsub "$@" <"$script"'


def render_header(job: Job) -> list[str]:
    """The #BSUB lines, and a line of shell for the log. Raises ConfigError for what LSF could not be told."""
    machine, allocation, log = job.machine, job.allocation, job.run_dir.job_log
    if allocation.walltime_min is None:
        raise ConfigError(f"a job on {machine.name} needs a walltime")
    return [
        *([f"#BSUB -P {job.account}"] if job.account else []),
        f"#BSUB -J {job.name}",
        f"#BSUB -q {machine.queue(allocation.queue).name}",
        f"#BSUB -W {walltime(allocation.walltime_min)}",
        *_place_lines(job),
        *_output_lines(job),
        # USR1, for LSF itself sends USR2 when the walltime is over: so the cause of a stop can be told from the signal.
        "#BSUB -wa USR1",
        f"#BSUB -wt {warning_min(machine.warning_min, allocation.walltime_min)}",
        # After the failure of a host LSF runs the job again under the same id; so does a preempting queue.
        "#BSUB -r",
        *_extra_lines(job),
        "# LSF may show what a job prints only when it has ended: from here on it goes straight into the log.",
        f"exec >>{shlex.quote(str(log))} 2>&1",
    ]


def _output_lines(job: Job) -> list[str]:
    """Files for what LSF itself reports.

    LSF puts the job id in the place of %J and knows no way to write a % that it leaves alone; how it reads quotes,
    dollar signs and backslashes between quotes is not documented. A [ means something in the names of jobs only.
    """
    path = f"{job.run_dir.job_log.parent}/lsf-"
    if strange := sorted(set(path) & set("%\"'\\$`")):
        raise ConfigError(f"LSF would not take the run directory {str(job.run_dir.path)!r} as it stands: choose one without {' '.join(strange)}")
    value = f"{path}%J.log" if re.fullmatch(r"[A-Za-z0-9._:@/,=+-]+", path) else f'"{path}%J.log"'
    return [f"#BSUB -{option} {value}" for option in "oe"]


def _extra_lines(job: Job) -> list[str]:
    """The profile's own directives. Raises ConfigError for several -alloc_flags, of which LSF would keep one only."""
    lines = job.machine.header_lines
    if sum("-alloc_flags" in line for line in lines) > 1:
        raise ConfigError(f'{job.machine.name} has several -alloc_flags in header_lines, but LSF heeds one: write them as one, -alloc_flags "smt4 nvme"')
    return list(lines)


def _place_lines(job: Job) -> list[str]:
    """Any nodes, or in expert mode whole racks: one slot on a launch node and all slots of the compute nodes."""
    excluded = [f"hname!='{name}'" for name in job.allocation.excluded_nodes]
    nodes, racks, cores = job.allocation.num_nodes, job.allocation.num_racks, job.machine.node.num_cpu_cores
    if racks is None:
        return [f"#BSUB -nnodes {nodes}", *([f'#BSUB -R "select[{" && ".join(excluded)}]"'] if excluded else [])]
    wanted = "&&".join(("(CN)", "(type==any)", *(f"({term})" for term in excluded)))
    launch = "1*{select[((LN)&&(type==any))]order[r15s:pg]span[hosts=1]cu[type=rack:pref=config]}"
    compute = f"{nodes * cores}*{{select[({wanted})]order[r15s:pg]span[ptile={cores}]cu[type=rack:maxcus={racks}]}}"
    return ["#BSUB -csm y", f"#BSUB -n {1 + nodes * cores}", f'#BSUB -R "{launch}+{compute}"']


def warning_min(wanted: int, walltime_min: int) -> int:
    """Minutes before the end at which the warning comes: as the profile says, but not in the first half of a short job."""
    return max(1, min(wanted, walltime_min // 2))


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
    return ["bjobs", "-a", "-noheader", "-o", "jobid stat exit_reason delimiter='|'", *job_ids]


def parse_states(output: str) -> dict[str, State]:
    """Job id -> state; a job that LSF has forgotten is not in it."""
    found = re.findall(r"^\s*(\d+)\|(\w+)(?:\|\s*(\w*))?", output, re.MULTILINE)
    return {job_id: _REASONS.get(reason, State.FAILED) if state == "EXIT" else state_of(state) for job_id, state, reason in found}


def state_of(word: str) -> State:
    """What a state of bjobs means, its reason aside."""
    return _STATES.get(word, State.UNKNOWN)


def compute_hosts(environment: Mapping[str, str]) -> list[str]:
    """The hosts that LSF gave to a job, each once, without the launch node on which the script runs.

    A launch node's name begins with "batch" or "login"; where all do, there is none.
    """
    try:
        words = Path(environment["LSB_DJOB_HOSTFILE"]).read_text(encoding="ascii").split()
    except (KeyError, OSError):
        words = environment.get("LSB_MCPU_HOSTS", "").split()[::2] or environment.get("LSB_HOSTS", "").split()
    hosts = list(dict.fromkeys(words))
    return [host for host in hosts if not host.startswith(("batch", "login"))] or hosts


def cancel_argv(job_id: str) -> list[str]:
    """The command that takes a waiting job out of the queue, and asks a running one to save and stop.

    A plain bkill would follow SIGINT and SIGTERM with SIGKILL after the site's interval, often 10 s, saved or not.
    """
    return ["bash", "-euc", _CANCEL, "cancel", job_id]
