"""Machine profiles: the hardware and the scheduler of a site, as facts in ``hpc/*.toml``."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Literal

from pydantic.dataclasses import dataclass

from . import config
from .config import STRICT, Count, Natural, Positive
from .errors import ConfigError


@dataclass(frozen=True, config=STRICT)
class Gpu:
    """One kind of GPU."""

    name: str
    memory_gib: Positive
    peak_tflops: dict[str, Positive]
    """Dense peak by the type of matrix products (fp32, tf32, bf16, fp16); a missing precision is not supported."""
    sustained_tflops: dict[str, Positive] | None = None
    """What a training was seen to reach, by the same types; plans and projections take it before an assumed share of the peak."""
    host_bytes_per_s: Positive | None = None
    """One way between the GPU and its host's memory; None: as PCIe 3.0 is taken to reach."""


@dataclass(frozen=True, config=STRICT)
class Node:
    """One node."""

    num_cpu_cores: Natural
    """Cores that jobs may use; 0: as many as the operating system offers (a laptop)."""
    num_gpus: Natural = 0
    gpu: Gpu | None = None
    host_memory_gib: Positive | None = None
    local_disk_path: str | None = None
    """Node-local scratch, for example an NVMe mount; environment variables ($USER) are expanded on the node."""
    local_disk_gib: Positive | None = None

    def __post_init__(self) -> None:
        if (self.num_gpus > 0) != (self.gpu is not None):
            raise ValueError("num_gpus above 0 and a [node.gpu] section belong together")


@dataclass(frozen=True, config=STRICT)
class Link:
    """What a message meets on its way: Hockney's latency and bandwidth (1994)."""

    latency_s: Positive
    """Of one step of a collective, software included."""
    bytes_per_s: Positive
    """One way."""


@dataclass(frozen=True, config=STRICT)
class Network:
    """What joins the ranks; projections of scaling reckon with it where nothing was measured."""

    between_nodes: Link
    """All ports of a node together."""
    within_node: Link | None = None
    """The slowest connection that a ring over a node's ranks must take; None: one rank a node, or not known."""


@dataclass(frozen=True, config=STRICT)
class Bin:
    """One row of a queue's table: jobs of so many nodes may run so long."""

    min_nodes: Count
    max_nodes: Count
    max_walltime_min: Count
    name: str | None = None
    """What the site calls it: "2" on Summit; None: it has no name."""

    def __post_init__(self) -> None:
        if self.min_nodes > self.max_nodes:
            raise ValueError(f"min_nodes {self.min_nodes} exceeds max_nodes {self.max_nodes}")


@dataclass(frozen=True, config=STRICT)
class Queue:
    """A queue of LSF or a partition of Slurm."""

    name: str
    bins: tuple[Bin, ...]
    """By ascending number of nodes; a job outside all of them cannot run in this queue."""
    preemptable: bool = False
    """Jobs may be stopped and requeued by the site."""
    preemptable_after_min: Natural = 0
    """Minutes that a job of a preemptable queue runs undisturbed."""
    qos: str | None = None
    """Slurm's quality of service that goes with it."""
    partition: str | None = None
    """Slurm's partition, where it is not called as the queue; "": the site chooses it from the quality of service."""

    def __post_init__(self) -> None:
        if not self.bins:
            raise ValueError(f"queue {self.name} needs at least one [[queues.bins]]")
        for low, high in pairwise(self.bins):
            if high.min_nodes <= low.max_nodes:
                raise ValueError(f"the bins of queue {self.name} must ascend and not overlap")


@dataclass(frozen=True, config=STRICT)
class Licence:
    """Software of the site that may run on a limited number of nodes."""

    name: str
    comm: str
    """The recipe's `parallel.comm` that uses it."""
    max_nodes: Count


_SCHEDULERS_OF = {"processes": ("local",), "srun": ("slurm",), "jsrun": ("lsf",)}
"""Starters that work in jobs of some schedulers only."""

RackPlacement = Literal["none", "switches", "node_list", "segment", "compute_unit"]


@dataclass(frozen=True, config=STRICT)
class Machine:
    """A machine profile."""

    name: str
    description: str
    scheduler: Literal["local", "slurm", "lsf"]
    starter: Literal["processes", "mpirun", "torchrun", "none", "srun", "jsrun"]
    """What starts the ranks of a job: our own local processes, a program of the site, or nothing (one rank)."""
    ranks_per_node: Count
    node: Node
    max_nodes: Count
    """Largest number of nodes that one job may ask for."""
    nodes_per_rack: Count | None = None
    """None: the machine has no racks."""
    num_racks: Count | None = None
    rack_placement: RackPlacement = "none"
    """How a job asks for whole racks: Slurm's --switches, a list of nodes from its topology, or --segment; LSF's compute units.
    With "none" a rack is a number of nodes, which the scheduler takes where it finds them."""
    queues: tuple[Queue, ...] = ()
    """The first is the default; a batch scheduler needs at least one."""
    max_queued_jobs: Count | None = None
    """Jobs of a user that may be in the queue at the same time, each element of an array counted; None: no limit that matters."""
    account_required: bool = False
    licences: tuple[Licence, ...] = ()
    network: Network | None = None
    warning_min: Count = 10
    """Minutes before the walltime at which a job is told to save and stop."""
    resource_set: Literal["rank", "node"] = "rank"
    """jsrun only: one resource set a rank (one GPU each), or one a node (what IBM's DDL wants)."""
    staging: Literal["none", "node_local"] = "none"
    """Whether jobs copy the corpus to node.local_disk_path before they start."""
    staging_check: Literal["size", "sha256"] = "size"
    """How a copy that an earlier job left is believed: size and time of what was verified then, or its SHA-256 again."""
    staging_cleanup: Literal["keep", "remove"] = "keep"
    """What becomes of the copy when a job ends: the next one uses it, or the site forbids to leave it."""
    header_lines: tuple[str, ...] = ()
    """Directives of the scheduler that the site wants, as they stand in a job script."""
    setup_lines: tuple[str, ...] = ()
    """Shell lines that prepare the environment of a job: modules, a virtual environment."""
    python: str | None = None
    """The interpreter on the compute nodes; None: the one that runs this command."""
    launcher_prefix: tuple[str, ...] = ()
    """Put in front of every rank's command, for example ("apptainer", "exec", "--nv", "prottrans.sif"); `python` is then the image's.

    What goes on around the ranks (the starter, and our own programs on the batch node) runs outside of the container.
    """
    sources: tuple[str, ...] = ()
    """Where the numbers come from, one line each."""
    exclude_slow_nodes: bool = False
    """Whether a start leaves out the nodes that the run's history found slow."""
    retired: bool = False
    """The machine exists no more; the profile is kept to reproduce what ran there."""

    def __post_init__(self) -> None:
        batch = self.scheduler != "local"
        if batch != bool(self.queues):
            raise ValueError(f"scheduler {self.scheduler!r} {'needs at least one [[queues]]' if batch else 'has no queues'}")
        if self.rack_placement != "none" and self.nodes_per_rack is None:
            raise ValueError(f"rack_placement {self.rack_placement!r} needs nodes_per_rack")
        if self.scheduler not in _SCHEDULERS_OF.get(self.starter, (self.scheduler,)):
            raise ValueError(f"the starter {self.starter!r} does not start ranks in jobs of the scheduler {self.scheduler!r}")
        allowed = {"local": (), "slurm": ("switches", "node_list", "segment"), "lsf": ("compute_unit",)}[self.scheduler]
        if self.rack_placement not in ("none", *allowed):
            raise ValueError(f"rack_placement {self.rack_placement!r} is not known to the scheduler {self.scheduler!r}: {', '.join(('none', *allowed))}")
        if self.launcher_prefix and self.starter == "torchrun":
            raise ValueError("the starter 'torchrun' starts the ranks' Python itself, so no launcher_prefix can stand in front of it: take another starter")
        if self.staging == "node_local" and self.node.local_disk_path is None:
            raise ValueError("staging = 'node_local' needs node.local_disk_path")

    def queue(self, name: str | None) -> Queue:
        """A queue by name, or the default one. Raises ConfigError."""
        if name is None:
            return self.queues[0]
        for queue in self.queues:
            if queue.name == name:
                return queue
        raise ConfigError(f"{self.name} has no queue {name!r}; it has {', '.join(queue.name for queue in self.queues) or 'none'}")


@dataclass(frozen=True, config=STRICT)
class Allocation:
    """What a job asks for, worked out by the planner."""

    num_nodes: int
    ranks_per_node: int
    cpu_cores_per_rank: int
    gpus_per_rank: int
    walltime_min: int | None = None
    """None: no limit (a laptop)."""
    queue: str | None = None
    num_racks: int | None = None
    """Whole racks that the nodes must fill; None: any nodes."""
    node_names: tuple[str, ...] = ()
    """With rack_placement "node_list": the very nodes, chosen when the job is submitted."""
    excluded_nodes: tuple[str, ...] = ()
    """That the job must not get."""

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
