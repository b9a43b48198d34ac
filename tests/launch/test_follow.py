"""Following a run: in the queue, through requeues and silences of the scheduler, to the exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from prottrans_hpc import errors
from prottrans_hpc.launch import cli, follow
from prottrans_hpc.run_dir import RunDir

CHECKOUT = {"PYTHONPATH": str(Path(cli.__file__).parents[2])}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "LOG_EVERY_S", 0.01)
    monkeypatch.setattr(follow, "STATES_EVERY_S", 0.1)
    monkeypatch.setattr(follow, "SOON_S", 0.02)


@pytest.fixture
def run(runs_folder: Any) -> RunDir:
    directory: RunDir = runs_folder.make("run", machine="slurm_cluster", job_ids=("1", "2"))
    directory.job_log.write_text("of an earlier start\n")
    return directory


@pytest.fixture
def meanwhile() -> Iterator[Callable[..., None]]:
    """Run steps one after the other while the test follows; a step waits until the fake squeue was asked again."""
    threads: list[threading.Thread] = []
    failures: list[BaseException] = []

    def begin(slurm: Any, *steps: Callable[[], object]) -> None:
        def work() -> None:
            try:
                for step in steps:
                    before, end = len(slurm.calls), time.monotonic() + 60
                    while len(slurm.calls) < before + 2 and time.monotonic() < end:
                        time.sleep(0.01)
                    step()
            except BaseException as error:
                failures.append(error)

        threads.append(threading.Thread(target=work))
        threads[-1].start()

    yield begin
    for thread in threads:
        thread.join()
    assert not failures


def append(path: Path, text: str) -> Callable[[], object]:
    def write() -> None:
        with path.open("a") as file:
            file.write(text)

    return write


@contextmanager
def repeated(step: Callable[[], object]) -> Iterator[None]:
    """Do it again and again while the block runs."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(0.05):
            step()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_from_the_queue_to_the_end_of_a_chain(run: RunDir, fake_slurm: Any, meanwhile: Any, capsys: pytest.CaptureFixture[str]) -> None:
    log_from = follow.log_size(run)
    fake_slurm.says(j1="PENDING", j2="PENDING")
    meanwhile(
        fake_slurm,
        lambda: fake_slurm.says(j1="RUNNING", j2="PENDING"),
        append(run.job_log, "first job\n"),
        lambda: run.exit_code.write_text("75\n"),
        lambda: fake_slurm.says(j1="COMPLETED", j2="PENDING"),
        lambda: fake_slurm.says(j2="RUNNING"),
        append(run.job_log, "second \x1b[2Jjob\nno newline at the end"),
        lambda: run.exit_code.write_text("0\n"),
        lambda: fake_slurm.says(j2="COMPLETED"),
    )
    assert follow.follow(run, ["1", "2"], log_from=log_from) == 0
    told = capsys.readouterr()
    assert told.out == "first job\nsecond \\x1b[2Jjob\nno newline at the end\n"
    changes = [line.split(maxsplit=1)[1] for line in told.err.splitlines()]
    assert changes == [
        "job 1 waits in the queue",
        "job 2 waits in the queue",
        "job 1 runs",
        "job 1 is done",
        "job 1 is not known to slurm any more",
        "job 2 runs",
        "job 2 is done",
    ]


def test_a_silent_scheduler_and_unknown_states_are_no_end(run: RunDir, fake_slurm: Any, meanwhile: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake_slurm.says(j1="RUNNING")
    meanwhile(
        fake_slurm,
        fake_slurm.is_silent,
        append(run.job_log, "printed while nobody answered\n"),
        lambda: fake_slurm.says(j1="STATE_OF_TOMORROW"),
        append(run.job_log, "printed in an unknown state\n"),
        lambda: run.exit_code.write_text("76\n"),
        lambda: fake_slurm.says(),
    )
    assert follow.follow(run, ["1"]) == errors.NUMERICS
    told = capsys.readouterr()
    assert told.out == "printed while nobody answered\nprinted in an unknown state\n"
    assert told.err.count("warning: ") == 1 and "counts as alive" in told.err


def test_a_requeued_job_is_nowhere_for_a_moment_only(run: RunDir, fake_slurm: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answers = iter([{"1": "RUNNING"}, {}, {"1": "PENDING"}, {"1": "PREEMPTED"}, {"1": "RUNNING"}, {"1": "COMPLETED"}, {"1": "COMPLETED"}])
    from prottrans_hpc.launch import slurm

    monkeypatch.setattr(follow.submission, "states", lambda scheduler, job_ids: slurm.parse_states("\n".join(f"{i}|{s}" for i, s in next(answers).items())))
    run.exit_code.write_text("0\n")
    assert follow.follow(run, ["1"]) == 0
    assert next(answers, None) is None, "every answer was needed"
    assert "job 1 was preempted" in capsys.readouterr().err


def test_a_job_that_the_scheduler_does_not_know_yet_is_waited_for(run: RunDir, fake_slurm: Any, meanwhile: Any) -> None:
    fake_slurm.says()
    run.exit_code.write_text("0\n")
    meanwhile(fake_slurm, lambda: fake_slurm.says(j1="RUNNING"), lambda: fake_slurm.says(j1="COMPLETED"))
    assert follow.follow(run, ["1"]) == 0


def test_a_job_of_which_nothing_is_ever_heard_has_ended(run: RunDir, fake_slurm: Any) -> None:
    fake_slurm.says()
    assert follow.follow(run, ["1"]) == errors.REQUEUE
    assert len(fake_slurm.calls) == follow.GONE_AFTER_ANSWERS


@pytest.mark.parametrize(("state", "code"), [("OUT_OF_MEMORY", 71), ("FAILED", 71), ("CANCELLED", 75), ("TIMEOUT", 75), ("NODE_FAIL", 75), ("COMPLETED", 0)])
def test_a_job_that_could_leave_no_exit_code_gets_one(state: str, code: int, run: RunDir, fake_slurm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake_slurm.says(j1=state)
    assert follow.follow(run, ["1"]) == code
    assert "left no exit code" in capsys.readouterr().err


def test_schedulers_are_asked_seldom(run: RunDir, fake_slurm: Any, meanwhile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a job runs only time counts, however much its log grows."""
    monkeypatch.setattr(follow, "STATES_EVERY_S", 3600.0)
    fake_slurm.says(j1="RUNNING")
    watch = follow.JobWatch(run, ["1"])
    for _ in range(50):
        assert not watch.have_ended()
        watch.look_soon()
    assert len(fake_slurm.calls) == 1
    time.sleep(0.03)
    run.exit_code.write_text("75\n")
    assert not watch.have_ended() and len(fake_slurm.calls) == 2, "a file that changes is worth a question"


FOLLOW = (
    "import sys; from prottrans_hpc.launch import follow; follow.LOG_EVERY_S = 0.01; from prottrans_hpc.launch.cli import main; sys.exit(main(sys.argv[1:]))"
)


def prottrans(*arguments: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", FOLLOW, *arguments]
    return subprocess.Popen(argv, env=os.environ | CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)


def test_control_c_stops_the_following_and_not_the_job(job: Any) -> None:
    assert subprocess.run(job.argv("--detach"), env=os.environ | CHECKOUT, capture_output=True, check=False).returncode == 0
    job.rank(0)
    follower = prottrans("runs", "logs", str(job.run_dir), "--follow", "-n", "0")
    assert follower.stdout is not None
    with repeated(append(job.run_dir / "logs" / "job.log", "new\n")):
        assert follower.stdout.readline() == "new\n", "it has come to follow"
    os.killpg(follower.pid, signal.SIGINT)
    _, said = follower.communicate(timeout=180)
    assert follower.returncode == errors.INTERRUPTED, said
    assert "the job goes on" in said and f"prottrans runs cancel {job.run_dir}" in said
    listed = subprocess.run(
        [sys.executable, "-m", "prottrans_hpc.launch.cli", "runs", "--runs", str(job.folder)],
        env=os.environ | CHECKOUT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "running" in listed.stdout
    again = prottrans("runs", "logs", str(job.run_dir), "--follow", "-n", "100000")  # a slow follower was sent many lines
    done = prottrans("runs", "cancel", str(job.run_dir)).communicate(timeout=180)[0]
    assert "asked to save and stop" in done
    out, said = again.communicate(timeout=180)
    assert again.returncode == 0 and "progress of rank 0" in out, said
    assert job.got(0) == ["SIGTERM"]


def test_resume_in_the_background_and_follow_give_the_exit_code_of_the_job(job: Any) -> None:
    job.behave({0: {"code": 76}})
    assert subprocess.run(job.argv(), env=os.environ | CHECKOUT, capture_output=True, check=False).returncode == 76
    job.forget_ranks()
    job.behave({0: {"code": 74}})
    driver = job.argv()[:4]
    argv = [*driver, "runs", "resume", str(job.run_dir), "--follow"]
    done = subprocess.run(argv, env=os.environ | CHECKOUT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 74, done.stderr
    assert "progress of rank 0" in done.stdout and "exit code 74" in done.stderr
    job.forget_ranks()
    job.behave({0: {"kill": 9}})
    detached = subprocess.run([*driver, "runs", "resume", str(job.run_dir), "--detach"], env=os.environ | CHECKOUT, capture_output=True, text=True, check=False)
    assert detached.returncode == 0 and f"prottrans runs logs {job.run_dir} --follow" in detached.stderr
    assert job.exit_code() == "137\n"


def test_a_job_in_the_foreground_is_listed_and_cancelled_from_another_shell(job: Any) -> None:
    process = job.start()
    job.rank(0)
    listed = prottrans("runs", "list", "--runs", str(job.folder), "--json").communicate(timeout=180)[0]
    assert '"state": "running"' in listed and f'"id": "{process.pid}"' in listed
    assert "asked to save and stop" in prottrans("runs", "cancel", str(job.run_dir)).communicate(timeout=180)[0]
    assert process.communicate(timeout=180) and process.returncode == errors.REQUEUE
    assert "nothing to cancel" in prottrans("runs", "cancel", str(job.run_dir)).communicate(timeout=180)[0]
    assert '"state": "cancelled"' in prottrans("runs", "list", "--runs", str(job.folder), "--json").communicate(timeout=180)[0]
