"""Machine profiles: the hardware and the scheduler of a site, as facts in ``hpc/*.toml``."""

from __future__ import annotations

import os
from typing import Literal

from pydantic.dataclasses import dataclass

from . import config
from .config import STRICT, Count, Natural, Positive


@dataclass(frozen=True, config=STRICT)
class Gpu:
    """One kind of GPU."""

    name: str
    memory_gib: Positive
    peak_tflops: dict[str, Positive]
    """Dense peak by precision (fp32, bf16, fp16); a missing precision is not supported."""


@dataclass(frozen=True, config=STRICT)
class Node:
    """One node."""

    num_cpu_cores: Natural
    """Cores that jobs may use; 0: as many as the operating system offers (a laptop)."""
    num_gpus: Natural = 0
    gpu: Gpu | None = None
    host_memory_gib: Positive | None = None
    local_disk_path: str | None = None
    """Node-local scratch, for example an NVMe mount."""
    local_disk_gib: Positive | None = None

    def __post_init__(self) -> None:
        if (self.num_gpus > 0) != (self.gpu is not None):
            raise ValueError("num_gpus above 0 and a [node.gpu] section belong together")


@dataclass(frozen=True, config=STRICT)
class Machine:
    """A machine profile."""

    name: str
    description: str
    scheduler: Literal["local"]
    starter: Literal["processes", "mpirun", "torchrun", "none"]
    """What starts the ranks of a job: our own local processes, mpirun, torchrun, or nothing (one rank)."""
    ranks_per_node: Count
    node: Node
    max_nodes: Count
    """Largest number of nodes that one job may ask for."""
    setup_lines: tuple[str, ...] = ()
    """Shell lines that prepare the environment of a job: modules, a virtual environment."""


@dataclass(frozen=True, config=STRICT)
class Allocation:
    """What a job asks for, worked out by the planner."""

    num_nodes: int
    ranks_per_node: int
    cpu_cores_per_rank: int
    gpus_per_rank: int
    walltime_min: int | None = None
    """None: no limit (a laptop)."""

    @property
    def num_ranks(self) -> int:
        """The world size."""
        return self.num_nodes * self.ranks_per_node


def read_machine(name_or_path: str) -> Machine:
    """Read a profile by name or path. Raises ConfigError."""
    path = config.find_file("hpc", name_or_path)
    return config.parse(Machine, config.read_toml(path), source=str(path))


def usable_cpu_cores(node: Node) -> int:
    """Cores that a job may use on a node; for a profile that leaves it open, those this process may use."""
    return node.num_cpu_cores or len(os.sched_getaffinity(0))
