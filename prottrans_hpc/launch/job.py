"""What is to be run, where and as what: the noun from which schedulers and starters make their words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath

from .. import config
from ..errors import ConfigError
from ..machine import Allocation, Machine
from ..run_dir import RunDir

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True)
class Job:
    """One gang: all ranks at once run one stage on one run directory."""

    stage: str
    name: str
    """For people and schedulers; `check_name` holds."""
    run_dir: RunDir
    machine: Machine
    allocation: Allocation
    python: str
    """The interpreter of the ranks, an absolute path."""
    flags: tuple[str, ...] = ()
    """For the ranks: ("--quiet",), ("--verbose",) or nothing."""
    account: str | None = None
    """Project or account that a batch system charges."""
    host_python: str | None = None
    """The interpreter of our own programs around the ranks, where the script runs; None: the ranks'. With a container they differ."""
    preflight: bool = False
    """Whether the job measures its nodes before it starts the ranks."""

    def __post_init__(self) -> None:
        config.check_name(self.name, what="the job name")
        for what, text in (("the run directory", str(self.run_dir.path)), ("the Python interpreter", self.python), ("the Python interpreter", self.own_python)):
            if _CONTROL.search(text) or not PurePath(text).is_absolute():
                raise ConfigError(f"{what} {text!r} must be an absolute path without control characters")
        if self.account is not None:
            config.check_name(self.account, what="the account")

    @property
    def command(self) -> list[str]:
        """What every rank runs. -P: a torch.py in the current folder is not torch."""
        return [*self.machine.launcher_prefix, self.python, "-P", "-m", "prottrans_hpc", self.stage, str(self.run_dir.path), *self.flags]

    @property
    def own_python(self) -> str:
        """The interpreter on the node where the job script runs, outside of a container."""
        return self.host_python or self.python

    def module(self, name: str) -> list[str]:
        """The call of a module of the launch side, on the node where the job script runs."""
        return [self.own_python, "-P", "-m", f"prottrans_hpc.launch.{name}"]


def num_ranks_text(allocation: Allocation) -> str:
    """ "2 nodes x 1 rank", for people."""
    nodes, ranks = allocation.num_nodes, allocation.ranks_per_node
    return f"{nodes} {'node' if nodes == 1 else 'nodes'} x {ranks} {'rank' if ranks == 1 else 'ranks'}"


def printable_line(text: str) -> str:
    """Text for a comment of a script: control characters could end the comment."""
    return _CONTROL.sub("?", text)
