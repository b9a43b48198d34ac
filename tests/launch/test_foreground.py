"""A whole job: command line -> shell -> starter -> ranks, with real processes and real signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Job


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, stderr = process.communicate(timeout=180)
    return process.returncode, stderr


def test_ranks_learn_their_place_and_where_to_meet(job: Job) -> None:
    job.behave({rank: {"code": 0} for rank in range(3)})
    code, stderr = finish(job.start("--nodes", "3"))
    assert code == 0, stderr
    environments = [job.rank(rank)["environment"] for rank in range(3)]
    assert [env["PROTTRANS_NODE_RANK"] for env in environments] == ["0", "1", "2"]
    assert {env["PROTTRANS_WORLD_SIZE"] for env in environments} == {"3"}
    assert {env["MASTER_ADDR"] for env in environments} == {"127.0.0.1"}
    assert len({env["MASTER_PORT"] for env in environments}) == 1
    assert len({env["PROTTRANS_NONCE"] for env in environments}) == 1
    assert len(environments[0]["PROTTRANS_NONCE"]) == 32
    assert environments[0]["OMP_NUM_THREADS"].isdigit()
    assert environments[0]["CUDA_VISIBLE_DEVICES"] == ""


def test_two_starts_have_different_nonces(job: Job) -> None:
    job.behave({0: {"code": 0}})
    nonces = set()
    for _ in range(2):
        assert finish(job.start())[0] == 0
        nonces.add(job.rank(0)["environment"]["PROTTRANS_NONCE"])
        job.forget_ranks()
    assert len(nonces) == 2


def test_rank_0_is_seen_and_the_others_write_to_the_log_of_their_node(job: Job) -> None:
    job.behave({0: {"code": 0}, 1: {"code": 0}})
    code, stderr = finish(job.start("--nodes", "2"))
    assert code == 0
    assert "progress of rank 0" in stderr and "progress of rank 1" not in stderr
    assert (job.run_dir / "logs" / "node-0001.log").read_text() == "progress of rank 1\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_a_signal_reaches_every_rank_and_the_job_ends_with_75(job: Job, number: signal.Signals) -> None:
    process = job.start("--nodes", "2")
    job.rank(0), job.rank(1)
    process.send_signal(number)
    code, stderr = finish(process)
    assert code == 75, stderr
    expected = "SIGTERM" if number in (signal.SIGINT, signal.SIGHUP) else number.name
    assert [job.got(rank) for rank in range(2)] == [[expected], [expected]]
    assert (job.run_dir / "job.exit-code").read_text() == "75\n"


def test_ctrl_c_reaches_the_ranks_once(job: Job) -> None:
    process = job.start("--nodes", "2")
    job.rank(0), job.rank(1)
    os.killpg(process.pid, signal.SIGINT)
    code, stderr = finish(process)
    assert (code, job.got(0), job.got(1)) == (75, ["SIGTERM"], ["SIGTERM"])
    assert "saves a checkpoint" in stderr


def test_a_third_ctrl_c_kills(job: Job) -> None:
    job.behave({0: {"deaf": 1}, 1: {"deaf": 1}})
    process = job.start("--nodes", "2")
    pids = [job.pid(rank) for rank in range(2)]
    for words in ("saves a checkpoint", "once more", "killed"):
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        while words not in process.stderr.readline():
            pass
    assert finish(process)[0] == 137
    job.wait_gone(pids)


def test_a_storm_of_signals_changes_nothing(job: Job) -> None:
    process = job.start("--nodes", "2")
    job.rank(0), job.rank(1)
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGUSR1)
    assert finish(process)[0] == 75


@pytest.mark.parametrize("link", ["command line", "process group", "shell", "starter", "all ranks"])
def test_sigkill_of_any_link_leaves_no_rank(job: Job, link: str) -> None:
    process = job.start("--nodes", "2")
    pids = [job.pid(rank) for rank in range(2)]
    starter = int(str(job.rank(0)["ppid"]))
    shell = int(Path(f"/proc/{starter}/stat").read_text().rpartition(")")[2].split()[1])
    if link == "process group":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        for pid in {"command line": [process.pid], "shell": [shell], "starter": [starter], "all ranks": pids}[link]:
            with contextlib.suppress(ProcessLookupError):  # the second rank may have ended with the first
                os.kill(pid, signal.SIGKILL)
    code, _ = finish(process)
    assert code == (-9 if link in ("command line", "process group") else 137)
    job.wait_gone([*pids, starter, shell])


def test_the_first_failure_is_the_result_and_is_named(job: Job) -> None:
    job.behave({1: {"code": 65}})
    code, stderr = finish(job.start("--nodes", "2"))
    assert code == 65
    assert "rank 1 of 2 on node 1 ended with exit code 65" in stderr
    assert "progress of rank 1" in stderr, "the last lines of the failed rank's log are shown"
    assert job.got(0) == ["SIGTERM"]


def test_a_killed_rank_is_named_and_the_others_end(job: Job) -> None:
    job.behave({0: {"kill": signal.SIGSEGV}})
    code, stderr = finish(job.start("--nodes", "2"))
    assert code == 128 + signal.SIGSEGV
    assert "rank 0 of 2 on node 0 was killed by SIGSEGV" in stderr
    assert (job.run_dir / "job.exit-code").read_text() == f"{128 + signal.SIGSEGV}\n"


def test_a_second_job_in_the_same_run_directory_is_refused(job: Job) -> None:
    first = job.start()
    job.rank(0)
    code, stderr = finish(job.start())
    assert code == 71
    assert f"in use by a job that is running (process {first.pid}" in stderr
    first.terminate()
    assert finish(first)[0] == 75
    job.forget_ranks()
    job.behave({0: {"code": 0}})
    assert finish(job.start())[0] == 0


def test_a_job_in_the_background_outlives_its_command_and_stops_in_order(job: Job) -> None:
    from prottrans_hpc.launch import local
    from prottrans_hpc.launch.job_state import State

    code, stderr = finish(job.start("--detach", "--nodes", "2"))
    assert code == 0
    job_id = json.loads((job.run_dir / "job.json").read_text())["job_ids"][-1]
    assert f"process {job_id}" in stderr and f"prottrans runs cancel {job.run_dir}" in stderr
    job.rank(0), job.rank(1)
    states = subprocess.run(local.state_argv([job_id, "4194304"]), stdout=subprocess.PIPE, text=True, check=False).stdout
    assert local.parse_states(states) == {job_id: State.RUNNING}
    assert finish(job.start())[0] == 71, "it holds the run directory"
    subprocess.run(local.cancel_argv(job_id), check=True)
    assert job.exit_code() == "75\n"
    assert [job.got(rank) for rank in range(2)] == [["SIGTERM"], ["SIGTERM"]]
    assert "progress of rank 0" in (job.run_dir / "logs" / "job.log").read_text()


def test_killing_a_job_in_the_background_leaves_no_rank(job: Job) -> None:
    assert finish(job.start("--detach", "--nodes", "2"))[0] == 0
    pids = [job.pid(rank) for rank in range(2)]
    os.kill(int(json.loads((job.run_dir / "job.json").read_text())["job_ids"][-1]), signal.SIGKILL)
    job.wait_gone(pids)
