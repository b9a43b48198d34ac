"""Runs small enough to be started often: a micro recipe, real ranks under the real starter, and readers of what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
MICRO = (
    "phases.0.steps=16",
    "phases.0.max_residues=48",
    "phases.0.global_batch_size=6",
    "phases.0.warmup_steps=2",
    "loading.bin_residues=64",
    "checkpoint.every_steps=3",
    "validation.every_steps=4",
    "validation.max_sequences=8",
    "parallel.timeout_s=180",
)
TIMINGS = {"residues_per_s", "tokens_per_s", "mfu", "step_s", "data_wait_s", "checkpoint_s", "memory_mib", "seconds", "ledger"}
START_TIMEOUT_S = 240.0


@dataclass
class Gang:
    """All ranks of one start, under the starter for local processes."""

    run_dir: Path
    num_ranks: int
    process: subprocess.Popen[bytes]
    errors: Path

    def rank_pids(self) -> list[int]:
        """Process ids of the ranks, by rank; waits until all were started."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        deadline = time.monotonic() + START_TIMEOUT_S
        while len(found := children.read_text().split()) < self.num_ranks:
            assert time.monotonic() < deadline, "the ranks were not started"
            assert self.process.poll() is None, self.story()
            time.sleep(0.01)
        return [int(pid) for pid in found]

    def wait_for_step(self, step: int) -> bool:
        """Wait until metrics.jsonl has a line for this step; False when the gang ended first."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.process.poll() is None:
            if steps_recorded(self.run_dir) >= step:
                return True
            assert time.monotonic() < deadline, self.story()
            time.sleep(0.002)
        return steps_recorded(self.run_dir) >= step

    def kill(self) -> None:
        """SIGKILL to everything at once; the ranks die with the starter."""
        try:
            pids = self.rank_pids()
        except (AssertionError, FileNotFoundError):  # the starter has just ended, and its ranks with it
            assert self.process.wait(START_TIMEOUT_S) is not None
            pids = []
        for pid in [*pids, self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        for pid in pids:
            while Path(f"/proc/{pid}").exists():
                time.sleep(0.005)

    def signal(self, *numbers: int) -> None:
        """Signals to the starter, which passes them on to every rank."""
        for number in numbers:
            self.process.send_signal(number)

    def signal_rank(self, rank: int, *numbers: int) -> None:
        """Signals to one rank only; one that has ended misses nothing."""
        self.signal_pid(self.rank_pids()[rank], *numbers)

    @staticmethod
    def signal_pid(pid: int, *numbers: int) -> None:
        """Signals to a process, which may be gone."""
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self, code: int | None = 0) -> int:
        """Wait for the end and check the exit code."""
        try:
            found = self.process.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"the ranks hung\n{self.story()}")
        if code is not None and found != code:
            pytest.fail(f"the ranks ended with {found}, not {code}\n{self.story()}")
        return found

    def story(self) -> str:
        """What the ranks said."""
        logs = sorted((self.run_dir / "logs").glob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-5000:]}" for path in [self.errors, *logs])


StartRanks = Callable[..., Gang]


@pytest.fixture
def start_ranks(tmp_path: Path) -> Iterator[StartRanks]:
    """`start_ranks(run_dir, n, main=None, env={}, num_nodes=1)` starts n ranks; `main` is a script that stands in for the package's command."""
    gangs: list[Gang] = []

    def start(run_dir: Path, n: int, *, main: Path | None = None, env: dict[str, str] | None = None, num_nodes: int = 1) -> Gang:
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | (env or {})
        command = [str(main)] if main else ["-m", "prottrans_hpc", "pretrain"]
        size = ["--nodes", str(num_nodes), "--ranks-per-node", str(n // num_nodes)]
        starter = ["-m", "prottrans_hpc.launch.local_ranks", *size, "--run-dir", str(run_dir), "--hold-stop-signals", "--"]
        errors = tmp_path / f"start-{len(gangs)}.err"
        with errors.open("wb") as stream:
            process = subprocess.Popen([sys.executable, *starter, sys.executable, *command, str(run_dir)], env=environment, stdout=stream, stderr=stream)
        gangs.append(Gang(run_dir, n, process, errors))
        return gangs[-1]

    yield start
    for gang in gangs:
        if gang.process.poll() is None:
            gang.kill()


@pytest.fixture(scope="session")
def make_run(small_corpus: Path) -> Callable[..., Path]:
    """`make_run(folder, "section.key=value"..., num_ranks=2)` writes the run.json of a micro run; `stop_after_step=N` ends it early.

    `corpus`, `machine` and `name` stand in for the small corpus, the laptop and the recipe.
    """
    from prottrans_hpc import run_dir
    from prottrans_hpc.corpus.index import read_index
    from prottrans_hpc.machine import Allocation, Machine, read_machine
    from prottrans_hpc.recipe import read_recipe
    from prottrans_hpc.run_dir import Run

    def make(
        folder: Path,
        *settings: str,
        num_ranks: int = 2,
        stop_after_step: int | None = None,
        corpus: Path = small_corpus,
        machine: Machine | None = None,
        name: str = "tiny_prot_bert",
    ) -> Path:
        recipe = read_recipe(name, (*MICRO, *settings))
        allocation = Allocation(num_nodes=1, ranks_per_node=num_ranks, cpu_cores_per_rank=1, gpus_per_rank=0)
        sha256 = read_index(corpus).sha256
        run = Run(
            "0123456789abcdef",
            "2026-01-01T00:00:00Z",
            "0",
            recipe,
            "micro",
            str(corpus),
            sha256,
            machine or read_machine("laptop"),
            allocation,
            stop_after_step,
        )
        directory = run_dir.prepare(folder)
        if directory.run_json.exists():
            run = replace(run, run_id=run_dir.read_run(directory).run_id)
        run_dir.write_run(directory, run)
        return folder

    return make


def steps_recorded(run_dir: Path) -> int:
    """The step of the last complete line of metrics.jsonl."""
    try:
        lines = (run_dir / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return int(json.loads(lines[-1])["step"]) if lines else 0


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file without what a clock or the machine decides."""
    return [{key: value for key, value in json.loads(line).items() if key not in TIMINGS} for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def outcome() -> Callable[[Path], dict[str, Any]]:
    """`outcome(run_dir)`: everything that must not depend on how often a run was stopped, the tensors as bytes."""
    import torch

    from prottrans_hpc.run_dir import RunDir
    from prottrans_hpc.train.checkpoint import find_checkpoint, read_checkpoint

    def read(folder: Path) -> dict[str, Any]:
        directory = RunDir(folder)
        found = read_checkpoint(find_checkpoint(folder))
        tensors = {
            f"{kind}/{name}": tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            for kind in ("model", "optimizer")
            for name, tensor in getattr(found, kind).items()
        }
        state = {key: found.state[key] for key in ("step", "samples", "position", "identity", "loss_scale")}
        return {"state": state, "metrics": read_records(directory.metrics), "validation": read_records(directory.validation), "tensors": tensors}

    return read


@pytest.fixture(scope="session")
def history() -> Callable[[Path], list[dict[str, Any]]]:
    """`history(run_dir)`: the complete lines of history.jsonl."""
    return lambda folder: [json.loads(line) for line in (folder / "history.jsonl").read_text().split("\n")[:-1]]  # one may be on its way


@pytest.fixture(scope="session")
def same() -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """`same(outcome, outcome)` fails naming what differs first."""

    def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
        assert found["state"] == expected["state"]
        assert [line["step"] for line in found["metrics"]] == [line["step"] for line in expected["metrics"]]
        for mine, theirs in zip(found["metrics"], expected["metrics"], strict=True):
            assert mine == theirs
        assert found["validation"] == expected["validation"]
        assert found["tensors"].keys() == expected["tensors"].keys()
        assert [name for name, value in found["tensors"].items() if value != expected["tensors"][name]] == []

    return check
