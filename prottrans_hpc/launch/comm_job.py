"""The communication study as a job: one gang of its own, through the same script, starter and batch system as a training."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import durable, errors, run_dir, terminal
from ..errors import ConfigError
from ..machine import Allocation, Machine
from ..run_dir import RunDir
from . import foreground, gang, submission
from .job import Job
from .job_script import render
from .schedulers import SCHEDULERS

REQUEST = "comm_request.json"
RESULTS = ("comm.json", "comm.txt", "comm.png")


MPI_OF_ITS_OWN = ("mpirun", "jsrun")
"""Starters that belong to an MPI. With srun it is the site's matter which MPI may begin; one that may not can end the ranks, so that there it is asked for."""


@dataclass(frozen=True)
class CommPlan:
    """Everything about a study that was decided before anything is touched."""

    machine: Machine
    allocation: Allocation
    out: RunDir
    """Its path is absolute; the folder may not exist yet."""
    request: dict[str, Any]
    """For the ranks."""
    flags: tuple[str, ...] = ()
    account: str | None = None

    def __post_init__(self) -> None:
        if self.allocation.num_ranks < 2:
            raise ConfigError("one rank has nobody to talk to: give --nodes 2 or more, or a machine with several ranks a node")

    @property
    def job(self) -> Job:
        """The job that measures."""
        python = self.machine.python or sys.executable
        host_python = sys.executable if self.machine.launcher_prefix else None
        return Job("comm", self.out.path.name, self.out, self.machine, self.allocation, python, self.flags, self.account, host_python)

    @property
    def script(self) -> bytes:
        """The job script: a function of the plan alone."""
        return render(self.job, SCHEDULERS[self.machine.scheduler].render_header(self.job))


def default_backends(machine: Machine) -> tuple[str, ...]:
    """Those that a machine's profile can have; what is not installed there is left out, with the reason, by the ranks."""
    mpi = ("mpi", "horovod") if machine.starter in MPI_OF_ITS_OWN else ()
    return ("gloo", *mpi, *(("nccl",) if machine.node.num_gpus else ()))


def carry_out(plan: CommPlan) -> int:
    """Write the folder and start or submit the job; the exit code of a job on this computer, 0 of a submitted one."""
    check_free(plan.out.path)
    directory = run_dir.prepare(plan.out.path)
    with gang.locked(directory) as lock:
        gang.check_idle(directory)
        for name in RESULTS:  # an old one must not pass for what this job finds
            (directory.path / name).unlink(missing_ok=True)
        durable.write_json(directory.path / REQUEST, plan.request)
        durable.write_bytes(directory.job_script, plan.script)
        directory.exit_code.unlink(missing_ok=True)
        if plan.machine.scheduler != "local":
            job_id = submission.submit(plan.machine.scheduler, directory)
            gang.write_jobs(directory, plan.machine.scheduler, [job_id], account=plan.account)
            terminal.note(f"submitted to {plan.machine.name}: job {job_id}; when it has ended, {directory.path / 'comm.txt'} says what was found")
            return errors.DONE
        gang.write_jobs(directory, "local", [str(os.getpid())])
        return foreground.run(["bash", str(directory.job_script)], lock)


def check_free(folder: Path) -> None:
    """Raises ConfigError when a folder is there and holds something else than a study."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: choose another --out")
    if folder.is_dir() and not (folder / REQUEST).exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no communication study: choose another --out")
