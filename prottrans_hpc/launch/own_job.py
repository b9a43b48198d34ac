"""What a batch job can know of itself: from its environment, and by asking its scheduler. Pure: argument vectors and parsers.

`VITALS` has one entry a batch scheduler.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from . import hostlist, lsf
from .schedulers import SCHEDULERS

Environment = Mapping[str, str]


@dataclass(frozen=True)
class Start:
    """One start of a batch job; a job that its scheduler requeues starts again under the same id."""

    scheduler: str
    cluster: str
    """Job ids are unique within it; "" where the scheduler names none."""
    job_id: str
    restart: int
    """0 at first, one more with each requeue."""
    host: str
    """Where the job script runs."""
    pid: int
    """Of the job script."""
    nodes: tuple[str, ...]
    """The compute nodes."""


@dataclass(frozen=True)
class Vitals:
    """How a job of one scheduler learns about itself."""

    nodes: Callable[[Environment], list[str]]
    """Names of its compute nodes, from its environment."""
    requeue_argv: Callable[[str], list[str]]
    """The command with which a job asks to run again under its own id; it ends the job."""
    restart_variable: str | None = None
    """Holds the restart count; None: the scheduler does not count, the run directory does."""
    cluster_variable: str | None = None
    facts_argv: Callable[[str], list[str]] | None = None
    """The command that tells everything about a job."""
    is_being_preempted: Callable[[str], bool] = lambda output: False
    """Whether that says that the job must make room and would be lost if it just ended."""
    lost_nodes_argv: Callable[[Sequence[str]], list[str]] | None = None
    """The command that tells the states of nodes."""
    parse_lost_nodes: Callable[[str], list[str]] = lambda output: []
    """Those of them that are down."""


def identify(scheduler: str, environment: Environment, *, earlier_starts: Callable[[str], int]) -> Start:
    """This start of this job. `earlier_starts(job_id)` counts, for a scheduler that does not. Raises ConfigError outside of a job."""
    variable = SCHEDULERS[scheduler].job_id_variable
    vitals = VITALS[scheduler]
    job_id = environment.get(variable or "")
    if not job_id:
        raise ConfigError(f"this is not a job of {scheduler}: {variable} is not set. Submit the job script instead of running it")
    restart = int(environment.get(vitals.restart_variable, "0")) if vitals.restart_variable else earlier_starts(job_id)
    cluster = environment.get(vitals.cluster_variable, "") if vitals.cluster_variable else ""
    return Start(scheduler, cluster, job_id, restart, socket.gethostname(), os.getppid(), tuple(vitals.nodes(environment)))


def _slurm_nodes(environment: Environment) -> list[str]:
    return hostlist.expand(environment.get("SLURM_JOB_NODELIST", ""))


def _slurm_requeue(job_id: str) -> list[str]:
    return ["scontrol", "requeue", job_id]


def _slurm_facts(job_id: str) -> list[str]:
    return ["scontrol", "show", "job", "--oneliner", job_id]


def _slurm_is_being_preempted(output: str) -> bool:
    """A job in its grace period has a PreemptTime; one that may not be requeued has Requeue=0."""
    facts = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", output))
    return facts.get("PreemptTime", "None") not in ("None", "Unknown", "N/A", "(null)", "") and facts.get("Requeue") == "1"


def _slurm_lost_nodes_argv(nodes: Sequence[str]) -> list[str]:
    return ["sinfo", "--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N|%T"]


def _slurm_lost_nodes(output: str) -> list[str]:
    """Nodes that are down; a star behind any state means that the node does not answer."""
    found = re.findall(r"^([^|\s]+)\|(\S+)", output, re.MULTILINE)
    return sorted({node for node, state in found if state.endswith("*") or state.startswith(("down", "fail", "error", "powered_down", "powering_down"))})


def _lsf_requeue(job_id: str) -> list[str]:
    return ["brequeue", job_id]


VITALS: dict[str, Vitals] = {
    "slurm": Vitals(
        _slurm_nodes,
        _slurm_requeue,
        restart_variable="SLURM_RESTART_COUNT",
        cluster_variable="SLURM_CLUSTER_NAME",
        facts_argv=_slurm_facts,
        is_being_preempted=_slurm_is_being_preempted,
        lost_nodes_argv=_slurm_lost_nodes_argv,
        parse_lost_nodes=_slurm_lost_nodes,
    ),
    # LSF requeues what it preempts by itself, under the same id, unless the job was submitted with -rn.
    "lsf": Vitals(lsf.compute_hosts, _lsf_requeue),
}
