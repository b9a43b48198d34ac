"""How schedulers are asked for, and told to end, the jobs of a farm: real processes in the place of their commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from prottrans_hpc.launch import farm_jobs
from prottrans_hpc.launch.farm_executors import JobShape
from prottrans_hpc.launch.farm_jobs import BatchJobs, open_jobs
from prottrans_hpc.machine import read_machine

PROGRAMS = ("sbatch", "srun", "squeue", "scancel", "bsub", "bkill", "bjobs")


@pytest.fixture
def commands(tmp_path, monkeypatch) -> Path:
    """Commands that write down what they are told, and succeed."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in PROGRAMS:
        program(folder, name, "")
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def program(folder: Path, name: str, action: str) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    path.write_text(f'#!/bin/bash\necho "$0 $*" >>{folder}/calls\nenv >{folder}/environment\n{action}\n')
    path.chmod(0o755)


def calls(folder: Path) -> list[list[str]]:
    return [line.split()[1:] for line in (folder / "calls").read_text().splitlines()]


def open_on(machine: str, tmp_path: Path) -> BatchJobs:
    shape = JobShape(read_machine(machine), "name", tmp_path / "submitit", "/usr/bin/python3", 4, 60, None, None)
    jobs = open_jobs(shape)
    assert isinstance(jobs, BatchJobs)
    return jobs


@pytest.mark.parametrize("machine", ["slurm_cluster", "rhea", "summit"])
def test_a_hundred_thousand_jobs_are_cancelled_by_their_arrays(commands, tmp_path, machine):
    jobs = open_on(machine, tmp_path)
    ids = [f"{1 + index // 1000}_{index % 1000}" for index in range(100_000)]
    assert jobs.cancel(ids) is None
    assert sorted(calls(commands)[0], key=int) == [str(number) for number in range(1, 101)]


def test_very_many_arrays_go_in_slices(commands, tmp_path):
    jobs = open_on("slurm_cluster", tmp_path)
    ids = [f"{number}_0" for number in range(1, 2001)]
    assert jobs.cancel(ids) is None
    assert [len(words) for words in calls(commands)] == [500] * 4
    program(commands, "squeue", 'for word; do case $word in --jobs=*) tr , "\\n" <<<"${word#--jobs=}" | sed "s/$/_0|RUNNING/" ;; esac; done')
    assert jobs.alive(ids) == dict.fromkeys(ids, True)


@pytest.mark.parametrize(
    ("machine", "action", "complaint"),
    [
        ("slurm_cluster", "echo 'scancel: error: Kill job error on job id 7: Invalid job id specified' >&2; exit 1", None),
        ("slurm_cluster", "echo 'scancel: error: Kill job error on job id 7: Job/step already completing or completed' >&2; exit 1", None),
        ("slurm_cluster", "echo 'scancel: error: Kill job error on job id 7: Access/permission denied' >&2; exit 1", "scancel says: .*permission denied"),
        ("slurm_cluster", "sleep 600", "scancel does not answer"),
        ("summit", "echo 'Job <7[1]>: Job has already finished' >&2; exit 255", None),
        ("summit", "echo 'LSF is down. Please wait ...' >&2; exit 255", "bkill says: LSF is down"),
    ],
)
def test_why_jobs_could_not_be_cancelled(commands, tmp_path, monkeypatch, machine, action, complaint):
    monkeypatch.setattr(farm_jobs, "_TIMEOUT_S", 1 if "sleep" in action else 60)
    program(commands, "scancel" if machine == "slurm_cluster" else "bkill", action)
    said = open_on(machine, tmp_path).cancel(["7_1"])
    if complaint is None:
        assert said is None
    else:
        assert said is not None
        assert re.search(complaint, said)


def test_a_command_that_is_gone_does_not_end_the_farm(commands, tmp_path, monkeypatch):
    jobs = open_on("slurm_cluster", tmp_path)
    monkeypatch.setenv("PATH", str(commands))
    (commands / "scancel").unlink()
    (commands / "squeue").chmod(0o644)
    assert jobs.cancel(["7_1"]) == "scancel does not answer"
    assert jobs.alive(["7_1"]) is None


def test_queries_do_not_heed_what_a_person_has_set_for_themselves(commands, tmp_path, monkeypatch):
    for name in ("SLURM_CLUSTERS", "SQUEUE_STATES", "SQUEUE_FORMAT", "SCANCEL_INTERACTIVE"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    open_on("slurm_cluster", tmp_path).alive(["7_1"])
    names = {line.partition("=")[0] for line in (commands / "environment").read_text().splitlines()}
    assert {name for name in names if name.startswith(("SLURM_", "SQUEUE_", "SCANCEL_"))} == {"SLURM_CONF"}
