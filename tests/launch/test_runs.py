"""`prottrans runs` on run directories of every kind, with a scheduler that answers from a file."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from prottrans_hpc import errors
from prottrans_hpc.launch import cli, job_events, local_process, run_state
from prottrans_hpc.run_dir import Jobs, RunDir, read_jobs, write_jobs

START = {"time": "2026-01-01T10:00:10.000Z", "event": "start", "step": 0, "world_size": 1}


@pytest.fixture
def listed(capsys: pytest.CaptureFixture[str]) -> Any:
    """The list as JSON, by name; and what was said beside it."""

    def call(*arguments: str) -> tuple[dict[str, dict[str, Any]], str]:
        capsys.readouterr()
        assert cli.main(["runs", "list", "--json", *arguments]) == 0
        told = capsys.readouterr()
        return {run["name"]: run for run in json.loads(told.out)}, told.err

    return call


def test_without_a_runs_folder_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["runs"]) == 0
    assert capsys.readouterr() == ("", "no runs in runs\n")
    assert cli.main(["runs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_the_list_is_aligned_sorted_by_activity_and_safe_to_show(runs_folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for age, name in ((3600 * 30, "old"), (90, "newer"), (5, "new\x1b[2J")):
        directory = runs_folder.make(name)
        runs_folder.train(directory, 20, saved=(20,))
        for path in [*directory.path.rglob("*"), directory.path]:
            moment = path.stat().st_mtime - age
            os.utime(path, (moment, moment))
    (runs_folder.folder / "notes.txt").touch()
    (runs_folder.folder / "something else").mkdir()
    assert cli.main(["runs"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["NAME", "RECIPE", "MACHINE", "STATE", "STEP", "LOSS", "NODES", "LAST", "ACTIVITY"]
    assert [line.split()[0] for line in lines] == ["new\\x1b[2J", "newer", "old"]
    assert lines[2].split()[1:] == ["tiny_prot_bert", "laptop", "new", "20/200", "2.9800", "1", "1", "d", "6", "h", "ago"]
    assert len({line.index("tiny_prot_bert") for line in lines}) == 1


def test_a_terminal_gets_a_table(runs_folder: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    runs_folder.make("[red]first")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert cli.main(["runs"]) == 0
    assert "[red]first" in capsys.readouterr().out, "a name is no markup"


def test_damaged_runs_are_listed_as_such(runs_folder: Any, listed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    whole = runs_folder.make("whole")
    for name, content in (("cut", whole.run_json.read_text()[:200]), ("strange", "[]"), ("other", '{"format": 99}')):
        runs_folder.make(name).run_json.write_text(content)
    runs_folder.make("no_run_json").run_json.rename(runs_folder.folder / "no_run_json" / "job.sh")
    runs_folder.make("bad_jobs").job_json.write_text('{"scheduler": "slurm"}')
    runs, _ = listed()
    assert {name: run["state"] for name, run in runs.items()} == dict.fromkeys(("cut", "strange", "other", "no_run_json", "bad_jobs"), "damaged") | {
        "whole": "new"
    }
    assert "run.json is damaged" in runs["cut"]["reason"] and "no run.json" in runs["no_run_json"]["reason"]
    assert cli.main(["runs"]) == 0
    told = capsys.readouterr()
    assert told.out.count("damaged") == 5 and "warning: cut is damaged" in told.err
    assert cli.main(["runs", "show", "cut"]) == errors.BAD_DATA


@pytest.mark.parametrize(
    ("code", "state", "reason"),
    [
        ("0\n", "done", ""),
        ("75\n", "stopped", "SIGUSR1"),
        ("76\n", "failed", "diverged"),
        ("137\n", "failed", "killed by SIGKILL"),
        ("", "killed", "without leaving an exit code"),
        (None, "killed", "without leaving an exit code"),
    ],
)
def test_a_local_run_that_ended(code: str | None, state: str, reason: str, runs_folder: Any, listed: Any) -> None:
    directory = runs_folder.make("run", job_ids=("4194304",))
    runs_folder.train(directory, 20, saved=(10,))
    runs_folder.happened(directory, START, {"time": "2026-01-01T10:01:00.000Z", "event": "stop", "step": 20, "cause": "SIGUSR1", "exit_code": 75})
    if code is not None:
        directory.exit_code.write_text(code)
    run = listed()[0]["run"]
    assert (run["state"], run["step"], run["saved_step"], run["last_step"]) == (state, 20, 10, 200)
    assert reason in run["reason"]


def test_the_last_checkpoint_says_that_the_work_is_done(runs_folder: Any, listed: Any) -> None:
    directory = runs_folder.make("run", job_ids=("4194304",), stop_after_step=20)
    runs_folder.train(directory, 20, saved=(20,))
    assert listed()[0]["run"]["state"] == "done"


def test_a_process_id_is_believed_only_of_the_job_itself(runs_folder: Any, listed: Any) -> None:
    """The id of a job that has ended may be another process's by now; one that holds the lock file is the job."""
    directory = runs_folder.make("run", job_ids=(str(os.getpid()),))
    assert listed()[0]["run"]["state"] == "killed"
    directory.lock.touch()
    with directory.lock.open():
        assert local_process.holds(directory, str(os.getpid()))
        assert listed()[0]["run"]["state"] == "running"
    assert listed()[0]["run"]["state"] == "killed"


def test_the_lock_tells_of_a_job_on_another_host(runs_folder: Any, listed: Any) -> None:
    directory = runs_folder.make("run", job_ids=("1",))
    write_jobs(directory, Jobs("local", ("1",), "elsewhere", "2026-01-01T00:00:00+00:00"))
    directory.lock.touch()
    run = listed()[0]["run"]
    assert (run["state"], run["reason"]) == ("unknown", "it was started on elsewhere: ask there")
    with directory.lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert listed()[0]["run"]["state"] == "running"
        assert cli.main(["runs", "cancel", "run"]) == errors.NO_RESOURCES, "it is out of reach"
    directory.exit_code.write_text("75\n")
    assert listed()[0]["run"]["state"] == "stopped"


STATES = [
    (("PENDING",), "queued"),
    (("RUNNING", "PENDING"), "running"),
    (("COMPLETED", "PENDING"), "queued"),
    (("COMPLETING",), "stopping"),
    (("SUSPENDED",), "suspended"),
    (("A_STATE_OF_TOMORROW",), "unknown"),
    (("PREEMPTED",), "killed"),
    (("CANCELLED",), "cancelled"),
    (("TIMEOUT",), "killed"),
    ((), "killed"),
]


@pytest.mark.parametrize(("states", "expected"), STATES, ids=lambda value: " ".join(value) if isinstance(value, tuple) else None)
def test_the_jobs_of_a_chain_say_what_a_batch_run_does(states: tuple[str, ...], expected: str, runs_folder: Any, fake_slurm: Any, listed: Any) -> None:
    runs_folder.make("run", machine="slurm_cluster", job_ids=("1", "2"))
    fake_slurm.says(**{f"j{number}": state for number, state in enumerate(states, 1)})
    assert listed()[0]["run"]["state"] == expected


def test_one_question_for_all_runs_and_no_answer_is_never_an_end(runs_folder: Any, fake_slurm: Any, listed: Any) -> None:
    for number in range(5):
        runs_folder.make(f"run{number}", machine="slurm_cluster", job_ids=(str(2 * number), str(2 * number + 1)))
    runs_folder.make("local", job_ids=("4194304",))
    fake_slurm.says(j0="RUNNING", j3="PENDING")
    runs, told = listed()
    assert [runs[f"run{number}"]["state"] for number in range(3)] == ["running", "queued", "killed"] and told == ""
    assert len(fake_slurm.calls) == 1 and all(str(number) in fake_slurm.calls[0] for number in range(10))
    fake_slurm.is_silent()
    runs, told = listed()
    assert {run["state"] for name, run in runs.items() if name != "local"} == {"unknown"} and runs["local"]["state"] == "killed"
    assert told.count("warning: ") == 1 and "Unable to contact slurm controller" in told
    assert len(fake_slurm.calls) == 2


def test_where_the_scheduler_is_not_installed_its_runs_are_unknown(runs_folder: Any, listed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs_folder.make("run", machine="slurm_cluster", job_ids=("1",))
    monkeypatch.setenv("PATH", "/nowhere")
    runs, told = listed()
    assert runs["run"]["state"] == "unknown" and "no command 'squeue'" in told


def test_a_run_is_found_by_name_path_or_not_at_all(runs_folder: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    directory = runs_folder.make("tiny-1a2b3c4d")
    for name in ("tiny-1a2b3c4d", str(directory.path), "runs/tiny-1a2b3c4d"):
        assert cli.main(["runs", "show", name, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["path"] == str(directory.path)
    assert cli.main(["runs", "show", "tiny-1a2b"]) == errors.USAGE
    assert "did you mean 'tiny-1a2b3c4d'?" in capsys.readouterr().err
    monkeypatch.chdir("/")
    for arguments in (["--runs", str(runs_folder.folder), "show", "tiny-1a2b3c4d"], ["show", "tiny-1a2b3c4d", "--runs", str(runs_folder.folder)]):
        assert cli.main(["runs", *arguments]) == 0


def test_show_tells_everything(runs_folder: Any, fake_slurm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    directory = runs_folder.make("run", machine="slurm_cluster", nodes=2, job_ids=("7", "8"))
    runs_folder.train(directory, 60, saved=(40, 50))
    directory.environment_json.write_text(json.dumps({"hosts": {"n1": 2, "n2": 2}}))
    runs_folder.happened(
        directory,
        {"time": "2026-01-01T10:00:00.000Z", "event": "begun", "job_id": "7", "restart": 0, "nodes": ["n1", "n2"]},
        {**START, "world_size": 4},
    )
    fake_slurm.says(j7="RUNNING", j8="PENDING")
    assert cli.main(["runs", "show", "run"]) == 0
    told = capsys.readouterr().out
    for words in (
        "state:            running: 1 more in the queue",
        "prot_bert tiny, 274,592 parameters (tiny_prot_bert)",
        "job 7 (running), job 8 (pending); slurm",
        "step 60 of 200, loss 2.9400",
        "2 checkpoints, the newest of step 50",
        "1,036 residues/s, 2 s a step (medians of the last 50 steps); 4 min left at this pace",
        "n1, n2",
        "0 to ...  at work",
    ):
        assert words in told, told
    assert cli.main(["runs", "--json", "show", "run"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["rates"] == {"of_last_steps": 50, "residues_per_s": 1035.5, "step_s": 2.0, "steps_left": 140, "time_left_s": 280.0}
    assert values["checkpoints"] == [40, 50] and values["history"]["starts"][0]["nodes"] == ["n1", "n2"]


def test_logs_are_escaped_and_named(runs_folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    directory = runs_folder.make("run", job_ids=("4194304",))
    directory.node_log(3).write_bytes(b"one\ntwo\x1b]0;title\x07\tx\r\n\xff\xe2\x80\xae three, unfinished")
    assert cli.main(["runs", "logs", "run", "--node", "3", "-n", "2"]) == 0
    assert capsys.readouterr().out == "two\\x1b]0;title\\x07   x\n\\xff\\u202e three, unfinished\n"
    assert cli.main(["runs", "logs", "run"]) == errors.NO_INPUT
    assert "there is no job.log" in capsys.readouterr().err
    directory.node_log(0).write_text("from rank 0\n")
    assert cli.main(["runs", "logs", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"log": str(directory.node_log(0)), "lines": ["from rank 0"]}
    assert cli.main(["runs", "logs", "run", "-n", "0"]) == 0
    assert capsys.readouterr().out == ""


def test_cancel_takes_the_waiting_jobs_first_and_is_recorded(runs_folder: Any, fake_slurm: Any, listed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    directory = runs_folder.make("run", machine="slurm_cluster", job_ids=("1", "2", "3", "4"))
    fake_slurm.says(j1="COMPLETED", j2="RUNNING", j3="PENDING", j4="PENDING")
    assert cli.main(["runs", "cancel", "run"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == ["job 4: taken out of the queue", "job 3: taken out of the queue", "job 2: asked to save and stop"]
    assert list(dict.fromkeys(call.split()[-1] for call in fake_slurm.calls if call.startswith("scancel"))) == ["4", "3", "2"]
    events = job_events.read_events(directory)
    assert [(event["event"], event["job_id"]) for event in events] == [("cancelled", "4"), ("cancelled", "3"), ("cancelled", "2")]
    fake_slurm.says(j2="COMPLETED")
    directory.exit_code.write_text("75\n")
    assert listed()[0]["run"]["state"] == "cancelled"
    assert cli.main(["runs", "cancel", "run"]) == 0
    assert capsys.readouterr().out == "nothing to cancel: no job of run runs or waits\n"
    assert cli.main(["runs", "cancel", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_cancel_says_that_it_cannot_know(runs_folder: Any, fake_slurm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    directory = runs_folder.make("run", machine="slurm_cluster", job_ids=("1",))
    assert cli.main(["runs", "cancel", "run"]) == errors.NO_RESOURCES
    assert "Unable to contact" in capsys.readouterr().err
    assert not directory.jobs_log.exists()


def test_resume_refuses_what_is_at_work_done_or_unknown(runs_folder: Any, fake_slurm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    directory = runs_folder.make("run", machine="slurm_cluster", job_ids=("1",), stop_after_step=50)
    for answer, words in (({"j1": "PENDING"}, "run is queued"), ({"j1": "RUNNING"}, "run is running"), (None, "run is unknown (slurm does not answer)")):
        fake_slurm.says(**answer) if answer else fake_slurm.is_silent()
        assert cli.main(["runs", "resume", "run"]) == errors.NO_RESOURCES
        assert words in capsys.readouterr().err
    fake_slurm.says()
    directory.checkpoint(50).mkdir(parents=True)
    assert cli.main(["runs", "resume", "run"]) == errors.USAGE
    assert "run is done: it has step 50 of 50; it can go on with --steps 200" in capsys.readouterr().err
    assert not [call for call in fake_slurm.calls if call.startswith("sbatch")]
    assert cli.main(["runs", "resume", "run", "--steps", "201"]) == errors.USAGE


def test_resume_submits_the_same_again(runs_folder: Any, fake_slurm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    directory = runs_folder.make("run", machine="slurm_cluster", nodes=3, job_ids=("1", "2"))
    fake_slurm.says(j1="TIMEOUT")
    assert cli.main(["runs", "resume", "run", "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --nodes=3" in script and "#SBATCH --account=proj" in script
    assert cli.main(["runs", "resume", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(directory.path), "scheduler": "slurm", "jobs": ["100", "101"]}
    assert directory.job_script.read_text() == script
    assert cli.main(["runs", "show", "run"]) == 0
    assert "command:      prottrans runs resume run --json\n" in capsys.readouterr().out
    jobs = read_jobs(directory)
    assert jobs is not None and (jobs.job_ids, jobs.account) == (("100", "101"), "proj")
    fake_slurm.says()
    assert cli.main(["runs", "resume", "run", "--nodes", "2", "--chain", "1", "--account", "other", "--walltime", "0:30"]) == 0
    script = directory.job_script.read_text()
    assert "#SBATCH --nodes=2" in script and "#SBATCH --account=other" in script and "#SBATCH --time=00:30:00" in script
    assert len((read_jobs(directory) or pytest.fail("no job.json")).job_ids) == 1


def test_resume_holds_on_to_the_corpus_of_the_run(runs_folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    runs_folder.make("run", job_ids=("4194304",))
    index = runs_folder.folder.parent / "corpus" / "index.json"
    index.write_text(index.read_text() + " ")
    assert cli.main(["runs", "resume", "run"]) == errors.IDENTITY
    index.unlink()
    assert cli.main(["runs", "resume", "run"]) == errors.NO_INPUT


def test_every_state_of_a_job_has_its_place() -> None:
    from prottrans_hpc.launch.follow import _WORDS
    from prottrans_hpc.launch.job_state import State

    assert set(_WORDS) == set(State)
    assert {state for state in State if state.is_alive} == set(run_state._ALIVE)


def test_a_run_directory_alone_is_enough(runs_folder: Any, tmp_path: Path) -> None:
    directory = runs_folder.make("run")
    assert RunDir(directory.path).run_json.exists()
    assert cli.main(["runs", "show", str(directory.path), "--runs", str(tmp_path / "nowhere")]) == 0


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_job_that_a_person_cancelled_is_not_requeued(cancelled: bool, runs_folder: Any, fake_slurm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from prottrans_hpc.launch import end

    directory = runs_folder.make("run", machine="slurm_cluster", job_ids=("1",))
    fake_slurm.says(j1="RUNNING")
    scontrol = fake_slurm.folder / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "scontrol $*" >> "{fake_slurm.folder}/calls"\necho "JobId=1 PreemptTime=2026-01-01T00:00:00 Requeue=1"\n')
    scontrol.chmod(0o755)
    runs_folder.happened(directory, {"time": "2026-01-01T10:00:00.000Z", "event": "begun", "job_id": "1", "restart": 0, "nodes": ["n1"], "step": 0})
    if cancelled:
        assert cli.main(["runs", "cancel", "run"]) == 0
    end.end("slurm", directory, errors.REQUEUE, {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n1"})
    assert any(call.startswith("scontrol requeue 1") for call in fake_slurm.calls) is not cancelled
    assert job_events.read_events(directory)[-1]["event"] == ("ended" if cancelled else "requeued")
