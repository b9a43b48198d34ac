"""Small trainings on the test cluster that something happens to, and what they leave.

A training of 2 nodes x 1 rank takes some seconds to start and 400 steps to end: long enough to be hit in the middle.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from prottrans_hpc.launch import job_events
from prottrans_hpc.run_dir import RunDir
from prottrans_hpc.train.checkpoint import find_checkpoint, read_checkpoint

if TYPE_CHECKING:
    from ..conftest import Cluster

HERE = Path(__file__).parent
NUM_STEPS = 400
MICRO = (
    "phases.0.steps=1000",
    "phases.0.max_residues=48",
    "phases.0.global_batch_size=6",
    "phases.0.warmup_steps=2",
    "loading.bin_residues=64",
    "checkpoint.every_steps=50",
    "validation.every_steps=0",
    "parallel.timeout_s=60",
)


@dataclass
class Training:
    """One run directory and its jobs."""

    cluster: Cluster
    folder: Path
    """As seen from the tests; the same on the nodes unless `inside` says otherwise."""
    corpus: Path
    machine: Path
    inside: Path | None = None
    settings: tuple[str, ...] = MICRO
    steps: int | None = NUM_STEPS
    job_ids: list[str] = field(default_factory=list)

    @property
    def run_dir(self) -> RunDir:
        return RunDir(self.folder)

    def submit(self, *settings: str, queue: str = "batch", num_jobs: int = 1, walltime_min: int = 10, code: int = 0) -> str:
        """Submit it as a chain; what was said."""
        order = {
            "settings": [*self.settings, *settings],
            "corpus": str(self.corpus),
            "machine": str(self.machine),
            "run_dir": str(self.inside or self.folder),
            "steps": self.steps,
            "nodes": 2,
            "ranks_per_node": 1,
            "queue": queue,
            "num_jobs": num_jobs,
            "walltime_min": walltime_min,
        }
        said = self.cluster.run(sys.executable, str(HERE / "submit_run.py"), json.dumps(order), code=code).stderr
        if not code:
            self.job_ids = self.cluster.job_ids(self.folder)
        return said

    @property
    def step(self) -> int:
        """The last step of metrics.jsonl."""
        try:
            lines = self.run_dir.metrics.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return 0
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def wait_for_step(self, step: int) -> None:
        """Wait until it has taken so many steps."""
        self._wait(lambda: self.step >= step or self.has_ended, f"step {step} of {self.folder}", 120)
        assert self.step >= step, self.story()

    def wait_for_start(self, number: int) -> None:
        """Wait until the n-th start trains."""

        def trains() -> bool:
            lines = self.run_dir.history.read_bytes().split(b"\n")[:-1] if self.run_dir.history.exists() else []
            starts = [line for line in map(json.loads, lines) if line["event"] == "start"]
            return len(starts) >= number and self.step > starts[number - 1]["step"]

        self._wait(trains, f"start no. {number} of {self.folder} to train", 120)

    def wait_done(self, timeout_s: float = 150) -> None:
        """Wait until a job of it has ended with 0."""
        self._wait(lambda: any(event.get("code") == 0 for event in self.events("ended")), f"the end of {self.folder}", timeout_s)

    def wait_event(self, name: str, number: int = 1, timeout_s: float = 120) -> dict[str, Any]:
        """Wait for the n-th event of this name."""
        self._wait(lambda: len(self.events(name)) >= number, f"event {name} no. {number} of {self.folder}", timeout_s)
        return self.events(name)[number - 1]

    def _wait(self, condition: Callable[[], object], what: str, timeout_s: float) -> None:
        try:
            self.cluster.wait(condition, what, timeout_s)
        except BaseException:
            print(self.story())
            raise

    @property
    def has_ended(self) -> bool:
        return any("code" in event for event in self.events("ended"))

    def events(self, *names: str) -> list[dict[str, Any]]:
        """The lines of jobs.jsonl with one of these names."""
        return [event for event in job_events.read_events(self.run_dir) if event["event"] in names or not names]

    @property
    def told(self) -> list[str]:
        """The names of all events in order, without those of the submission."""
        return [event["event"] for event in self.events() if event["event"] != "submitted"]

    @property
    def log(self) -> str:
        return self.run_dir.job_log.read_text(errors="replace") if self.run_dir.job_log.exists() else ""

    def outcome(self) -> dict[str, Any]:
        """All that must not depend on how often the run was stopped; tensors as bytes."""
        found = read_checkpoint(find_checkpoint(self.folder))
        tensors = {f"{kind}/{name}": tensor.numpy().tobytes() for kind in ("model", "optimizer") for name, tensor in getattr(found, kind).items()}
        lines = [json.loads(line) for line in self.run_dir.metrics.read_text().splitlines()]
        return {
            **{key: found.state[key] for key in ("step", "samples", "position")},
            **tensors,
            "losses": [line["loss"] for line in lines],
            "order": [line["order"] for line in lines],
        }

    def story(self) -> str:
        """For a failed test."""
        events = "\n".join(map(str, self.events()))
        return f"--- jobs.jsonl\n{events}\n--- job.log\n{self.log[-6000:]}"


MakeTraining = Callable[..., Training]


@pytest.fixture
def training(cluster: Cluster, tmp_path: Path, small_corpus: Path) -> MakeTraining:
    """`training(name="run")` gives a Training of its own."""

    def make(name: str = "run", *, settings: tuple[str, ...] = (), inside: Path | None = None, folder: Path | None = None, **profile: str) -> Training:
        machine = cluster.profile(tmp_path, rack_placement='"none"', **profile) if profile else cluster.profile(tmp_path)
        return Training(cluster, folder or tmp_path / name, small_corpus, machine, inside, (*MICRO, *settings))

    return make


@pytest.fixture(scope="session")
def undisturbed(_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, small_corpus: Path) -> dict[str, Any]:
    """The outcome of the same training when nothing happens to it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = Training(_cluster, folder / "run", small_corpus, _cluster.profile(folder))
    run.submit()
    run.wait_done()
    assert run.told == ["begun", "ended"]
    return run.outcome()


@pytest.fixture(scope="session")
def same() -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """`same(outcome, outcome)` fails naming what differs."""

    def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
        assert found.keys() == expected.keys()
        assert [key for key in expected if found[key] != expected[key]] == []

    return check
