"""What is decided about a farm before anything is touched."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from .. import config
from ..errors import ConfigError
from ..machine import Machine, usable_cpu_cores
from .farm_executors import JobShape, largest_array
from .farm_files import FarmFiles


@dataclass(frozen=True)
class FarmPlan:
    """Everything about a farm that was decided before anything is touched."""

    machine: Machine
    folder: Path
    """Absolute; a round of the farm is a folder in it."""
    name: str
    """For people and schedulers."""
    num_jobs: int
    """Into so many jobs the work is cut, each one node's."""
    num_at_once: int
    walltime_min: int | None = None
    queue: str | None = None
    account: str | None = None
    shares_per_job: int = 1
    """Items that a job runs side by side, each with a GPU of its own."""
    num_retries: int = 2
    cores: int | None = None
    """Of a node for each item; None: its share of all."""
    flags: tuple[str, ...] = ()
    """--quiet or --verbose, for the items."""
    follow: bool = False
    """Print what the items print."""
    ends_at_failure: bool = False
    """Whether the others are of no use once one item has failed for good."""

    def __post_init__(self) -> None:
        config.check_name(self.name, what="the name of the farm")
        for what, value in (("--items", self.num_jobs), ("--nodes", self.num_at_once)):
            if value < 1:
                raise ConfigError(f"{what} must be at least 1, not {value}")

    @property
    def python(self) -> str:
        """The interpreter on the nodes."""
        return self.machine.python or sys.executable

    @property
    def num_items(self) -> int:
        """Pieces that the work is cut into."""
        return self.num_jobs * self.shares_per_job

    @property
    def cores_per_item(self) -> int:
        """Cores of a node, shared by the items of a job; on one computer also by the jobs that run at the same time."""
        if self.cores is not None:
            return self.cores
        sharing = self.shares_per_job * (self.num_at_once if self.machine.scheduler == "local" else 1)
        return max(1, usable_cpu_cores(self.machine.node) // sharing)

    @property
    def num_rest(self) -> int:
        """Jobs that are not in the first array."""
        return 0 if self.machine.scheduler == "local" else max(0, self.num_jobs - largest_array(self.machine))

    def shape(self, files: FarmFiles) -> JobShape:
        """What each job asks for."""
        return JobShape(self.machine, self.name, files.submitit, self.python, self.num_at_once, self.walltime_min, self.queue, self.account)
