"""The stand-in runs jobs for real: places, output, time, signals, dependencies, requeue and preemption as LSF has them."""

from __future__ import annotations

import os
import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Lsf

# Tells what it gets, and goes on in spite of it.
LISTENER = """
for name in INT TERM USR1 USR2; do trap "echo got $name >> told" "$name"; done
echo start >> told
for _ in $(seq 6000); do sleep 0.1; done
"""


FIRST_START_SLEEPS = "trap 'exit 75' TERM; echo start >> told; if [ $(grep -c start told) = 1 ]; then sleep 600 & wait; fi"


def script(body: str, *options: str, minutes: int = 60) -> str:
    directives = ["-P BIO123", f"-W {minutes}", *options]
    if not any(option.startswith("-csm") for option in options):
        directives.append("-nnodes 2")
    return "\n".join(["#!/bin/bash", *(f"#BSUB {directive}" for directive in directives), f"cd {shlex.quote(os.getcwd())}", body, ""])


@pytest.fixture(autouse=True)
def _in_a_folder(lsf: Lsf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lsf.configure(racks=2, nodes_per_rack=3)
    lsf.start()


def told(path: Path) -> list[str]:
    return (path / "told").read_text().splitlines() if (path / "told").exists() else []


def started(lsf: Lsf, path: Path, times: int = 1) -> None:
    lsf.wait_for(lambda: told(path).count("start") == times, f"start {times}")


def test_a_job_finds_itself(lsf: Lsf, tmp_path: Path) -> None:
    job = lsf.submit(script('echo "$LSB_JOBID $LSB_JOBINDEX $LSB_QUEUE"; uniq -c "$LSB_DJOB_HOSTFILE"; echo oops >&2; exit 3', "-o out.%J.%I", "-e err.%J"))
    done = lsf.wait(job, "EXIT")
    assert (done["exit_code"], done["exit_reason"]) == (3, None)
    lines = (tmp_path / f"out.{job}.0").read_text().splitlines()
    assert lines[0] == f"{job} 0 batch"
    assert [line.split() for line in lines[1:]] == [["1", "batch1"], ["42", "a001n01"], ["42", "a001n02"]]
    assert (tmp_path / f"err.{job}").read_text() == "oops\n"
    assert lsf.run("bjobs", "-a", "-noheader", "-o", "jobid stat exit_code delimiter='|'", str(job)).stdout == f"{job}|EXIT|3\n"


def test_whole_racks(lsf: Lsf) -> None:
    """One node of the first rack is busy: a job for one whole rack takes the second."""
    lsf.submit(script("sleep 600", "-nnodes 1").replace("#BSUB -nnodes 2\n", ""))
    racks = "1*{select[((LN)&&(type==any))]order[r15s:pg]span[hosts=1]cu[type=rack:pref=config]}"
    racks += "+126*{select[((CN)&&(type==any))]order[r15s:pg]span[ptile=42]cu[type=rack:maxcus=1]}"
    job = lsf.submit(script("true", "-csm y", "-n 127", f'-R "{racks}"'))
    assert lsf.wait(job, "DONE")["hosts"] == ["a002n01", "a002n02", "a002n03"]


def test_jobs_wait_for_nodes(lsf: Lsf) -> None:
    jobs = [lsf.submit(script("sleep 600")) for _ in range(4)]
    lsf.wait(jobs[2], "RUN")
    assert lsf.job(jobs[3])["stat"] == "PEND"
    assert len({host for job in jobs[:3] for host in lsf.job(job)["hosts"]}) == 6
    assert lsf.run("bkill", str(jobs[0])).returncode == 0
    lsf.wait(jobs[3], "RUN")


def test_the_warning_the_end_of_the_walltime_and_the_kill(lsf: Lsf, tmp_path: Path) -> None:
    lsf.configure(minute_s=60.0, kill_after_min=3)
    job = lsf.submit(script(LISTENER, "-wa USR1", "-wt 5", minutes=10))
    started(lsf, tmp_path)
    lsf.put_clock_forward(6)
    lsf.wait_for(lambda: told(tmp_path) == ["start", "got USR1"], "the warning")
    lsf.put_clock_forward(5)
    lsf.wait_for(lambda: told(tmp_path) == ["start", "got USR1", "got USR2"], "the end of the walltime")
    assert lsf.job(job)["stat"] == "RUN"
    lsf.put_clock_forward(3)
    done = lsf.wait(job, "EXIT")
    assert told(tmp_path) == ["start", "got USR1", "got USR2"]
    assert done["exit_code"] == 128 + signal.SIGKILL and done["exit_reason"].startswith("TERM_RUNLIMIT")


def test_bkill(lsf: Lsf, tmp_path: Path) -> None:
    lsf.configure(minute_s=60.0, terminate_interval_s=60.0)
    job = lsf.submit(script(LISTENER))
    started(lsf, tmp_path)
    lsf.run("bkill", "-s", "USR2", str(job))
    lsf.wait_for(lambda: told(tmp_path) == ["start", "got USR2"], "the signal")
    lsf.run("bkill", str(job))
    for signals in (["got INT"], ["got INT", "got TERM"]):
        lsf.wait_for(lambda: told(tmp_path)[2:] == signals, signals[-1])  # noqa: B023 - called within the loop
        assert lsf.job(job)["stat"] == "RUN"
        lsf.put_clock_forward(1)
    assert lsf.wait(job, "EXIT")["exit_reason"].startswith("TERM_OWNER")
    assert lsf.run("bkill", str(job)).returncode == 255


def test_a_signal_reaches_the_children_of_the_script_too(lsf: Lsf, tmp_path: Path) -> None:
    child = "(trap 'echo child >> told; exit' USR1; echo start >> told; while :; do sleep 0.1; done) &"
    job = lsf.submit(script(f"trap 'echo script >> told' USR1\n{child}\nwait; wait"))
    started(lsf, tmp_path)
    lsf.run("bkill", "-s", "USR1", str(job))
    lsf.wait(job, "DONE")
    assert sorted(told(tmp_path)) == ["child", "script", "start"]


@pytest.mark.parametrize(("code", "ended", "done"), [(0, "DONE", "DONE"), (75, "DONE", "PEND")])
def test_dependencies(lsf: Lsf, tmp_path: Path, code: int, ended: str, done: str) -> None:
    first = lsf.submit(script(f"echo start >> told; while [ ! -e go ]; do sleep 0.05; done; exit {code}"))
    after_end, after_done, after_start = (lsf.submit(script("true"), "-w", f"{what}({first})") for what in ("ended", "done", "started"))
    started(lsf, tmp_path)
    lsf.wait(after_start, "DONE")
    assert [lsf.job(job)["stat"] for job in (after_end, after_done)] == ["PEND", "PEND"]
    (tmp_path / "go").touch()
    lsf.wait(after_end, ended)
    assert lsf.job(after_done)["stat"] == done or lsf.wait(after_done, done)


def test_brequeue_keeps_the_id(lsf: Lsf, tmp_path: Path) -> None:
    job = lsf.submit(script(FIRST_START_SLEEPS))
    started(lsf, tmp_path)
    assert lsf.run("brequeue", str(job)).returncode == 0
    done = lsf.wait(job, "DONE")
    assert (done["id"], done["starts"]) == (job, 2)


@pytest.mark.parametrize(("option", "state"), [("-r", "DONE"), ("-rn", "EXIT")])
def test_preemption_in_the_killable_queue(lsf: Lsf, tmp_path: Path, option: str, state: str) -> None:
    """Not before the guaranteed time; afterwards the job is queued again under its id, unless -rn forbids it."""
    lsf.configure(preemptable_after_min={"killable": [[1, 45, 3]]})
    job = lsf.submit(script(FIRST_START_SLEEPS, "-q killable", option))
    started(lsf, tmp_path)
    lsf.ask(job, "preempt")
    lsf.wait_until_heard()
    assert lsf.job(job)["stat"] == "RUN"
    lsf.configure(preemptable_after_min={"killable": [[1, 45, 0]]})
    lsf.ask(job, "preempt")
    assert lsf.wait(job, state)["starts"] == (2 if option == "-r" else 1)


def test_a_job_of_the_batch_queue_is_not_preempted(lsf: Lsf, tmp_path: Path) -> None:
    job = lsf.submit(script(LISTENER))
    started(lsf, tmp_path)
    lsf.ask(job, "preempt")
    lsf.wait_until_heard()
    lsf.run("bkill", "-s", "USR1", str(job))
    lsf.wait_for(lambda: len(told(tmp_path)) > 1, "a signal")
    assert told(tmp_path) == ["start", "got USR1"]


@pytest.mark.parametrize(("options", "state"), [(("-r",), "DONE"), ((), "EXIT")])
def test_a_host_that_fails(lsf: Lsf, tmp_path: Path, options: tuple[str, ...], state: str) -> None:
    job = lsf.submit(script("echo start >> told; if [ $(grep -c start told) = 1 ]; then sleep 600; fi", *options))
    started(lsf, tmp_path)
    lsf.ask(job, "host failure")
    assert lsf.wait(job, state)["starts"] == (2 if options else 1)


def test_nothing_outlives_the_daemon(lsf: Lsf, tmp_path: Path) -> None:
    body = "echo $$ > pid; jsrun -n 2 -r 1 -a 1 -c 1 -g 0 -b none -l cpu-cpu -d packed bash -c 'echo $$ > rank-$PMIX_RANK; sleep 600'"
    lsf.submit(script(body))
    files = [tmp_path / name for name in ("pid", "rank-0", "rank-1")]
    lsf.wait_for(lambda: all(path.exists() and path.read_text().endswith("\n") for path in files), "the ranks")
    lsf.stop()
    lsf.wait_for(lambda: not any(is_alive(path.read_text().strip()) for path in files), "the end of all")


def is_alive(pid: str) -> bool:
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_jsrun_tells_ranks_their_places(lsf: Lsf, tmp_path: Path) -> None:
    body = """jsrun -n 4 -r 2 -a 1 -c 21 -g 3 -b packed:21 -l gpu-cpu -d packed bash -c 'env | grep -E "^(JSM|OMPI|PMIX|CUDA)" | sort > rank-$PMIX_RANK'"""
    lsf.wait(lsf.submit(script(body)), "DONE")
    variables = dict(line.split("=") for line in (tmp_path / "rank-3").read_text().splitlines())
    assert variables.pop("PMIX_NAMESPACE")
    assert variables == {
        **{
            f"{prefix}_{name}": value
            for prefix in ("JSM_NAMESPACE", "OMPI_COMM_WORLD")
            for name, value in zip(("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"), "3412", strict=True)
        },
        "PMIX_RANK": "3",
        "CUDA_VISIBLE_DEVICES": "3,4,5",
    }
