"""LSF and jsrun as on Summit: the directives of the published run line by line, what LSF could not be told, what it answers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prottrans_hpc import __version__
from prottrans_hpc.errors import ConfigError, SubmitError
from prottrans_hpc.launch import job_script, lsf
from prottrans_hpc.launch.demand import Demand
from prottrans_hpc.launch.job import Job
from prottrans_hpc.launch.job_state import State
from prottrans_hpc.launch.planner import allocate
from prottrans_hpc.launch.schedulers import SCHEDULERS
from prottrans_hpc.launch.starters import STARTERS
from prottrans_hpc.machine import Machine, read_machine
from prottrans_hpc.run_dir import RunDir

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FAKE_SCHEDULER = Path(__file__).resolve().parents[1] / "fake_scheduler"
RUN_DIR = "/gpfs/alpine/bio123/runs/prot_txl_bfd"


def job(machine: str | Machine = "summit", *, run_dir: str = RUN_DIR, account: str | None = "BIO123", **demand: Any) -> Job:
    profile = read_machine(machine) if isinstance(machine, str) else machine
    allocation = allocate(profile, Demand(**(demand or {"num_racks": 52})))
    return Job("pretrain", Path(run_dir).name[:60] or "run", RunDir(Path(run_dir)), profile, allocation, "/sw/venv/bin/python", account=account)


GOLDEN_JOBS = {
    "summit-936-nodes": {"num_racks": 52},
    "summit-2-nodes": {"num_nodes": 2, "partial_rack": True, "walltime_min": 90, "queue": "killable"},
}


def render(job: Job) -> bytes:
    return job_script.render(job, SCHEDULERS[job.machine.scheduler].render_header(job)).replace(__version__.encode(), b"VERSION")


@pytest.mark.parametrize("name", GOLDEN_JOBS)
def test_scripts_are_as_they_were_reviewed(name: str) -> None:
    """After a change on purpose: `UPDATE_GOLDEN=1 pytest tests/launch/test_lsf.py`, and review the diff."""
    path = GOLDEN / f"{name}.sh"
    script = render(job(name.partition("-")[0], **GOLDEN_JOBS[name]))
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_bytes(script)
    assert script == path.read_bytes()


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.sh")), ids=lambda path: path.stem)
def test_reviewed_scripts_are_good_shell(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", "--shell=bash", str(path)], stdout=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 0, done.stdout


# From the users' guide of Summit, for 936 nodes of 42 cores in 52 whole racks, 24 hours in the queue of bin 2.
PUBLISHED_DIRECTIVES = [
    "#BSUB -P BIO123",
    "#BSUB -J prot_txl_bfd",
    "#BSUB -q batch",
    "#BSUB -W 24:00",
    "#BSUB -csm y",
    "#BSUB -n 39313",
    '#BSUB -R "1*{select[((LN)&&(type==any))]order[r15s:pg]span[hosts=1]cu[type=rack:pref=config]}'
    '+39312*{select[((CN)&&(type==any))]order[r15s:pg]span[ptile=42]cu[type=rack:maxcus=52]}"',
    f"#BSUB -o {RUN_DIR}/logs/lsf-%J.log",
    f"#BSUB -e {RUN_DIR}/logs/lsf-%J.log",
    "#BSUB -wa USR1",
    "#BSUB -wt 10",
    "#BSUB -r",
    '#BSUB -alloc_flags "smt4 nvme"',
]
PUBLISHED_JSRUN = "jsrun -n 5616 -r 6 -a 1 -c 7 -g 1 -b packed:7 -l gpu-cpu -d packed"


def test_the_published_run_line_by_line() -> None:
    lines = (GOLDEN / "summit-936-nodes.sh").read_text().splitlines()
    assert [line for line in lines if line.startswith("#BSUB")] == PUBLISHED_DIRECTIVES
    assert lines[1 : 1 + len(PUBLISHED_DIRECTIVES)] == PUBLISHED_DIRECTIVES, "nothing stands above or between the directives"
    started = next(index for index, line in enumerate(lines) if "jsrun -n" in line)
    assert f"; exec {PUBLISHED_JSRUN} " in lines[started]
    command = " ".join(lines[started : started + 2]).replace("\\", "").split()
    assert command[-7:] == ["/sw/venv/bin/python", "-P", "-m", "prottrans_hpc", "pretrain", '"$run_dir")', "&"]
    assert "export OMP_NUM_THREADS=7" in lines[:started], "else jsrun derives one from -c and -b"


def test_a_small_job_in_easy_mode() -> None:
    text = (GOLDEN / "summit-2-nodes.sh").read_text()
    directives = [line.removeprefix("#BSUB ") for line in text.splitlines() if line.startswith("#BSUB")]
    assert {"-nnodes 2", "-q killable", "-W 1:30", "-r"} <= set(directives)
    assert not any(line.startswith(("-csm", "-n ", "-R")) for line in directives)
    assert "jsrun -n 12 -r 6 -a 1 -c 7 -g 1 " in text


def test_one_resource_set_a_node() -> None:
    """The shape that IBM's DDL wants."""
    ddl = job(replace(read_machine("summit"), resource_set="node"), num_racks=52)
    wanted = "jsrun -n 936 -r 1 -a 6 -c 42 -g 6 -b packed:7 -l gpu-cpu -d packed --smpiargs=-gpu"
    assert STARTERS["jsrun"].argv(ddl)[: len(wanted.split())] == wanted.split()


def test_a_machine_without_gpus() -> None:
    summit = read_machine("summit")
    cpus = job(replace(summit, node=replace(summit.node, num_gpus=0, gpu=None)), num_nodes=18)
    assert "-n 108 -r 6 -a 1 -c 7 -g 0 -b packed:7 -l cpu-cpu -d packed /sw" in " ".join(STARTERS["jsrun"].argv(cpus))


@pytest.mark.parametrize(("minutes", "text"), [(1, "0:01"), (59, "0:59"), (60, "1:00"), (1440, "24:00")])
def test_walltimes_have_no_seconds(minutes: int, text: str) -> None:
    assert lsf.walltime(minutes) == text


@pytest.mark.parametrize(("walltime", "warning"), [(1440, 10), (20, 10), (19, 9), (2, 1), (1, 1)])
def test_the_warning_comes_within_the_walltime(walltime: int, warning: int) -> None:
    assert lsf.warning_min(10, walltime) == warning


def test_several_alloc_flags_are_refused() -> None:
    lines = ("#BSUB -alloc_flags smt4", "#BSUB -alloc_flags nvme")
    with pytest.raises(ConfigError, match="several -alloc_flags"):
        lsf.render_header(job(replace(read_machine("summit"), header_lines=lines)))


def test_a_job_without_a_walltime_is_refused() -> None:
    base = job()
    with pytest.raises(ConfigError, match="needs a walltime"):
        lsf.render_header(replace(base, allocation=replace(base.allocation, walltime_min=None)))


@pytest.mark.parametrize("path", ["/a/100%J/run", "/a/50% done/run", '/a/"b"/run', "/a/it's/run", "/a/$HOME/run", "/a/`b`/run", "/a/b\\c/run"])
def test_paths_that_lsf_would_change_are_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="choose one without"):
        lsf.render_header(job(run_dir=path))


@pytest.mark.parametrize("path", ["/a/two words/run", "/a/x[1-10]/run", "/a/#no/run", "/a/prot\u00e9ine/run", "/a/;&|()<>*?~!/run", "/a/-rf/run"])
def test_odd_paths_reach_lsf_as_they_are(path: str, tmp_path: Path) -> None:
    header = lsf.render_header(job(run_dir=path))
    sys.path.insert(0, str(FAKE_SCHEDULER))
    try:
        import bsub
    finally:
        sys.path.remove(str(FAKE_SCHEDULER))
    options = bsub.parse(bsub.directives("\n".join(header)))
    assert options["-o"] == options["-e"] == f"{path}/logs/lsf-%J.log"
    subprocess.run(["bash", "-n"], input="\n".join(header), text=True, check=True)


def test_submitting_reads_the_script_and_waits_for_the_job_before() -> None:
    argv = lsf.submit_argv(RunDir(Path("/runs/a b")), "4711")
    assert argv[:2] == ["bash", "-c"] and argv[4:] == ["/runs/a b/job.sh", "-w", "ended(4711)"]
    assert lsf.submit_argv(RunDir(Path("/runs/a b")), None)[4:] == ["/runs/a b/job.sh"]


@pytest.mark.parametrize(
    "text", ["Job <123> is submitted to queue <batch>.\n", "Job <123> is submitted to default queue <normal>.\n", "notice of the day\nJob <123> is submitted"]
)
def test_the_job_id_is_read(text: str) -> None:
    assert lsf.parse_job_id(text) == "123"


@pytest.mark.parametrize("text", ["", "123", "Job <> is submitted", "Job not submitted.", "said: Job <123> is submitted"])
def test_anything_else_is_no_job_id(text: str) -> None:
    with pytest.raises(SubmitError, match="look at bjobs"):
        lsf.parse_job_id(text)


def test_states() -> None:
    answer = """1|PEND|-
2|RUN|-
3|DONE|-
4|EXIT|-
5|EXIT|TERM_RUNLIMIT: job killed after reaching LSF run time limit
6|EXIT|TERM_OWNER: job killed by owner
7|EXIT|TERM_PREEMPT: job killed after preemption
8|EXIT|TERM_MEMLIMIT: job killed after reaching LSF memory usage limit
9|SSUSP|-
10|UNKWN|-
11|ZOMBI|-
12|EXIT|TERM_SOMETHING_NEW
13|RUN
Job <14> is not found
"""
    expected = [
        State.PENDING,
        State.RUNNING,
        State.DONE,
        State.FAILED,
        State.TIMEOUT,
        State.CANCELLED,
        State.PREEMPTED,
        State.OUT_OF_MEMORY,
        State.SUSPENDED,
        State.UNKNOWN,
        State.UNKNOWN,
        State.FAILED,
        State.RUNNING,
    ]
    assert lsf.parse_states(answer) == {str(index + 1): state for index, state in enumerate(expected)}
    assert lsf.parse_states("No unfinished job found\n") == {}
    assert lsf.state_argv(["1", "2"]) == ["bjobs", "-a", "-noheader", "-o", "jobid stat exit_reason delimiter='|'", "1", "2"]


def test_the_profile_of_summit() -> None:
    summit = read_machine("summit")
    assert (summit.max_nodes, summit.num_racks, summit.nodes_per_rack) == (4608, 256, 18) and 256 * 18 == 4608
    assert (summit.node.num_cpu_cores, summit.node.num_gpus, summit.node.host_memory_gib) == (42, 6, 512)
    assert summit.node.gpu is not None and (summit.node.gpu.memory_gib, summit.node.gpu.peak_tflops) == (16, {"fp32": 15.7, "fp16": 125})
    assert [(b.min_nodes, b.max_nodes, b.max_walltime_min // 60) for b in summit.queue("batch").bins] == [
        (1, 45, 2),
        (46, 91, 6),
        (92, 921, 12),
        (922, 2764, 24),
        (2765, 4608, 24),
    ]
    killable = summit.queue("killable")
    assert killable.preemptable and [(b.min_nodes, b.max_nodes, b.max_walltime_min // 60) for b in killable.bins] == [(1, 45, 24), (46, 91, 24)]
    assert [(licence.comm, licence.max_nodes) for licence in summit.licences] == [("horovod", 954)]
    assert summit.retired and summit.sources


def test_the_profile_of_rhea() -> None:
    rhea = read_machine("rhea")
    assert (rhea.scheduler, rhea.node.num_cpu_cores, rhea.node.host_memory_gib, rhea.node.num_gpus) == ("slurm", 16, 128, 0)
    assert [(b.min_nodes, b.max_nodes, b.max_walltime_min // 60) for b in rhea.queue(None).bins] == [(1, 16, 48), (17, 64, 36), (65, 384, 3)]
