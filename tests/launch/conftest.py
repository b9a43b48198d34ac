"""A job whose ranks are small Python programs instead of training: everything around them is real and quick."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from prottrans_hpc.run_dir import RunDir

REPOSITORY = Path(__file__).resolve().parents[2]

# What a rank does: says who it is, then what RUN_DIR/behaviour.json tells it; without an order it waits for a signal and "saves".
RANK_PROGRAM = """
import json, os, signal, sys, time
run_dir = sys.argv[5]
got = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: got.append(signal.Signals(number).name))
signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2))
rank = next(os.environ[name] for name in ("PROTTRANS_RANK", "OMPI_COMM_WORLD_RANK", "RANK", "PWD") if name in os.environ)
rank = rank if rank.isdigit() else "0"
try:
    order = json.load(open(os.path.join(run_dir, "..", "behaviour.json"))).get(rank, {})
except FileNotFoundError:
    order = {}
told = {"pid": os.getpid(), "ppid": os.getppid(), "environment": dict(os.environ), "argv": sys.argv}
path = os.path.join(run_dir, "..", "rank-" + rank + ".json")
with open(path + ".new", "w") as file:
    json.dump(told, file)
os.rename(path + ".new", path)
print("progress of rank " + rank, file=sys.stderr, flush=True)
if "kill" in order:
    os.kill(os.getpid(), order["kill"])
if "code" in order:
    sys.exit(order["code"])
while not got:
    time.sleep(0.01)
if order.get("deaf"):
    time.sleep(600)
time.sleep(0.1)
with open(path + ".got", "w") as file:
    file.write(" ".join(got))
sys.exit(75)
"""

FAKE_PYTHON = """#!/bin/bash
# Ranks run the small program; everything else is the real interpreter.
if [ "${3-}" = prottrans_hpc ]; then exec PYTHON PROGRAM "$@"; fi
exec PYTHON "$@"
"""

DRIVER = "import sys; sys.executable = sys.argv.pop(1); from prottrans_hpc.launch.cli import main; sys.exit(main(sys.argv[1:]))"


@dataclass(frozen=True)
class Job:
    """`prottrans pretrain` with small ranks, in a folder of its own."""

    folder: Path
    python: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus"

    def behave(self, orders: Mapping[int, Mapping[str, int]]) -> None:
        """What ranks do: {"code": N} ends with N, {"kill": N} dies of signal N, {"deaf": 1} ignores requests to stop."""
        (self.folder / "behaviour.json").write_text(json.dumps({str(rank): order for rank, order in orders.items()}))

    def argv(self, *arguments: str) -> list[str]:
        defaults = ["pretrain", "tiny_prot_bert", "--corpus", str(self.corpus), "--run-dir", str(self.run_dir)]
        return [sys.executable, "-c", DRIVER, str(self.python), *defaults, *arguments]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start it as the leader of its own process group."""
        process = subprocess.Popen(self.argv(*arguments), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
        self.processes.append(process)
        return process

    def rank(self, rank: int) -> dict[str, Any]:
        """What a rank said about itself, once it has."""
        path = self.folder / f"rank-{rank}.json"
        wait_until(path.is_file)
        told: dict[str, Any] = json.loads(path.read_text())
        return told

    def pid(self, rank: int) -> int:
        return int(self.rank(rank)["pid"])

    def got(self, rank: int) -> list[str]:
        """The signals that a rank took before it ended."""
        return (self.folder / f"rank-{rank}.json.got").read_text().split()

    @staticmethod
    def wait_until(condition: Callable[[], bool], timeout_s: float = 120) -> None:
        wait_until(condition, timeout_s)

    @staticmethod
    def wait_gone(pids: Iterable[int]) -> None:
        wait_until(lambda: not any(is_alive(pid) for pid in pids))

    def exit_code(self) -> str:
        """What the job script left, once it has; the shell makes the file a moment before it writes."""
        path = self.run_dir / "job.exit-code"
        wait_until(lambda: path.is_file() and path.read_text().endswith("\n"))
        return path.read_text()

    def forget_ranks(self) -> None:
        for path in self.folder.glob("rank-*"):
            path.unlink()


def environment() -> dict[str, str]:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # mpirun is there
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "PATH": path}


def wait_until(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    """Wait for something that happens in another process; fails when it does not."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"waited {timeout_s} s in vain")
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def write_index(corpus: Path, *, train: int = 500, validation: int = 5) -> Path:
    """The index of a corpus without shards: as much as the launch side looks at."""
    corpus.mkdir(parents=True, exist_ok=True)
    splits = {
        name: {"sequences": number, "residues": 100 * number, "bytes": 0, "shards": []} for name, number in (("train", train), ("validation", validation))
    }
    (corpus / "index.json").write_text(json.dumps({"format": 1, "splits": splits}))
    return corpus


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    program, python = tmp_path / "rank.py", tmp_path / "fake python"
    program.write_text(RANK_PROGRAM)
    python.write_text(FAKE_PYTHON.replace("PYTHON", sys.executable).replace("PROGRAM", str(program)))
    python.chmod(0o755)
    job = Job(tmp_path, python)
    write_index(job.corpus)
    yield job
    for process in job.processes:
        if process.poll() is None:  # the test has failed: what did it wait for?
            process.kill()
            print(process.communicate()[1])
    pids = [int(json.loads(path.read_text())["pid"]) for path in tmp_path.glob("rank-*.json")]
    end = time.monotonic() + 60  # a rank that dies with its starter takes a moment for it
    while (left := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < end:
        time.sleep(0.01)
    for pid in left:
        os.kill(pid, 9)
    assert not left, "processes were left behind"


@dataclass(frozen=True)
class FakeSlurm:
    """`squeue` and `scancel` on PATH that answer from files, and remember what they were asked."""

    folder: Path

    def says(self, **states: str) -> None:
        """What squeue knows: says(j12="RUNNING")."""
        new = self.folder / "states.new"
        new.write_text("".join(f"{job.removeprefix('j')}|{state}\n" for job, state in states.items()))
        new.rename(self.folder / "states")

    def is_silent(self) -> None:
        """From now on the controller does not answer."""
        (self.folder / "states").unlink(missing_ok=True)

    @property
    def calls(self) -> list[str]:
        """Every command line so far."""
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


_FAKE_COMMANDS = {
    "squeue": 'if ! cat "$here/states" 2>/dev/null; then echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1; fi',
    "scancel": "true",
    "sbatch": 'n=$(cat "$here/next" 2>/dev/null || echo 100); echo $((n + 1)) > "$here/next"; echo "$n"',
}


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    folder = tmp_path / "fake slurm"
    folder.mkdir()
    for name, body in _FAKE_COMMANDS.items():
        program = folder / name
        program.write_text(f'#!/bin/sh\nhere=$(dirname "$0")\necho "{name} $*" >> "$here/calls"\n{body}\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return FakeSlurm(folder)


@dataclass(frozen=True)
class RunsFolder:
    """Run directories as `prottrans runs` meets them, without anything having run."""

    folder: Path

    def make(self, name: str, *, machine: str = "laptop", nodes: int = 1, stop_after_step: int | None = None, job_ids: tuple[str, ...] = ()) -> RunDir:
        """A run of tiny_prot_bert (200 steps), submitted as `job_ids` to the machine's scheduler."""
        from prottrans_hpc import run_dir as run_dirs
        from prottrans_hpc.launch import planner
        from prottrans_hpc.launch.checks import read_corpus_facts
        from prottrans_hpc.launch.demand import Demand
        from prottrans_hpc.machine import read_machine
        from prottrans_hpc.recipe import read_recipe

        recipe, profile = read_recipe("tiny_prot_bert"), read_machine(machine)
        facts = read_corpus_facts(write_index(self.folder.parent / "corpus"))
        directory = run_dirs.prepare(self.folder / name)
        allocation = planner.plan(recipe, profile, Demand(num_nodes=nodes, partial_rack=profile.nodes_per_rack is not None))
        run = run_dirs.Run(
            "a" * 16, "2026-01-01T00:00:00+00:00", "0", recipe, "tiny_prot_bert", str(facts.path), facts.sha256, profile, allocation, stop_after_step
        )
        run_dirs.write_run(directory, run)
        if job_ids:
            run_dirs.write_jobs(directory, run_dirs.Jobs(profile.scheduler, job_ids, os.uname().nodename, "2026-01-01T00:00:00+00:00", "proj"))
        return directory

    @staticmethod
    def train(directory: RunDir, steps: int, *, saved: Iterable[int] = (), first: int = 1) -> None:
        """Lines of metrics.jsonl, and checkpoints that are empty folders."""
        with directory.metrics.open("a") as file:
            for step in range(first, steps + 1):
                file.write(json.dumps({"step": step, "loss": 3.0 - step / 1000, "step_s": 2.0, "residues_per_s": 1000.0 + step}) + "\n")
        for step in saved:
            directory.checkpoint(step).mkdir(parents=True)

    @staticmethod
    def happened(directory: RunDir, *events: Mapping[str, Any]) -> None:
        """Lines of history.jsonl (start, stop) and jobs.jsonl (those with a job_id)."""
        for event in events:
            path = directory.jobs_log if "job_id" in event else directory.history
            with path.open("a") as file:
                file.write(json.dumps(event) + "\n")


@pytest.fixture
def runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunsFolder:
    """The folder `runs` of the current folder."""
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    return RunsFolder(tmp_path / "runs")
