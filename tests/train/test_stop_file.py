"""Requests to stop that come as a file, for starters that may pass no signals on; and exit codes left in a file, for those that may hide them."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prottrans_hpc.run_dir import RunDir
from prottrans_hpc.train import preemption

NONCE = "0123456789abcdef0123456789abcdef"
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "summit-936-nodes.sh"


@pytest.fixture(autouse=True)
def _nothing_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_received", "_watched", "_found", "_said"):
        monkeypatch.setattr(preemption, name, [])


def stops(folder: Path) -> list[tuple[str, int]]:
    """(cause, exit code) of every stop."""
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [(line["cause"], line["exit_code"]) for line in lines if line["event"] == "stop"]


def test_the_job_script_and_the_ranks_make_the_same_name() -> None:
    line = next(line for line in GOLDEN.read_text().splitlines() if line.startswith("stop_file="))
    script = f'PROTTRANS_NONCE={NONCE} run_dir=/run\n{line}\nprintf %s "$stop_file"'
    assert subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout == str(RunDir(Path("/run")).stop_file(NONCE))


def test_the_file_asks_once_it_is_there(tmp_path: Path) -> None:
    own, stale, other = (RunDir(tmp_path).stop_file(NONCE), RunDir(tmp_path).stop_file("earlier"), tmp_path / ".stopwatch")
    stale.write_text("SIGTERM\n")
    other.touch()
    preemption.watch(str(tmp_path), NONCE)
    assert not preemption.requested() and not stale.exists() and other.exists()
    assert preemption.cause() == "to another rank"
    own.write_text("SIGUSR1\n")
    assert preemption.requested() and preemption.cause() == "SIGUSR1 to the job script"
    own.unlink()
    assert preemption.requested(), "a request is not taken back"


def test_an_empty_file_asks_as_well(tmp_path: Path) -> None:
    preemption.watch(str(tmp_path), NONCE)
    RunDir(tmp_path).stop_file(NONCE).touch()  # on a full disk nothing more comes
    assert preemption.requested() and preemption.cause() == "a signal to the job script"


def test_what_the_script_writes_a_moment_after_it_opened_the_file_is_the_cause(tmp_path: Path) -> None:
    preemption.watch(str(tmp_path), NONCE)
    own = RunDir(tmp_path).stop_file(NONCE)
    own.touch()
    assert preemption.requested()
    writer = threading.Timer(0.05, own.write_text, ["SIGUSR2\n"])
    writer.start()
    assert preemption.cause() == "SIGUSR2 to the job script"
    writer.join()


def test_all_ranks_save_and_stop_together(tmp_path: Path, make_run: Callable[..., Path], start_ranks: Callable[..., Any]) -> None:
    folder = make_run(tmp_path / "run", "phases.0.steps=5000", "checkpoint.every_steps=4000", num_ranks=2)
    RunDir(folder).stop_file("another start").write_text("SIGTERM\n")
    gang = start_ranks(folder, 2, env={"PROTTRANS_NONCE": NONCE, "PROTTRANS_EXIT_CODE_FILE": str(folder / "code")})
    assert gang.wait_for_step(3)
    RunDir(folder).stop_file(NONCE).write_text("SIGUSR1\n")
    gang.end(75)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert RunDir(folder).checkpoint_steps() == [last]
    assert stops(folder) == [("SIGUSR1 to the job script", 75)]
    assert (folder / "code").read_text() == "75\n"
    assert [path.name for path in folder.glob(".stop-*")] == [RunDir(folder).stop_file(NONCE).name], "this start's own is the job script's to remove"


def test_a_request_that_came_before_the_first_step(tmp_path: Path, make_run: Callable[..., Path], start_ranks: Callable[..., Any]) -> None:
    folder = make_run(tmp_path / "run", num_ranks=2)
    RunDir(folder).stop_file(NONCE).write_text("SIGTERM\n")
    start_ranks(folder, 2, env={"PROTTRANS_NONCE": NONCE}).end(75)
    assert not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text()
    start_ranks(folder, 2, env={"PROTTRANS_NONCE": "the next start"}).end(0)
    assert [code for _, code in stops(folder)] == [75, 0]


def test_the_code_of_the_rank_that_failed_is_left(tmp_path: Path, make_run: Callable[..., Path], start_ranks: Callable[..., Any]) -> None:
    folder = make_run(tmp_path / "run", num_ranks=2)
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"corpus_sha256": "0" * 64}))
    start_ranks(folder, 2, env={"PROTTRANS_EXIT_CODE_FILE": str(folder / "code")}).end(78)
    assert (folder / "code").read_text() == "78\n"


def test_work_that_is_done_leaves_no_code(tmp_path: Path, make_run: Callable[..., Path], start_ranks: Callable[..., Any]) -> None:
    folder = make_run(tmp_path / "run", num_ranks=2, stop_after_step=1)
    start_ranks(folder, 2, env={"PROTTRANS_EXIT_CODE_FILE": str(folder / "code")}).end(0)
    assert not (folder / "code").exists()
