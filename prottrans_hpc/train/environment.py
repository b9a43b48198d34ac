"""What a start ran on, for environment.json: hosts, hardware, versions, commit, modules, command lines; never a secret.

Environment variables are taken by a list of names that are known to be harmless and useful, never all of them.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import timestamp
from ..comm import Comm
from ..rank import RankContext
from ..run_dir import Run

PACKAGES = ("prottrans-hpc", "torch", "numpy", "safetensors", "h5py", "pydantic", "horovod", "mpi4py")
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "GLOO_SOCKET_IFNAME",
    "LSB_JOBID",
    "LSB_JOBNAME",
    "LSB_QUEUE",
    "MASTER_ADDR",
    "MKL_NUM_THREADS",
    "NCCL_ALGO",
    "NCCL_DEBUG",
    "NCCL_IB_DISABLE",
    "NCCL_NET_GDR_LEVEL",
    "NCCL_PROTO",
    "NCCL_SOCKET_IFNAME",
    "OMP_NUM_THREADS",
    "OMP_PLACES",
    "OMP_PROC_BIND",
    "SLURM_CLUSTER_NAME",
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_PARTITION",
    "SLURM_RESTART_COUNT",
)


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of what computes or writes here; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> dict[str, Any] | None:
    """The commit that this package is checked out at and whether files differ from it; None when it is no checkout."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "modified": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def describe_start(run: Run, comm: Comm, context: RankContext, *, start_id: str) -> dict[str, Any] | None:
    """The content of environment.json on rank 0, None elsewhere. Collective: each rank tells its host and device."""
    ranks = comm.all_gather_object([context.hostname, _device_name(comm.device)])
    if not context.is_main:  # looking up versions and hardware costs files and a process
        return None
    return {
        "time": timestamp.now(),
        "start_id": start_id,
        "command_line": sys.orig_argv,
        "launched_with": run.command_line,
        "git": git_commit(),
        "versions": versions(),
        "modules": [name for name in os.environ.get("LOADEDMODULES", "").split(":") if name],
        "starter": context.starter,
        "comm": comm.name,
        "world_size": comm.world_size,
        "num_nodes": context.num_nodes,
        "hosts": Counter(host for host, _ in ranks),
        "devices": Counter(device for _, device in ranks),
        "cpu": {"name": _cpu_name(), "usable_cores": len(os.sched_getaffinity(0)), "threads_per_rank": torch.get_num_threads()},
        "operating_system": platform.platform(),
        "cuda": torch.version.cuda,
        "variables": chosen_variables(os.environ),
    }


def chosen_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment variables on the list."""
    return {name: environment[name] for name in VARIABLES if name in environment}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
