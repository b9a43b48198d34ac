"""A batch job before and after its ranks, as real processes on real files; the scheduler's commands are small programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from prottrans_hpc import durable, run_dir
from prottrans_hpc.launch import begin, job_events, lease, planner
from prottrans_hpc.machine import read_machine
from prottrans_hpc.recipe import read_recipe
from prottrans_hpc.run_dir import Jobs, Run, RunDir

REPOSITORY = Path(__file__).resolve().parents[2]
FAKES = {
    # Each prints what a file beside it says, to standard error and with a failure where the file's first line is an exit code.
    "squeue": 'read -r code <"$0.code"; cat "$0.out"; cat "$0.err" >&2; exit "$code"',
    "scontrol": 'echo "scontrol $*" >>"$(dirname "$0")/calls"; case "$1" in show) cat "$0.out" ;; esac',
    "sinfo": 'cat "$0.out"',
    "scancel": 'echo "scancel $*" >>"$(dirname "$0")/calls"',
}


@dataclass
class Job:
    """A run directory, a fake Slurm, and a job in it."""

    folder: Path
    run_dir: RunDir

    def call(self, module: str, *arguments: str, job_id: str = "10", restart: int = 0, code: int = 0, cluster: str = "lab") -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
        environment |= {"SLURM_JOB_ID": job_id, "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CLUSTER_NAME": cluster}
        environment |= {"SLURM_RESTART_COUNT": str(restart)} if restart else {}
        argv = [sys.executable, "-P", "-m", f"prottrans_hpc.launch.{module}", "slurm", str(self.run_dir.path), *arguments]
        done = subprocess.run(argv, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == code, done.stderr
        return done

    def begin(self, says: str = "go", **options: Any) -> str:
        done = self.call("begin", **options)
        assert done.stdout.strip() == says, done.stderr
        return done.stderr

    def end(self, code: int, **options: Any) -> str:
        return self.call("end", str(code), code=code, **options).stderr

    def slurm_says(self, program: str, output: str, *, code: int = 0, error: str = "") -> None:
        for suffix, text in (("out", output), ("err", error), ("code", f"{code}\n")):
            (self.folder / "bin" / f"{program}.{suffix}").write_text(text)

    @property
    def calls(self) -> list[str]:
        path = self.folder / "bin" / "calls"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def cancelled(self) -> list[str]:
        """Job ids in the order in which they were cancelled."""
        return list(dict.fromkeys(call.split()[-1] for call in self.calls if call.startswith("scancel")))

    def events(self) -> list[dict[str, Any]]:
        return job_events.read_events(self.run_dir)

    def chain(self, *job_ids: str) -> None:
        run_dir.write_jobs(self.run_dir, Jobs("slurm", job_ids, "login", "2026-01-01T00:00:00+00:00"))

    def save(self, step: int) -> None:
        """A checkpoint, as far as the login node's side looks."""
        folder = self.run_dir.checkpoint(step)
        folder.mkdir()
        (folder / "state.json").write_text("{}")
        durable.seal_folder(folder)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in FAKES.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    recipe, machine = read_recipe("tiny_prot_bert"), read_machine("laptop")
    directory = run_dir.prepare(tmp_path / "run dir")
    allocation = planner.plan(recipe, machine, num_nodes=2)
    run_dir.write_run(directory, Run("id", "now", "0", recipe, "tiny", "/corpus", "0" * 64, machine, allocation, 20))
    job = Job(tmp_path, directory)
    job.slurm_says("squeue", "", code=1, error="slurm_load_jobs error: Invalid job id specified\n")
    job.slurm_says("scontrol", "JobId=10 JobState=RUNNING Requeue=1 PreemptTime=None\n")
    job.slurm_says("sinfo", "n1|idle\nn2|idle\n")
    return job


def test_a_job_begins_and_ends(job: Job) -> None:
    job.begin()
    held = lease.read_lease(job.run_dir)
    assert held is not None and (held.job_id, held.restart, held.cluster, held.nodes) == ("10", 0, "lab", ("n1", "n2"))
    job.save(5)
    job.end(75)
    assert not job.run_dir.lease.exists()
    begun, ended = job.events()
    assert (begun["event"], begun["step"], begun["nodes"]) == ("begun", 0, ["n1", "n2"])
    assert (ended["event"], ended["code"], ended["step"], ended["num_nodes"]) == ("ended", 75, 5, 2) and ended["elapsed_s"] >= 0
    assert job.calls == ["scontrol show job --oneliner 10"]


@pytest.mark.parametrize(
    ("answer", "code", "error", "says"),
    [
        ("9|RUNNING\n", 0, "", "two jobs must never train"),
        ("9|SUSPENDED\n", 0, "", "two jobs must never train"),
        ("9|SOMETHING_NEW\n", 0, "", "which is UNKNOWN"),
        ("", 1, "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n", "cannot be known"),
        ("", 1, "", "cannot be known"),
        ("", 127, "", "cannot be known"),
    ],
)
def test_the_lease_of_another_job_stands_unless_the_scheduler_says_that_it_is_gone(job: Job, answer: str, code: int, error: str, says: str) -> None:
    job.begin(job_id="9")
    before = job.run_dir.lease.read_bytes()
    job.slurm_says("squeue", answer, code=code, error=error)
    assert says in job.begin("refused", job_id="10", code=71)
    assert job.run_dir.lease.read_bytes() == before
    assert [event["event"] for event in job.events()] == ["begun", "refused"]


@pytest.mark.parametrize(
    ("answer", "code", "ended"),
    [("9|PREEMPTED\n", 0, "PREEMPTED"), ("9|TIMEOUT\n", 0, "TIMEOUT"), ("9|NODE_FAIL\n", 0, "NODE_LOST"), ("", 1, "killed"), ("", 0, "killed")],
)
def test_the_lease_of_a_job_that_is_gone_is_taken_over_with_a_note(job: Job, answer: str, code: int, ended: str) -> None:
    job.begin(job_id="9")
    job.slurm_says("squeue", answer, code=code, error="slurm_load_jobs error: Invalid job id specified\n" if code else "")
    assert "took the run directory over from job 9" in job.begin(job_id="10")
    note = job.events()[1]
    assert (note["event"], note["job_id"], note["from_job_id"], note["ended"]) == ("taken_over", "10", "9", ended)
    assert lease.read_lease(job.run_dir).job_id == "10"  # type: ignore[union-attr]


def test_a_requeued_job_takes_its_own_lease_over_and_names_the_node_that_it_lost(job: Job) -> None:
    job.begin()
    job.slurm_says("sinfo", "n1|idle\nn2|down*\n")
    assert "lost node n2" in job.begin(restart=1)
    note = job.events()[1]
    assert (note["ended"], note["lost_nodes"], note["from_restart"], note["restart"]) == ("NODE_LOST", ["n2"], 0, 1)


@pytest.mark.parametrize(("held", "late"), [(0, 0), (2, 1)])
def test_a_job_starts_once_only(job: Job, held: int, late: int) -> None:
    job.begin(restart=held)
    assert "starts once only" in job.begin("refused", restart=late, code=71)


def test_another_cluster_cannot_tell(job: Job) -> None:
    job.begin(job_id="9", cluster="other")
    assert "cannot say whether it is gone" in job.begin("refused", job_id="10", code=71)


def test_a_damaged_lease_is_nobodys_to_take(job: Job) -> None:
    job.run_dir.lease.write_text('{"job_id": "9"')
    assert "is damaged" in job.begin("refused", code=71)


def test_of_many_jobs_at_once_one_begins(job: Job) -> None:
    job.slurm_says("squeue", "".join(f"{number}|RUNNING\n" for number in range(20, 28)))
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", "-m", "prottrans_hpc.launch.begin", "slurm", str(job.run_dir.path)],
            env={"PATH": f"{job.folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY), "SLURM_JOB_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for number in range(20, 28)
    ]
    said = sorted(process.communicate(timeout=120)[0].strip() for process in processes)
    assert said == ["go"] + ["refused"] * 7


@pytest.mark.parametrize(
    ("before", "answer", "after"),
    [(None, "", ("10",)), (("8",), "8|COMPLETED\n", ("10",)), (("8", "11"), "11|PENDING\n", ("10", "11")), (("9", "10"), "", ("9", "10"))],
)
def test_a_job_that_no_submission_wrote_down_writes_itself_down(job: Job, before: tuple[str, ...] | None, answer: str, after: tuple[str, ...]) -> None:
    if before is not None:
        job.chain(*before)
    job.slurm_says("squeue", answer)
    job.begin()
    jobs = run_dir.read_jobs(job.run_dir)
    assert jobs is not None and (jobs.scheduler, jobs.job_ids) == ("slurm", after)
    assert jobs.host == ("login" if before else os.uname().nodename)


def test_a_full_disk_keeps_no_job_from_its_work(job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(run_dir: RunDir, jobs: Jobs) -> None:
        raise OSError(28, os.strerror(28), str(run_dir.job_json))

    monkeypatch.setattr(run_dir, "write_jobs", refuse)
    assert begin.begin("slurm", job.run_dir, {"SLURM_JOB_ID": "10", "SLURM_JOB_NODELIST": "n1"}) == begin.GO
    assert "job.json does not name this job" in capsys.readouterr().err


def test_a_finished_run_starts_nothing_and_its_chain_is_over(job: Job) -> None:
    job.save(20)
    job.chain("10", "11", "12")
    job.slurm_says("squeue", "10|RUNNING\n11|PENDING\n12|PENDING\n")
    assert "step 20 of 20 was reached before" in job.begin("finished")
    assert job.cancelled == ["12", "11"], "the last first: the end of a job starts the one after it"
    ended, cut = job.events()
    assert (ended["event"], ended["code"], cut["cancelled"], cut["reason"]) == ("ended", 0, ["11", "12"], "the work is done")
    assert not job.run_dir.lease.exists()


def test_a_last_checkpoint_that_lacks_a_file_is_not_the_end(job: Job) -> None:
    job.save(20)
    (job.run_dir.checkpoint(20) / "state.json").unlink()
    job.begin("go")


@pytest.mark.parametrize("code", [64, 65, 66, 70, 76, 77, 78])
def test_a_failure_beyond_cure_cancels_the_rest(job: Job, code: int) -> None:
    job.chain("9", "10", "11")
    job.slurm_says("squeue", "11|PENDING\n")
    job.begin()
    assert f"exit code {code}" in job.end(code)
    assert job.cancelled == ["11"]
    assert job.events()[-1]["event"] == "cancelled_rest"


@pytest.mark.parametrize("code", [71, 74, 137])
def test_any_other_failure_leaves_the_rest_until_it_comes_again_at_the_same_step(job: Job, code: int) -> None:
    job.chain("10", "11", "12")
    job.slurm_says("squeue", "", code=0)
    job.begin()
    job.end(code)
    job.slurm_says("squeue", "11|RUNNING\n12|PENDING\n")
    job.begin(job_id="11")
    assert job.calls == []
    job.end(code, job_id="11")
    assert job.cancelled == ["12"]
    assert "without a checkpoint after step 0" in job.events()[-1]["reason"]


def test_where_nothing_could_be_cancelled_the_next_job_finds_out_itself(job: Job) -> None:
    job.chain("10", "11")
    job.begin()
    (job.folder / "bin" / "scancel").write_text("#!/bin/bash\necho down >&2; exit 1\n")
    job.slurm_says("squeue", "", code=1, error="slurm_load_jobs error: Unable to contact slurm controller\n")
    assert "none could be" in job.end(76)
    assert "job 10 of this chain ended for good" in job.call("begin", job_id="11", code=71).stderr
    assert [event["event"] for event in job.events()] == ["begun", "ended", "cancelled_rest", "ended"]


def test_only_a_job_in_its_grace_period_asks_for_a_requeue(job: Job) -> None:
    job.begin()
    job.slurm_says("scontrol", "JobId=10 JobState=RUNNING Requeue=1 PreemptTime=2026-11-21T15:25:47\n")
    job.end(75)
    assert job.calls == ["scontrol show job --oneliner 10", "scontrol requeue 10"]
    assert job.events()[-1]["event"] == "requeued"
    job.begin(restart=1)
    job.end(137, restart=1)
    assert len(job.calls) == 2, "after a failure it would not help"


def test_the_cause_is_what_the_ranks_said_of_this_start(job: Job) -> None:
    (job.run_dir.path / "history.jsonl").write_text('{"time": "2000-01-01T00:00:00.000Z", "event": "stop", "cause": "old"}\n')
    job.run_dir.job_log.write_text("srun: error: n9: task 3: Killed\n")  # of an earlier start
    job.begin()
    with job.run_dir.job_log.open("a") as log:
        log.write("srun: error: n1: task 0: Exited with exit code 75\nsrun: error: n2: task 1: Killed\n")
    job.slurm_says("sinfo", "n1|idle\nn2|down*\n")
    job.end(137)
    assert job.events()[-1]["cause"] == "killed by SIGKILL; n2: task 1: Killed; node n2 is down"
    job.begin(restart=1)
    (job.run_dir.path / "history.jsonl").write_text(json.dumps({"time": "2999-01-01T00:00:00.000Z", "event": "stop", "cause": "SIGUSR1\x1b"}) + "\n")
    job.end(75, restart=1)
    assert job.events()[-1]["cause"] == "SIGUSR1\\x1b"


def test_a_job_that_is_no_longer_the_holder_leaves_the_lease_alone(job: Job) -> None:
    job.begin()
    job.begin(restart=1)
    job.end(75)  # of the first start, late
    assert lease.read_lease(job.run_dir).restart == 1  # type: ignore[union-attr]


def test_the_end_is_told_even_if_nothing_can_be_written(job: Job) -> None:
    job.begin()
    job.run_dir.run_json.write_text("{")
    assert "is not settled" in job.end(75)
    assert not job.run_dir.lease.exists()


def test_half_a_line_in_the_events_harms_no_other(job: Job) -> None:
    job.begin()
    with job.run_dir.jobs_log.open("a") as file:
        file.write('{"time": "2026')
    job.end(75)
    assert [event["event"] for event in job.events()] == ["begun", "ended"]


@pytest.mark.parametrize("module", ["begin", "end"])
def test_they_load_no_more_than_they_need(module: str) -> None:
    program = f"import sys; import prottrans_hpc.launch.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, check=True)
    assert {"torch", "numpy", "click", "rich", "submitit"}.isdisjoint(done.stdout.split())


def test_signals_do_not_end_it_half_way(job: Job, tmp_path: Path) -> None:
    (job.folder / "bin" / "squeue").write_text('#!/bin/bash\nkill -TERM "$PPID"; kill -USR1 "$PPID"; sleep 0.2; echo "9|TIMEOUT"\n')
    job.begin(job_id="9")
    job.begin(job_id="10")
