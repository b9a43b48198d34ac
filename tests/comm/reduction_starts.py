"""Starts the ranks that the tests of reductions take: with our own variables, at given places, or under mpirun."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORK = Path(__file__).with_name("reduction_work.py")
TWO_NODES = ((0, 0), (0, 1), (1, 0), (1, 1))
ROOT_MAY_RUN_MPI = {f"{name}_ALLOW_RUN_AS_ROOT{confirm}": "1" for name in ("OMPI", "PRTE") for confirm in ("", "_CONFIRM")}
Settings = dict[str, dict[str, Any]]
"""Sections [parallel] by a name of the test's own."""


@dataclass(frozen=True)
class Ended:
    codes: list[int]
    stderr: str
    reports: list[dict[str, Any]]


def run(folder: Path, scenarios: str, settings: Settings, places=TWO_NODES, *, gpus: bool = False) -> Ended:
    """Ranks at these places (node rank, local rank), on CPUs or with a GPU each."""
    shared = os.environ | {"PYTHONPATH": str(WORK.parents[2]), "OMP_NUM_THREADS": "1", "PROTTRANS_NONCE": secrets.token_hex(8)}
    processes = []
    for rank, (node, local) in enumerate(places):
        mates = sum(other == node for other, _ in places)
        place = {"RANK": rank, "WORLD_SIZE": len(places), "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": mates, "NODE_RANK": node}
        argv = ["timeout", "-k", "5", "200", sys.executable, str(WORK), scenarios, json.dumps(settings), str(folder)]
        own = shared | {"CUDA_VISIBLE_DEVICES": str(rank) if gpus else ""} | {f"PROTTRANS_{name}": str(value) for name, value in place.items()}
        processes.append(subprocess.Popen(argv, env=own, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate()[1] for process in processes]
    written = [folder / f"{rank}.json" for rank in range(len(places))]
    return Ended([process.returncode for process in processes], "\n".join(errors), [json.loads(path.read_text()) for path in written if path.exists()])


def run_mpirun(folder: Path, scenarios: str, settings: Settings, num_ranks: int, ranks_a_node: int) -> Ended:
    """Ranks over Horovod, of which so many neighbours pass for a node; the one exit code is mpirun's."""
    beside = Path(sys.executable).with_name("mpirun")
    argv = ["timeout", "-k", "5", "200", str(beside) if beside.exists() else "mpirun", "--map-by", ":OVERSUBSCRIBE", "-np", str(num_ranks)]
    over_horovod = {name: {"comm": "horovod", **setting} for name, setting in settings.items()}
    argv += [sys.executable, str(WORK), scenarios, json.dumps(over_horovod), str(folder), str(ranks_a_node)]
    own = os.environ | {"PYTHONPATH": str(WORK.parents[2]), "OMP_NUM_THREADS": "1"} | ROOT_MAY_RUN_MPI
    done = subprocess.run(argv, env=own, stderr=subprocess.PIPE, text=True, start_new_session=True)
    written = [folder / f"{rank}.json" for rank in range(num_ranks)]
    return Ended([done.returncode], done.stderr, [json.loads(path.read_text()) for path in written if path.exists()])
