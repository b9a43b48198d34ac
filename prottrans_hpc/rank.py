"""Who am I among the ranks: one table of variable names a starter, read once at the start of a process."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import ConfigError

_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")


@dataclass(frozen=True)
class RankContext:
    """The place of this process in the gang."""

    rank: int
    world_size: int
    local_rank: int
    """Rank within the node."""
    local_world_size: int
    """Ranks on this node."""
    node_rank: int
    num_nodes: int
    hostname: str
    starter: str
    """Which starter's variables were found; "none" when this is a lone process."""

    @property
    def is_main(self) -> bool:
        """Rank 0 writes metrics and commits checkpoints."""
        return self.rank == 0

    @property
    def is_node_main(self) -> bool:
        """Local rank 0 writes its node's log."""
        return self.local_rank == 0


@dataclass(frozen=True)
class StarterVariables:
    """The environment variables in which a starter tells a rank its place; None where it does not say."""

    rank: str
    world_size: str
    local_rank: str
    local_world_size: str | None
    node_rank: str | None = None
    num_nodes: str | None = None


STARTERS: dict[str, StarterVariables] = {
    # Our own local processes set PROTTRANS_*; they come first because such ranks may run inside a batch job.
    "processes": StarterVariables("PROTTRANS_RANK", "PROTTRANS_WORLD_SIZE", "PROTTRANS_LOCAL_RANK", "PROTTRANS_LOCAL_WORLD_SIZE", "PROTTRANS_NODE_RANK"),
    "horovodrun": StarterVariables("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE", "HOROVOD_CROSS_RANK", "HOROVOD_CROSS_SIZE"),
    "torchrun": StarterVariables("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    # jsrun before mpirun: Spectrum MPI sets both, and only JSM's are there without MPI.
    "jsrun": StarterVariables("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE"),
    # Open MPI names no node: its OMPI_COMM_WORLD_NODE_RANK is the rank within the node over all jobs there.
    "mpirun": StarterVariables("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    # Of the step, not SLURM_NTASKS: an interactive shell of a job (salloc) has that of the whole job, and is one task.
    "srun": StarterVariables("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", None, "SLURM_NODEID", "SLURM_STEP_NUM_NODES"),
}


def detect(environment: Mapping[str, str]) -> RankContext:
    """The context from whatever started us. Raises ConfigError when a starter's variables are incomplete or contradict."""
    for starter, names in STARTERS.items():
        if names.rank in environment and names.world_size in environment and _is_a_step(starter, environment):
            return _read(starter, names, environment)
    return RankContext(0, 1, 0, 1, 0, 1, socket.gethostname(), "none")


def _is_a_step(starter: str, environment: Mapping[str, str]) -> bool:
    # sbatch sets SLURM_PROCID=0 for the batch shell too, which is no rank: only srun's tasks have a step.
    return starter != "srun" or ("SLURM_STEP_ID" in environment and "SLURM_STEP_TASKS_PER_NODE" in environment)


def _read(starter: str, names: StarterVariables, environment: Mapping[str, str]) -> RankContext:
    rank, world_size = _number(names.rank, environment), _number(names.world_size, environment)
    local_rank = _number(names.local_rank, environment)
    if names.local_world_size:
        local_world_size = _number(names.local_world_size, environment)
    else:
        local_world_size = _tasks_on_node(environment["SLURM_STEP_TASKS_PER_NODE"], _number("SLURM_NODEID", environment))
    # Without a word about nodes, ranks are taken to fill one node after the other, as starters do unless told otherwise.
    node_rank = _number(names.node_rank, environment) if names.node_rank else rank // local_world_size
    num_nodes = _number(names.num_nodes, environment) if names.num_nodes else -(-world_size // local_world_size)
    if local_world_size < 1 or not (0 <= local_rank < local_world_size <= world_size and 0 <= rank < world_size and 0 <= node_rank < num_nodes):
        raise ConfigError(
            f"{starter} set variables that contradict each other: rank {rank} of {world_size}, "
            f"local rank {local_rank} of {local_world_size}, node {node_rank} of {num_nodes}"
        )
    return RankContext(rank, world_size, local_rank, local_world_size, node_rank, num_nodes, socket.gethostname(), starter)


def _number(name: str, environment: Mapping[str, str]) -> int:
    try:
        return int(environment[name])
    except KeyError:
        raise ConfigError(f"the starter did not set {name}, from which a rank learns its place") from None
    except ValueError:
        raise ConfigError(f"the environment variable {name} is {environment[name]!r}, not a number") from None


def _tasks_on_node(text: str, node: int) -> int:
    """Slurm's "6(x3),4" means three nodes with six tasks and one with four."""
    counts: list[int] = []
    for part in text.split(","):
        match = _TASKS.fullmatch(part)
        if match is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}, which is not of the form 6(x3),4")
        counts += [int(match[1])] * int(match[2] or 1)
    if not 0 <= node < len(counts):
        raise ConfigError(f"SLURM_NODEID is {node}, but SLURM_STEP_TASKS_PER_NODE is {text!r}, which tells of {len(counts)} nodes")
    return counts[node]
