"""Starts real ranks for the tests of `comm`: with our own variables, or under a real mpirun; each with `timeout -k`."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

WORK = Path(__file__).with_name("rank_work.py")
REPOSITORY = WORK.parents[2]
TIMEOUT = ["timeout", "-k", "5"]


@dataclass(frozen=True)
class Ended:
    """How the ranks ended."""

    codes: list[int]
    """Exit codes by rank; under mpirun only its own."""
    stderr: str
    folder: Path

    @property
    def reports(self) -> dict[int, dict[str, Any]]:
        """What each rank that came so far has written."""
        found = [json.loads(path.read_text()) for path in self.folder.glob("*.json")]
        return {report["rank"]: report for report in found}


def environment(**own: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | own


def place(rank: int, world_size: int) -> dict[str, str]:
    names = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size, "NODE_RANK": 0}
    return {f"PROTTRANS_{name}": str(value) for name, value in names.items()}


def start_processes(
    folder: Path, num_ranks: int, scenario: str, back_end: str, *arguments: str, limit_s: int = 300, environments: list[dict[str, str]] | None = None
) -> Ended:
    """Ranks with our own starter's variables; without MASTER_ADDR they meet in `folder`."""
    shared = {"PROTTRANS_NONCE": secrets.token_hex(8)}
    own = environments or [shared | place(rank, num_ranks) for rank in range(num_ranks)]
    argv = [*TIMEOUT, str(limit_s), sys.executable, str(WORK), scenario, back_end, str(folder), *arguments]
    processes = [subprocess.Popen(argv, env=environment(**one), stderr=subprocess.PIPE, text=True, start_new_session=True) for one in own]
    try:
        # From rank 0 on: a stopped last rank is killed once the others have ended.
        codes, errors = [], []
        for index, process in enumerate(processes):
            if index == len(processes) - 1 and "stopped" in scenario:
                os.killpg(process.pid, signal.SIGKILL)
            errors.append(process.communicate()[1])
            codes.append(process.returncode)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Ended(codes, "\n".join(errors), folder)


ROOT_MAY_RUN_MPI = {f"{name}_ALLOW_RUN_AS_ROOT{confirm}": "1" for name in ("OMPI", "PRTE") for confirm in ("", "_CONFIRM")}


def start_mpirun(folder: Path, num_ranks: int, scenario: str, back_end: str, *arguments: str, limit_s: int = 300) -> Ended:
    """Ranks under the mpirun of this environment."""
    beside = Path(sys.executable).with_name("mpirun")
    argv = [*TIMEOUT, str(limit_s), str(beside) if beside.exists() else "mpirun", "--map-by", ":OVERSUBSCRIBE", "-np", str(num_ranks)]
    argv += [sys.executable, str(WORK), scenario, back_end, str(folder), *arguments]
    done = subprocess.run(argv, env=environment(**ROOT_MAY_RUN_MPI), stderr=subprocess.PIPE, text=True, start_new_session=True)
    return Ended([done.returncode], done.stderr, folder)


def start_alone(folder: Path, python_arguments: list[str], scenario: str, back_end: str, *, rank: int | None = None, world_size: int = 1) -> Ended:
    """One process, which may start others."""
    own = place(rank, world_size) if rank is not None else {}
    argv = [*TIMEOUT, "300", sys.executable, *python_arguments, str(WORK), scenario, back_end, str(folder)]
    done = subprocess.run(argv, env=environment(**ROOT_MAY_RUN_MPI, **own), stderr=subprocess.PIPE, text=True, start_new_session=True)
    return Ended([done.returncode], done.stderr, folder)


def load(path: Path) -> ModuleType:
    """A module that no package holds."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where dataclasses look for their types
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def rank_work() -> ModuleType:
    """The program that the ranks run, as a module."""
    return load(WORK)


@pytest.fixture(scope="session")
def reduction_starts() -> ModuleType:
    """What starts the ranks that sum gradients in all ways."""
    return load(WORK.with_name("reduction_starts.py"))


@pytest.fixture(scope="session")
def ranks_agree(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Ended]:
    """`ranks_agree(back_end, n)`: the scenario "agreement" by n ranks, run once a back end and number."""
    done: dict[tuple[str, int], Ended] = {}

    def run(back_end: str, num_ranks: int) -> Ended:
        if (back_end, num_ranks) not in done:
            folder = tmp_path_factory.mktemp(f"{back_end}-{num_ranks}")
            start = start_processes if back_end == "torch" else start_mpirun
            ended = start(folder, num_ranks, "agreement", back_end)
            assert set(ended.codes) == {0}, ended.stderr
            done[back_end, num_ranks] = ended
        return done[back_end, num_ranks]

    return run


@pytest.fixture
def run_processes(tmp_path: Path) -> Callable[..., Ended]:
    """`run_processes(n, scenario, ...)`."""
    return lambda *arguments, **options: start_processes(tmp_path, *arguments, **options)


@pytest.fixture
def run_mpirun(tmp_path: Path) -> Callable[..., Ended]:
    """`run_mpirun(n, scenario, back_end, ...)`."""
    return lambda *arguments, **options: start_mpirun(tmp_path, *arguments, **options)


@pytest.fixture
def run_alone(tmp_path: Path) -> Callable[..., Ended]:
    """`run_alone(python_arguments, scenario, back_end, ...)`."""
    return lambda *arguments, **options: start_alone(tmp_path, *arguments, **options)
