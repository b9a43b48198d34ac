"""The stand-in refuses what LSF and jsrun refuse: else a job script that passes here would prove nothing."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Lsf

EASY = {"-P": "BIO123", "-W": "2:00", "-nnodes": "2"}
RACKS = (
    "1*{{select[((LN)&&(type==any))]order[r15s:pg]span[hosts=1]cu[type=rack:pref=config]}}"
    "+{slots}*{{select[((CN)&&(type==any))]order[r15s:pg]span[ptile={ptile}]cu[type=rack:maxcus={racks}]}}"
)
EXPERT = {"-P": "BIO123", "-W": "24:00", "-csm": "y", "-n": "39313", "-R": RACKS.format(slots=39312, ptile=42, racks=52)}


def script(*lines: str, options: Mapping[str, str | None] = EASY, **changes: str | None) -> str:
    """A job script with these directives; a change to None leaves one out."""
    given = {**options, **{f"-{name}": value for name, value in changes.items()}}
    directives = [f"#BSUB {name} {value if name == '-W' else shlex.quote(value)}" for name, value in given.items() if value is not None]
    return "\n".join(["#!/bin/bash", *directives, *lines, "true", ""])


def test_what_is_right_is_taken(lsf: Lsf) -> None:
    done = lsf.run("bsub", script=script('#BSUB -alloc_flags "smt4 nvme"', "#BSUB -wa USR1", "#BSUB -wt 10", "#BSUB -r"))
    assert (done.returncode, done.stdout) == (0, "Job <1001> is submitted to default queue <batch>.\n")
    done = lsf.run("bsub", "-w", "ended(1001)", script=script(options=EXPERT, q="batch"))
    assert (done.returncode, done.stdout) == (0, "Job <1002> is submitted to queue <batch>.\n")
    assert (lsf.job(1002)["nodes"], lsf.job(1002)["racks"], lsf.job(1002)["after"]) == (936, 52, "ended(1001)")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (script("#BSUB --nodes 2"), "--nodes: Illegal option"),
        (script("#BSUB -N2"), "Illegal option"),
        (script("#BSUB -q"), "argument is missing"),
        (script('#BSUB -J "open'), "unbalanced quotes"),
        (script(n="84"), "-n and -nnodes cannot be used together"),
        (script(nnodes=None), "number of nodes is missing"),
        (script(nnodes=None, n="84"), "need expert mode"),
        (script(R="span[hosts=1]"), "need expert mode"),
        (script(nnodes="0"), "Bad argument"),
        (script(P=None), "-P is missing"),
        (script(W=None), "-W is missing"),
        (script(W="2:00:00"), "Bad time specification"),
        (script(W="0:30:00"), "Bad time specification"),
        (script(W="1:60"), "Bad time specification"),
        (script(W="two"), "Bad time specification"),
        (script(W="0:00"), "must be above zero"),
        (script(W="2:01"), "may run for 120 minutes"),
        (script(W="6:01", nnodes="46"), "may run for 360 minutes"),
        (script(W="12:01", nnodes="921"), "may run for 720 minutes"),
        (script(W="24:01", nnodes="4608"), "may run for 1440 minutes"),
        (script(nnodes="4609"), "takes no jobs of 4609 nodes"),
        (script(q="killable", nnodes="92", W="1:00"), "takes no jobs of 92 nodes"),
        (script(q="debugg"), "No such queue"),
        (script("#BSUB -alloc_flags smt4", "#BSUB -alloc_flags nvme"), "Only one -alloc_flags"),
        (script("#BSUB -alloc_flags smt4 nvme"), "script on standard input"),
        (script(alloc_flags="smt3"), "no such flag"),
        (script("#BSUB -wa USR1"), "must be given together"),
        (script("#BSUB -wt 10"), "must be given together"),
        (script("#BSUB -wa HELLO", "#BSUB -wt 10"), "Bad signal value"),
        (script("#BSUB -wa USR1", "#BSUB -wt 0:10:00"), "-wt 0:10:00: Bad time specification"),
        (script(J="run[0-10]"), "array"),
        (script(w="ended(77)"), "No matching job"),
        (script(w="after(1)"), "syntax error"),
        (script(w="ended(1) &&"), "syntax error"),
        (script(options=EXPERT, nnodes="936"), "cannot be used together"),
        (script(options=EXPERT, nnodes="936", n=None), "cannot be used in expert mode"),
        (script(options=EXPERT, R=None), "needs -n and -R"),
        (script(options=EXPERT, n="39312"), "does not match"),
        (script(options=EXPERT, R=RACKS.format(slots=39312, ptile=44, racks=52)), "do not fill hosts"),
        (script(options=EXPERT, R=RACKS.format(slots=39312, ptile=42, racks=51)), "do not fit into 51 racks"),
        (script(options=EXPERT, R="span[ptile=42]"), "Bad resource requirement"),
        (script(options=EXPERT, csm="yes"), "is y or n"),
        ("", "Empty job"),
    ],
)
def test_bsub_refuses(lsf: Lsf, text: str, said: str) -> None:
    done = lsf.run("bsub", script=text)
    assert (done.returncode, done.stdout) == (255, "")
    assert said in done.stderr
    assert not (lsf.folder / "jobs").exists()


def test_bsub_refuses_the_hundred_and_first_job(lsf: Lsf) -> None:
    lsf.configure(max_queued=2)
    for _ in range(2):
        lsf.submit(script())
    assert "limit of queued jobs" in lsf.run("bsub", script=script()).stderr


def test_the_command_line_wins_over_the_script(lsf: Lsf) -> None:
    assert lsf.job(lsf.submit(script(), "-nnodes", "7"))["nodes"] == 7
    assert "give the script on standard input" in lsf.run("bsub", "job.sh", script=script()).stderr


@pytest.mark.parametrize(("name", "place"), [("summit-936-nodes", (936, 52, 1440)), ("summit-2-nodes", (2, None, 90)), ("summit-pretrain", (936, 52, 1440))])
def test_the_reviewed_scripts_are_taken(lsf: Lsf, name: str, place: tuple[int, int | None, int]) -> None:
    golden = Path(__file__).resolve().parents[1] / "golden" / f"{name}.sh"
    job = lsf.job(lsf.submit(golden.read_text()))
    assert (job["nodes"], job["racks"], job["walltime_min"]) == place


def test_every_reviewed_script_for_summit_is_taken(lsf: Lsf) -> None:
    scripts = sorted((Path(__file__).resolve().parents[1] / "golden").glob("summit-*.sh"))
    assert len(scripts) >= 3
    for script in scripts:
        lsf.submit(script.read_text())


def test_job_ids_go_on_when_lsf_starts_again(lsf: Lsf) -> None:
    lsf.start()
    first = lsf.submit(script(W="10"))
    lsf.wait(first, "DONE")
    lsf.stop()
    lsf.start()
    assert lsf.submit(script(W="10")) == first + 1


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        ("bjobs", ["-x"], "Illegal option"),
        ("bjobs", ["-o", "jobid nonsense"], "bad -o format"),
        ("bjobs", ["4711"], "Job <4711> is not found"),
        ("bkill", [], "must be specified"),
        ("bkill", ["4711"], "No matching job"),
        ("bkill", ["-s", "HELLO", "1"], "Illegal signal"),
        ("brequeue", [], "usage"),
        ("brequeue", ["4711"], "No matching job"),
    ],
)
def test_the_other_commands_refuse(lsf: Lsf, command: str, arguments: list[str], said: str) -> None:
    done = lsf.run(command, *arguments)
    assert done.returncode == 255 and said in done.stderr


def test_a_waiting_job_is_not_requeued(lsf: Lsf) -> None:
    assert "cannot be requeued" in lsf.run("brequeue", str(lsf.submit(script()))).stderr


GOOD = {"-n": "4", "-r": "2", "-a": "1", "-c": "21", "-g": "3", "-b": "packed:21", "-l": "gpu-cpu", "-d": "packed"}


@pytest.fixture
def hosts(lsf: Lsf) -> str:
    """The host file of a job on two nodes."""
    path = lsf.folder / "hosts"
    path.write_text("".join(f"{host}\n" for host in ("batch2", *["a001n01"] * 42, *["a001n02"] * 42)))
    return str(path)


def jsrun(lsf: Lsf, hosts: str, *command: str, **changes: str | None) -> tuple[int, str]:
    options = {**GOOD, **{f"-{name}": value for name, value in changes.items()}}
    words = [word for name, value in options.items() if value is not None for word in (name, value)]
    done = lsf.run("jsrun", *words, *command, LSB_DJOB_HOSTFILE=hosts, LSB_JOBID="1")
    return done.returncode, done.stderr


def test_jsrun_takes_what_fits(lsf: Lsf, hosts: str) -> None:
    assert jsrun(lsf, hosts, "true") == (0, "")
    assert jsrun(lsf, hosts, "--smpiargs=-gpu", "true", n="2", r="1", a="6", c="42", g="6", b="packed:7") == (0, "")
    assert jsrun(lsf, hosts, "false")[0] == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n": "5"}, "do not fill the 2 hosts"),
        ({"n": "2"}, "do not fill the 2 hosts"),
        ({"c": "22", "b": "rs"}, "exceed the 42 cores"),
        ({"g": "4"}, "exceed the 6 GPUs"),
        ({"b": "packed:22"}, "does not fit"),
        ({"a": "2"}, "does not fit"),
        ({"b": "tight"}, "does not fit"),
        ({"l": "GPU-CPU"}, "unknown latency"),
        ({"d": "cyclic"}, "packed only"),
        ({"a": "0"}, "at least 1"),
        ({"a": "one"}, "not a number"),
        *[({option[1:]: None}, f"{option} not given") for option in GOOD],
    ],
)
def test_jsrun_refuses(lsf: Lsf, hosts: str, changes: dict[str, str | None], said: str) -> None:
    code, stderr = jsrun(lsf, hosts, "true", **changes)
    assert code == 255 and said in stderr


def test_jsrun_refuses_unknown_options_no_command_and_no_job(lsf: Lsf, hosts: str) -> None:
    assert "unrecognized option '--np'" in jsrun(lsf, hosts, "--np", "4", "true")[1]
    assert "no command" in jsrun(lsf, hosts)[1]
    assert "not in a job" in lsf.run("jsrun", "true").stderr
