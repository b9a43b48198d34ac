"""The preflight of a training from the login side: the job script, the verdict, the history, and measurements that hang or die, by small real ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from prottrans_hpc import __version__, durable, errors
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.launch import cli, end, exclusion, job_script, planner, preflight, preflight_notes, submission
from prottrans_hpc.launch.demand import Demand
from prottrans_hpc.launch.job import Job as GangJob
from prottrans_hpc.launch.own_job import Start
from prottrans_hpc.launch.preflight import Ending
from prottrans_hpc.launch.schedulers import SCHEDULERS
from prottrans_hpc.machine import read_machine
from prottrans_hpc.recipe import read_recipe
from prottrans_hpc.run_dir import Preflight, RunDir, read_run

if TYPE_CHECKING:
    from .conftest import FakeSlurm, Job, RunsFolder

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SLOW = {
    "node": 2,
    "host": "n3.site.org",
    "what": "link",
    "seconds": 0.4,
    "median_s": 0.02,
    "factor": 20.0,
    "says": "node 2 (n3), its link to other nodes: 0.4 s",
}
FIT = {"backend": "gloo", "collective": "all_reduce", "scope": "world", "latency_s": 0.00021, "bytes_per_s": 1.2e9, "r2": 0.99}
GOOD = {"backend": "gloo", "nodes": 4, "ranks": 8, "fits": [FIT], "slow_nodes": [], "hosts": ["n1", "n2", "n3.site.org", "n4"]}
SETTINGS = Preflight(gate=3.0, limit_s=60)


def script(machine: str, *, nodes: int, starter: str | None = None, preflight: bool = True) -> str:
    profile = read_machine(machine)
    profile = replace(profile, node=replace(profile.node, num_cpu_cores=profile.node.num_cpu_cores or 8), starter=starter or profile.starter)
    allocation = planner.plan(read_recipe("tiny_prot_bert"), profile, Demand(num_nodes=nodes, partial_rack=True))
    account = "ABC123" if profile.account_required else None
    job = GangJob("pretrain", "first", RunDir(Path("/data/my runs/first")), profile, allocation, "/venv/bin/python", account=account, preflight=preflight)
    return job_script.render(job, SCHEDULERS[profile.scheduler].render_header(job)).decode()


@pytest.mark.parametrize(
    ("machine", "starter"), [("laptop", "processes"), ("laptop", "mpirun"), ("laptop", "torchrun"), ("slurm_cluster", "srun"), ("summit", "jsrun")]
)
def test_the_script_has_more_lines_in_one_place_and_is_good_shell(machine: str, starter: str, tmp_path: Path) -> None:
    with_it, without = (script(machine, nodes=2, starter=starter, preflight=wanted) for wanted in (True, False))
    first = with_it.index("# The network between this job's own nodes")
    assert with_it[:first] == without[:first]
    assert with_it.endswith(without[first:])
    more = with_it[first : len(with_it) - len(without[first:])]
    call, marker, ranks = more.partition(" -- ")
    assert "prottrans_hpc.launch.preflight" in call and marker
    assert 'prottrans_hpc preflight "$run_dir" &' in ranks.replace(" \\\n   ", "")
    path = tmp_path / "job.sh"
    path.write_text(with_it)
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", str(path)], stdout=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("machine", ["laptop", "slurm_cluster", "summit"])
def test_the_lines_are_as_they_were_reviewed(machine: str) -> None:
    """After a change on purpose: `UPDATE_GOLDEN=1 pytest tests/launch/test_preflight.py`, and review the diff."""
    path = GOLDEN / f"{machine}-preflight.sh"
    text = script(machine, nodes=2).replace(__version__, "VERSION")
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def test_one_rank_measures_nothing_and_says_so(small_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = script("laptop", nodes=1)
    assert "launch.preflight" not in text
    assert "one rank has nobody to talk to" in text
    assert cli.main(["pretrain", "tiny_prot_bert", "--corpus", str(small_corpus), "--run-dir", str(tmp_path / "run"), "--preflight", "comm", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "the preflight has nothing to measure" in shown.err
    assert "launch.preflight" not in shown.out


@pytest.mark.parametrize(
    ("ending", "measured", "told", "verdict", "code", "reason"),
    [
        (Ending(0), GOOD, "", "passed", 0, "no node takes more than 3 times the median"),
        (Ending(0), {**GOOD, "slow_nodes": [SLOW]}, "", "slow", 71, r"slow: node 2 \(n3\), its link to other nodes: 0.4 s. The gate is 3"),
        (Ending(0), None, "", "failed", 71, "left no figures"),
        (Ending(None), None, "", "failed", 71, "did not end within 60 s"),
        (Ending(None, "SIGTERM"), None, "", "stopped", 75, "stopped by SIGTERM"),
        (Ending(75), None, "rank 0 lost rank 3 on n4", "failed", 71, "rank 0 lost rank 3 on n4"),
        (Ending(137), GOOD, "", "failed", 71, "137: killed by SIGKILL"),
        (Ending(64), None, "horovod is not to be had", "failed", 64, "horovod is not to be had"),
        (Ending(70), None, "", "failed", 70, "please report it"),
    ],
)
def test_the_verdict(ending: Ending, measured: Any, told: str, verdict: str, code: int, reason: str) -> None:
    found = preflight.judge(ending, measured, told, SETTINGS)
    assert (found.verdict, found.code) == (verdict, code)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found.reason)


def note(directory: RunDir, measured: dict[str, Any], ending: Ending) -> preflight_notes.Finding:
    finding = preflight.judge(ending, measured, "", SETTINGS)
    preflight_notes.write(directory, finding, measured, elapsed_s=6.04)
    return finding


def test_a_slow_node_is_proposed_for_exclusion_and_told_everywhere(runs_folder: RunsFolder, fake_slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    directory = runs_folder.make("run", machine="slurm_cluster", nodes=2, job_ids=("7",))
    finding = note(directory, {**GOOD, "slow_nodes": [SLOW]}, Ending(0))
    assert exclusion.slow_nodes(directory) == ["n3"]
    assert f"prottrans runs resume {directory.path} --exclude n3" in preflight_notes.line(directory, finding, scheduler="slurm")
    directory.exit_code.write_text("71\n")
    fake_slurm.says()
    assert cli.main(["runs", "show", "run"]) == 0
    shown = capsys.readouterr().out
    assert "state:        failed: exit code 71: preflight: slow: node 2 (n3), its link" in shown
    assert "\npreflight:    slow, " in shown
    assert "step 0: slow: node 2 (n3), its link to other nodes: 0.4 s\n" in shown
    assert cli.main(["runs", "show", "run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["preflight"]["slow_nodes"] == [SLOW]
    assert told["history"]["starts"][-1]["exit_code"] == 71
    assert told["history"]["starts"][-1]["trains_from"] is None

    note(directory, GOOD, Ending(0))  # the node passes, and is no longer proposed
    assert exclusion.slow_nodes(directory) == []
    assert cli.main(["runs", "show", "run"]) == 0
    shown = capsys.readouterr().out
    assert "passed, " in shown and "gloo between 8 ranks on 4 nodes: 210 us, 1.2 GB/s (all-reduce)" in shown
    assert "node 2 (n3.site.org) is no longer slow\n" in shown


def test_the_end_of_a_job_adds_what_the_starter_said_to_a_preflight_that_failed(runs_folder: RunsFolder) -> None:
    directory = runs_folder.make("run", machine="slurm_cluster", nodes=2)
    begun = {"time": "2026-01-01T00:00:00.000Z", "log_bytes": 0}
    directory.job_log.parent.mkdir(exist_ok=True)
    directory.job_log.write_text("srun: error: n2: task 1: Killed\n")
    start = Start("lsf", "", "7", 0, "n1", 1, ("n1", "n2"))
    for ending, expected in ((Ending(75), "preflight failed: .*; n2: task 1: Killed"), (Ending(0), "preflight: slow: [^;]*")):
        finding = preflight.judge(ending, {**GOOD, "slow_nodes": [SLOW]}, "", SETTINGS)
        preflight_notes.write(directory, finding, {}, elapsed_s=1.0)
        assert re.fullmatch(expected, end._cause(directory, start, finding.code, begun))


def test_what_the_trainer_found_slow_is_not_cleared_by_a_preflight(tmp_path: Path, runs_folder: RunsFolder) -> None:
    directory = runs_folder.make("run", machine="slurm_cluster", nodes=2)
    directory.history.write_text(json.dumps({"event": "slow node", "step": 60, "node": 1, "host": "n2", "ranks": [7], "factor": 1.6}))  # no line end: a kill
    note(directory, GOOD, Ending(0))
    assert exclusion.slow_nodes(directory) == ["n2"]
    assert len(directory.history.read_text().splitlines()) == 2


def test_the_choice_lives_on_with_the_run(runs_folder: RunsFolder, fake_slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    directory = runs_folder.make("run", machine="slurm_cluster", nodes=2, job_ids=("1",))
    fake_slurm.says()
    assert read_run(directory).preflight is None
    assert cli.main(["runs", "resume", "run", "--preflight", "comm:4:90"]) == 0
    assert "the gate is 4" in capsys.readouterr().err
    assert read_run(directory).preflight == Preflight(4.0, 90)
    for more, expected in (((), True), (("--preflight", "comm"), True), (("--preflight", "none"), False)):
        assert cli.main(["runs", "resume", "run", "--dry-run", *more]) == 0
        assert ("launch.preflight" in capsys.readouterr().out) == expected
    durable.write_json(directory.preflight_json, {"verdict": "slow", "exit_code": 71})
    assert cli.main(["runs", "resume", "run", "--preflight", "none"]) == 0
    assert read_run(directory).preflight is None
    assert not directory.preflight_json.exists(), "what an earlier start found is none of the next one's"


@pytest.mark.parametrize("given", ["com", "comm:", "comm:1", "comm:0.5:60", "comm:3:0", "comm:3:60:1", "comm:-3", "3"])
def test_what_is_no_preflight_is_refused(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", "tiny_prot_bert", "--corpus", "nowhere", "--preflight", given]) == errors.USAGE
    assert "--preflight" in capsys.readouterr().err


def test_waiting_jobs_of_a_chain_are_kept_away_where_the_scheduler_can(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SCHEDULERS["slurm"].exclude_argv is not None
    assert SCHEDULERS["slurm"].exclude_argv("12", ("n1", "n2", "n7")) == ["scontrol", "update", "JobId=12", "ExcNodeList=n[1-2],n7"]
    assert submission.exclude("lsf", "12", ("n1",), timeout_s=1) is False


# --- with small real ranks


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, stderr = process.communicate(timeout=180)
    return process.returncode, stderr


def kept(job: Job) -> dict[str, Any]:
    return dict(durable.read_json(job.run_dir / "preflight.json"))


def stages(job: Job) -> list[str]:
    """What the ranks that were started last were to do."""
    return [job.rank(rank)["argv"][4] for rank in range(2)]


def test_one_that_hangs_is_ended_and_the_gate_stays_closed(job: Job) -> None:
    job.behave({0: {"deaf": 1}, 1: {"deaf": 1}})  # they measure for ever, and do not end when they are asked
    code, stderr = finish(job.start("--nodes", "2", "--preflight", "comm:3:2"))
    assert code == errors.NO_RESOURCES, stderr
    assert stages(job) == ["preflight", "preflight"]
    job.wait_gone([job.pid(0), job.pid(1)])
    assert "preflight failed: it did not end within 2 s. The gate stays closed: no rank of the training was started" in stderr
    assert kept(job)["verdict"] == "failed"
    assert job.exit_code() == "71\n"


@pytest.mark.parametrize(
    ("starter", "order", "code", "reason"),
    [
        ("processes", {"kill": 9}, 71, "killed by SIGKILL"),
        ("processes", {"code": 0}, 71, "left no figures"),
        ("torchrun", {"code": 65}, 65, "damaged"),
    ],
)
def test_one_that_dies_is_told_apart_from_a_slow_network(job: Job, starter: str, order: dict[str, int], code: int, reason: str) -> None:
    machine = job.folder / "machine.toml"
    machine.write_text(
        f'name = "here"\ndescription = "here"\nscheduler = "local"\nstarter = "{starter}"\nranks_per_node = 2\nmax_nodes = 4\n[node]\nnum_cpu_cores = 0\n'
    )
    job.behave({0: order, 1: {"code": 0} if order == {"code": 0} else {}})
    ended, stderr = finish(job.start("--machine", str(machine), "--nodes", "1", "--preflight", "comm:3:90"))
    assert ended == code, stderr
    assert kept(job)["verdict"] == "failed"
    assert reason in kept(job)["reason"]
    assert "slow" not in kept(job)["reason"]
    assert job.rank(0)["argv"][4] == "preflight"
    assert [path.name for path in job.run_dir.glob(".exit-code-*")] == []


def test_a_stop_meanwhile_ends_the_job_with_75(job: Job) -> None:
    process = job.start("--nodes", "2", "--preflight", "comm")
    assert stages(job) == ["preflight", "preflight"]
    process.send_signal(signal.SIGTERM)
    code, stderr = finish(process)
    assert code == errors.REQUEUE, stderr
    assert kept(job)["verdict"] == "stopped"
    (stop,) = [json.loads(text) for text in (job.run_dir / "history.jsonl").read_text().splitlines() if '"stop"' in text]
    assert stop["cause"] == "preflight: stopped by SIGTERM before anything was measured"


def test_ranks_of_a_preflight_meet_none_of_the_training(runs_folder: RunsFolder) -> None:
    directory = runs_folder.make("run", nodes=2)
    names = ("PROTTRANS_NONCE", "PROTTRANS_EXIT_CODE_FILE")
    ranks = [sys.executable, "-c", f"import os; print(*map(os.environ.get, {names}))"]
    argv = [sys.executable, "-P", "-m", "prottrans_hpc.launch.preflight", "local", str(directory.path), "--quiet", "--", *ranks]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), names[0]: "ours", names[1]: "our-code"}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == errors.NO_RESOURCES, done.stderr
    assert "left no figures. The gate stays closed" in done.stderr
    nonce, code_file = done.stdout.split(maxsplit=1)
    assert nonce != "ours"
    assert code_file.strip() == str(directory.path / f".exit-code-{nonce}")


def test_a_run_that_cannot_be_read_is_no_reason_to_train(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        (tmp_path / "run.json").write_text("{}")
        preflight.check(RunDir(tmp_path), ["true"])
