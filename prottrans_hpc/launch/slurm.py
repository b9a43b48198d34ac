"""The scheduler Slurm, 22.05 and later: six pure functions; no I/O here."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import SubmitError
from ..run_dir import RunDir
from . import hostlist
from .job import Job
from .job_state import State

_STATES = {
    "PENDING": State.PENDING,
    "CONFIGURING": State.PENDING,
    "REQUEUED": State.PENDING,
    "REQUEUE_HOLD": State.PENDING,
    "REQUEUE_FED": State.PENDING,
    "RESV_DEL_HOLD": State.PENDING,
    "SPECIAL_EXIT": State.PENDING,
    "RUNNING": State.RUNNING,
    "SIGNALING": State.RUNNING,
    "STAGE_OUT": State.RUNNING,
    "RESIZING": State.RUNNING,
    "COMPLETING": State.STOPPING,
    "STOPPED": State.SUSPENDED,
    "SUSPENDED": State.SUSPENDED,
    "COMPLETED": State.DONE,
    "FAILED": State.FAILED,
    "BOOT_FAIL": State.NODE_LOST,
    "NODE_FAIL": State.NODE_LOST,
    "CANCELLED": State.CANCELLED,
    "REVOKED": State.CANCELLED,
    "PREEMPTED": State.PREEMPTED,
    "TIMEOUT": State.TIMEOUT,
    "DEADLINE": State.TIMEOUT,
    "OUT_OF_MEMORY": State.OUT_OF_MEMORY,
}


def render_header(job: Job) -> list[str]:
    """The #SBATCH lines."""
    machine, allocation = job.machine, job.allocation
    queue = machine.queue(allocation.queue)
    walltime_min = allocation.walltime_min or 0
    options = [
        ("job-name", job.name),
        ("account", job.account),
        ("partition", queue.name if queue.partition is None else queue.partition or None),
        ("qos", queue.qos),
        ("nodes", str(allocation.num_nodes)),
        ("ntasks-per-node", str(allocation.ranks_per_node)),
        ("cpus-per-task", str(allocation.cpu_cores_per_rank)),
        ("gpus-per-node", str(machine.node.num_gpus) if machine.node.num_gpus else None),
        # All of it: a site's default is a share for each core.
        ("mem", "0"),
        ("time", walltime(walltime_min)),
        *_rack_options(job),
        ("exclude", hostlist.compress(allocation.excluded_nodes) or None),
        # B: to the script alone, which tells srun. The ranks would get it twice, and a second one in the middle of saving.
        ("signal", f"B:USR1@{min(60 * machine.warning_min, 30 * walltime_min)}"),
        # In a path of Slurm's % begins a pattern (%j is the job id).
        ("output", str(job.run_dir.job_log).replace("%", "%%")),
        ("open-mode", "append"),
    ]
    return [
        *(f"#SBATCH --{name}={_quoted(value)}" for name, value in options if value is not None),
        "#SBATCH --exclusive",
        "#SBATCH --requeue",
        "#SBATCH --kill-on-invalid-dep=yes",
        *machine.header_lines,
    ]


def _rack_options(job: Job) -> list[tuple[str, str | None]]:
    racks, per_rack = job.allocation.num_racks, job.machine.nodes_per_rack
    if racks is None:
        return []
    options: dict[str, list[tuple[str, str | None]]] = {
        # It counts leaf switches; without a time after the @ the job waits for that many as long as the site lets it (max_switch_wait).
        "switches": [("switches", str(racks))],
        # Slurm 23.11 and later, with topology/block.
        "segment": [("segment", str(per_rack))],
        "node_list": [("nodelist", hostlist.compress(job.allocation.node_names))] if job.allocation.node_names else [],
    }
    return options.get(job.machine.rack_placement, [])


def walltime(minutes: int) -> str:
    """Slurm's D-HH:MM:SS."""
    days, rest = divmod(minutes, 24 * 60)
    return f"{f'{days}-' if days else ''}{rest // 60:02d}:{rest % 60:02d}:00"


def _quoted(text: str) -> str:
    """A value of an #SBATCH line; Slurm knows double quotes and backslashes there."""
    return text if re.fullmatch(r"[A-Za-z0-9._:@/,=+%\[\]-]+", text) else '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def submit_argv(run_dir: RunDir, after: str | None) -> list[str]:
    """The command that submits the job script and prints the job id alone."""
    return ["sbatch", "--parsable", *([f"--dependency=afterany:{after}"] if after else []), str(run_dir.job_script)]


def parse_job_id(output: str) -> str:
    """The job id, which a federation follows by a semicolon and the cluster. Raises SubmitError."""
    match = re.fullmatch(r"\s*(\d+)(?:;[\w.-]+)?\s*", output)
    if not match:
        raise SubmitError(f"the job may not be submitted: sbatch answered {output!r} instead of a job id; look at squeue before you try again")
    return match[1]


def state_argv(job_ids: Sequence[str]) -> list[str]:
    """The command that tells the states of jobs; squeue knows ended ones for some minutes."""
    return ["squeue", "--noheader", "--states=all", f"--jobs={','.join(job_ids)}", "--format=%i|%T"]


def parse_states(output: str) -> dict[str, State]:
    """Job id -> state; a job that Slurm has forgotten is not in it."""
    found = re.findall(r"^\s*(\d+)\|([A-Z_]+)", output, re.MULTILINE)
    return {job_id: _STATES.get(state, State.UNKNOWN) for job_id, state in found}


_CANCEL = """
scancel --state=PENDING "$1"
if squeue --noheader --states=RUNNING --jobs="$1" 2>/dev/null | grep -q .; then scancel --batch --signal=USR1 "$1"; fi
"""


def cancel_argv(job_id: str) -> list[str]:
    """The command that takes a waiting job out of the queue, and asks a running one to save and stop.

    A plain scancel would send SIGTERM to everything and SIGKILL after the site's KillWait, often 30 s, saved or not.
    The signal goes to the job script, which tells the ranks; the job then ends with 75 and counts as FAILED.
    """
    return ["bash", "-euc", _CANCEL, "cancel", job_id]


def exclude_argv(job_id: str, nodes: Sequence[str]) -> list[str]:
    """The command that keeps a waiting job from these nodes, whatever it was submitted with."""
    return ["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={hostlist.compress(nodes)}"]
