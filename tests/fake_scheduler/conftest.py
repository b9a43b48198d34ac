"""A small cluster under the stand-in for LSF, with its commands on PATH."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
COMMANDS = ("bsub", "bjobs", "bkill", "brequeue", "jsrun")


@dataclass
class Lsf:
    """The stand-in, as a test speaks to it."""

    folder: Path
    environment: Mapping[str, str]
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def configure(self, **changes: Any) -> None:
        """Change the cluster, which is Summit with a fast clock otherwise."""
        path = self.folder / "cluster.json"
        new = path.with_suffix(".new")
        new.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))
        new.rename(path)

    def put_clock_forward(self, minutes: float) -> None:
        """Let so many minutes of walltime pass at once."""
        cluster = json.loads((self.folder / "cluster.json").read_text())
        self.configure(clock_ahead_s=cluster.get("clock_ahead_s", 0.0) + minutes * cluster["minute_s"])

    def run(self, command: str, *arguments: str, script: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """One of the commands."""
        return subprocess.run([command, *arguments], input=script or "", env={**self.environment, **environment}, capture_output=True, text=True, timeout=180)

    def submit(self, script: str, *arguments: str) -> int:
        """Submit a script that LSF takes; its job id."""
        done = self.run("bsub", *arguments, script=script)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split("<")[1].split(">")[0])

    def start(self) -> None:
        """Start the daemon: from here on jobs run."""
        self.daemons.append(subprocess.Popen([sys.executable, str(HERE / "lsf_daemon.py")], env=self.environment))

    def stop(self) -> None:
        """Stop the daemon, and with it everything that it started."""
        for daemon in self.daemons:
            daemon.terminate()
            daemon.wait(120)
        self.daemons.clear()

    def job(self, job_id: int | str) -> dict[str, Any]:
        """What LSF knows of a job."""
        job: dict[str, Any] = json.loads((self.folder / "jobs" / str(job_id) / "job.json").read_text())
        return job

    def wait(self, job_id: int | str, *states: str, timeout_s: float = 180) -> dict[str, Any]:
        """Wait until a job is in one of the states."""
        return self.wait_for(lambda: self.job(job_id)["stat"] in states, f"job {job_id} to be {' or '.join(states)}", timeout_s) or self.job(job_id)

    def wait_for(self, condition: Callable[[], bool], what: str, timeout_s: float = 180) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > end:
                pytest.fail(f"waited {timeout_s} s in vain for {what}")
            time.sleep(0.02)

    def wait_until_heard(self) -> None:
        """Wait until the daemon has dealt with every request."""
        folder = self.folder
        self.wait_for(lambda: not (folder / "requests.jsonl").exists() and not (folder / "requests-taken.jsonl").exists(), "the requests to be dealt with")

    def ask(self, job_id: int | str, what: str) -> None:
        """What no command does: "preempt" or "host failure"."""
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with (self.folder / "requests.jsonl").open("a") as file:
                file.write(json.dumps({"id": int(job_id), "what": what}) + "\n")


@pytest.fixture
def lsf(tmp_path: Path) -> Iterator[Lsf]:
    commands, state = tmp_path / "bin", tmp_path / "lsf"
    commands.mkdir()
    state.mkdir()
    for name in COMMANDS:
        program = commands / name
        program.write_text(f'#!/bin/bash\nFAKE_LSF={state} exec {sys.executable} {HERE / name}.py "$@"\n')
        program.chmod(0o755)
    path = os.pathsep.join((str(commands), os.environ["PATH"]))
    lsf = Lsf(state, os.environ | {"FAKE_LSF": str(state), "PATH": path})
    lsf.configure(minute_s=1.0, terminate_interval_s=1.0)
    yield lsf
    lsf.stop()
