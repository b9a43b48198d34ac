"""A container around every rank, and around nothing else: the starter and our own programs run on the batch node itself."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prottrans_hpc import __version__
from prottrans_hpc.launch import job_script, planner
from prottrans_hpc.launch.job import Job
from prottrans_hpc.launch.schedulers import SCHEDULERS
from prottrans_hpc.machine import read_machine
from prottrans_hpc.recipe import read_recipe
from prottrans_hpc.run_dir import RunDir

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
PREFIX = ("apptainer", "exec", "--nv", "--bind", "/scratch", "/shared/my image.sif")


def render(machine: str, **changes: Any) -> str:
    profile = replace(read_machine(machine), launcher_prefix=PREFIX, python="/opt/prottrans/bin/python", **changes)
    profile = replace(profile, node=replace(profile.node, num_cpu_cores=profile.node.num_cpu_cores or 8))
    allocation = planner.plan(read_recipe("tiny_prot_bert"), profile, num_nodes=profile.nodes_per_rack or 2)
    run_dir = RunDir(Path("/data/runs/tiny_prot_bert-1a2b3c4d"))
    job = Job("pretrain", run_dir.path.name, run_dir, profile, allocation, "/opt/prottrans/bin/python", host_python="/venv/bin/python")
    return job_script.render(job, SCHEDULERS[profile.scheduler].render_header(job)).decode()


def test_the_script_is_as_it_was_reviewed() -> None:
    """After a change on purpose: `UPDATE_GOLDEN=1 pytest tests/launch/test_container.py`, and review the diff."""
    path = GOLDEN / "slurm_cluster-container.sh"
    script = render("slurm_cluster").replace(__version__, "VERSION")
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(script)
    assert script == path.read_text()
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("machine", ["laptop", "laptop_mpi", "slurm_cluster", "summit"])
def test_the_ranks_are_inside_and_all_else_is_outside(machine: str) -> None:
    text = render(machine, staging="none").replace("\\\n", "")
    words = re.sub(r" +", " ", text)
    assert words.count("apptainer exec --nv --bind /scratch '/shared/my image.sif' /opt/prottrans/bin/python -P -m prottrans_hpc pretrain") == 1
    assert words.count("apptainer") == 1
    assert words.count("/opt/prottrans") == 1
    assert 'export PATH=/venv/bin:"$PATH"' in words
    if read_machine(machine).scheduler != "local":
        for module in ("begin", "end"):
            assert f"/venv/bin/python -P -m prottrans_hpc.launch.{module} " in words


def test_torchrun_cannot_be_prefixed() -> None:
    with pytest.raises(ValueError, match="take another starter"):
        replace(read_machine("laptop"), starter="torchrun", launcher_prefix=PREFIX)


PROFILE = """
name = "boxed"
description = "the laptop, with ranks in a container"
scheduler = "local"
starter = "processes"
ranks_per_node = 1
max_nodes = 2
launcher_prefix = ["{container}", "exec", "my image.sif"]
python = "{python}"

[node]
num_cpu_cores = 2
"""


def test_ranks_really_start_through_the_prefix(job: Any) -> None:
    """A stand-in for the container notes how it was called, and runs what it was given."""
    container, calls = job.folder / "container", job.folder / "calls"
    container.write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >> "{calls}"\nshift 2\nexec "$@"\n')
    container.chmod(0o755)
    profile = job.folder / "boxed.toml"
    profile.write_text(PROFILE.format(container=container, python=job.python))
    process = job.start("--machine", str(profile), "--nodes", "2")
    pids = [job.pid(rank) for rank in (0, 1)]
    process.terminate()
    assert process.wait(60) == 75
    job.wait_gone(pids)
    assert calls.read_text().splitlines() == [f"exec my image.sif {job.python} -P -m prottrans_hpc pretrain {job.run_dir}"] * 2
