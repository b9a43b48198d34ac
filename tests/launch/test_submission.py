"""What schedulers' commands answer, and what is made of it; the commands are small programs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prottrans_hpc.errors import SubmitError
from prottrans_hpc.launch import submission
from prottrans_hpc.launch.job_state import State
from prottrans_hpc.launch.submission import MaybeSubmittedError
from prottrans_hpc.run_dir import RunDir


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("scheduler", "name", "error"),
    [
        ("slurm", "squeue", "slurm_load_jobs error: Invalid job id specified"),
        ("lsf", "bjobs", "Job <7> is not found"),
        ("lsf", "bjobs", "Job <7> is not found\nJob <8> is not found"),
    ],
)
def test_a_scheduler_that_answers_may_forget_a_job(programs: Path, scheduler: str, name: str, error: str) -> None:
    program(programs, name, f"printf '%s\\n' '{error}' >&2; exit 1")
    assert submission.states(scheduler, ["7", "8"]) == {}


@pytest.mark.parametrize(
    ("scheduler", "name", "text"),
    [
        ("slurm", "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"),
        ("slurm", "squeue", "echo 'slurm_load_jobs error: Socket timed out on send/recv operation' >&2; exit 1"),
        ("slurm", "squeue", "exit 1"),
        ("slurm", "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; echo 'squeue: error: something else' >&2; exit 1"),
        ("lsf", "bjobs", "echo 'LSF is down. Please wait ...' >&2; exit 255"),
        ("lsf", "bjobs", "exit 255"),
    ],
)
def test_a_scheduler_that_does_not_answer_has_forgotten_nothing(programs: Path, scheduler: str, name: str, text: str) -> None:
    program(programs, name, text)
    with pytest.raises(SubmitError, match="cannot tell the state of jobs"):
        submission.states(scheduler, ["7"])


def test_one_question_for_many_jobs(programs: Path) -> None:
    program(programs, "squeue", 'echo x >>"$0.asked"; printf "7|RUNNING\\n9|NEWSTATE\\n55|PENDING\\n"')
    assert submission.states("slurm", ["7", "8", "9"]) == {"7": State.RUNNING, "9": State.UNKNOWN}
    assert (programs / "squeue.asked").read_text() == "x\n"


def test_nothing_of_a_surrounding_job_reaches_a_new_one(programs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inherited = ("SLURM_CPU_BIND", "SLURM_JOB_ID", "SBATCH_PARTITION", "SRUN_CPUS_PER_TASK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "PROTTRANS_NONCE")
    for name in inherited:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/site.conf")
    program(programs, "sbatch", 'env >"$0.env"; echo 12')
    assert submission.submit("slurm", RunDir(tmp_path)) == "12"
    names = {line.partition("=")[0] for line in (programs / "sbatch.env").read_text().splitlines()}
    assert names.isdisjoint(inherited)
    assert {"SLURM_CONF", "PATH"} <= names


def test_a_submission_without_an_answer_may_have_happened(programs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program(programs, "sbatch", "exec sleep 60")
    monkeypatch.setattr(submission, "TIMEOUT_S", 0.2)
    with pytest.raises(MaybeSubmittedError, match=r"did not answer within 0 s\. The job may be in the queue: look for my-run there before"):
        submission.submit("slurm", RunDir(tmp_path / "my-run"))


def test_ctrl_c_before_the_answer_leaves_a_job_perhaps(programs: Path, tmp_path: Path) -> None:
    program(programs, "sbatch", 'kill -INT "$PPID"; exec sleep 60')
    with pytest.raises(MaybeSubmittedError, match=r"interrupted before sbatch had answered\. The job may be in the queue: look for my-run there") as told:
        submission.submit("slurm", RunDir(tmp_path / "my-run"))
    assert told.value.exit_code == 130


def test_what_a_scheduler_says_is_shown_safely(programs: Path, tmp_path: Path) -> None:
    program(programs, "sbatch", "printf 'sbatch: error: \\033[2Jinvalid account\\n' >&2; exit 1")
    with pytest.raises(SubmitError) as refusal:
        submission.submit("slurm", RunDir(tmp_path))
    assert "\\x1b[2Jinvalid account" in str(refusal.value) and not isinstance(refusal.value, MaybeSubmittedError)


def test_a_machine_without_the_scheduler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SubmitError, match="there is no command 'sbatch' here"):
        submission.submit("slurm", RunDir(tmp_path))
