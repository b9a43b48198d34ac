"""Submitting the jobs of a chain: what is on the disk at every moment, and what a failure half way leaves and says."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from prottrans_hpc import run_dir
from prottrans_hpc.errors import SubmitError
from prottrans_hpc.launch import gang, job_events
from prottrans_hpc.launch.checks import CorpusFacts
from prottrans_hpc.launch.gang import Plan
from prottrans_hpc.machine import Allocation, Bin, Queue, read_machine
from prottrans_hpc.recipe import read_recipe
from prottrans_hpc.run_dir import RunDir

# Counts its calls; a file beside it says from which call on it fails.
SBATCH = """
number=$(( $(cat "$0.count" 2>/dev/null || echo 0) + 1 )); echo "$number" >"$0.count"
echo "$*" >>"$0.calls"
cat JOB_JSON >>"$0.seen" 2>/dev/null
if [ -e "$0.fails" ] && [ "$number" -ge "$(cat "$0.fails")" ]; then echo "sbatch: error: Job violates accounting policy" >&2; exit 1; fi
echo "$(( 100 + number ))"
"""

Submit = Callable[[int], None]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    programs = tmp_path / "bin"
    programs.mkdir()
    job_json = tmp_path / "run" / "job.json"
    for name, text in (("sbatch", SBATCH.replace("JOB_JSON", str(job_json))), ("squeue", 'cat "$0.says"')):
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    (programs / "squeue.says").touch()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return tmp_path


@pytest.fixture
def submit(folder: Path) -> Submit:
    def carry_out(num_jobs: int) -> None:
        base = read_machine("laptop")
        machine = replace(base, scheduler="slurm", starter="srun", queues=(Queue("batch", (Bin(1, 8, 60),)),))
        corpus = CorpusFacts(folder / "corpus", "a" * 64, 500, 50_000, 5)
        allocation = Allocation(2, 1, 1, 0, walltime_min=30)
        plan = Plan(read_recipe("tiny_prot_bert"), "tiny", corpus, machine, allocation, None, RunDir(folder / "run"), num_jobs=num_jobs)
        assert gang.carry_out(plan, detach=False) == 0

    return carry_out


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_each_job_waits_for_the_one_before_it(folder: Path, submit: Submit, capsys: pytest.CaptureFixture[str]) -> None:
    submit(3)
    script = str(folder / "run" / "job.sh")
    calls = lines(folder / "bin" / "sbatch.calls")
    assert [call.endswith(script) for call in calls] == [True] * 3
    assert ["afterany:101" in calls[1], "afterany:102" in calls[2], "after" in calls[0]] == [True, True, False]
    assert run_dir.read_jobs(RunDir(folder / "run")).job_ids == ("101", "102", "103")  # type: ignore[union-attr]
    told = [(event["event"], event["job_id"], event["number"], event["of"]) for event in job_events.read_events(RunDir(folder / "run"))]
    assert told == [("submitted", "101", 1, 3), ("submitted", "102", 2, 3), ("submitted", "103", 3, 3)]
    assert "job 101, then 102, then 103" in capsys.readouterr().err


def test_what_is_submitted_is_on_the_disk_before_the_next_is_tried(folder: Path, submit: Submit) -> None:
    submit(3)
    seen = (folder / "bin" / "sbatch.seen").read_text()
    assert seen.count('"101"') == 2 and seen.count('"102"') == 1 and '"103"' not in seen


def test_a_failure_half_way_names_the_jobs_that_stay(folder: Path, submit: Submit) -> None:
    (folder / "bin" / "sbatch.fails").write_text("3")
    with pytest.raises(SubmitError, match=r"accounting policy.*job 3 of a chain of 4; jobs 101, 102 before it will run.*prottrans runs cancel"):
        submit(4)
    assert run_dir.read_jobs(RunDir(folder / "run")).job_ids == ("101", "102")  # type: ignore[union-attr]
    assert (folder / "bin" / "sbatch.count").read_text() == "3\n", "it does not go on"


def test_a_failure_of_the_first_leaves_nothing(folder: Path, submit: Submit) -> None:
    (folder / "bin" / "sbatch.fails").write_text("1")
    with pytest.raises(SubmitError) as refusal:
        submit(4)
    assert "chain" not in str(refusal.value)
    assert run_dir.read_jobs(RunDir(folder / "run")) is None


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUE_HOLD", "NEVER_HEARD_OF"])
def test_a_run_whose_jobs_are_alive_is_not_submitted_again(folder: Path, submit: Submit, state: str) -> None:
    submit(2)
    (folder / "bin" / "squeue.says").write_text(f"101|FAILED\n102|{state}\n")
    with pytest.raises(SubmitError, match=r"is in use by job 102 \("):
        submit(1)
    assert (folder / "bin" / "sbatch.count").read_text() == "2\n"


def test_a_run_whose_jobs_are_gone_is(folder: Path, submit: Submit) -> None:
    submit(1)
    (folder / "bin" / "squeue.says").write_text("101|TIMEOUT\n")
    submit(1)
    assert run_dir.read_jobs(RunDir(folder / "run")).job_ids == ("102",)  # type: ignore[union-attr]


def test_a_job_that_only_the_lease_knows_counts_too(folder: Path, submit: Submit) -> None:
    submit(1)
    held = {"scheduler": "slurm", "cluster": "", "job_id": "77", "restart": 0, "host": "n1", "pid": 1, "nodes": ["n1"], "time": "now"}
    (folder / "run" / "job.lease.json").write_text(json.dumps(held))
    (folder / "bin" / "squeue.says").write_text("77|RUNNING\n")
    with pytest.raises(SubmitError, match=r"is in use by job 77 \(RUNNING\)"):
        submit(1)


def test_without_an_answer_nothing_is_submitted_again(folder: Path, submit: Submit) -> None:
    submit(1)
    (folder / "bin" / "squeue").write_text("#!/bin/bash\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2\nexit 1\n")
    with pytest.raises(SubmitError, match="Unable to contact"):
        submit(1)
    assert (folder / "bin" / "sbatch.count").read_text() == "1\n"
