"""The job scripts of the studies, which ask for nodes as a training does: the same bytes as last time, and good shell."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from prottrans_hpc import __version__
from prottrans_hpc.launch import planner, scale_job
from prottrans_hpc.launch.checks import CorpusFacts
from prottrans_hpc.launch.comm_job import CommPlan
from prottrans_hpc.launch.demand import Demand
from prottrans_hpc.launch.scale import Order
from prottrans_hpc.machine import Machine, read_machine
from prottrans_hpc.recipe import read_recipe
from prottrans_hpc.run_dir import RunDir
from prottrans_hpc.scaling_study import Study, StudyDir

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SIZES = {"slurm_cluster": (1, 2, 4), "summit": (1, 18, 36)}


def comm(machine: Machine, account: str | None) -> bytes:
    """`prottrans comm`, on the largest of the sizes."""
    allocation = planner.allocate(machine, Demand(num_nodes=SIZES[machine.name][-1]))
    return CommPlan(machine, allocation, RunDir(Path("/data/studies/comm")), {}, account=account).script


def scale(machine: Machine, account: str | None) -> bytes:
    """`prottrans scale --one-job`: the job around the points, whose own scripts are those of trainings."""
    study = Study("tiny_prot_bert", "weak", SIZES[machine.name], repetitions=1, warmup=5, steps=20, seed=42)
    corpus = CorpusFacts(Path("/data/corpus"), "", 0, 0, 0)
    order = Order(study, StudyDir(Path("/data/studies/scaling")), read_recipe("tiny_prot_bert"), corpus, machine, keeps_bins=False, account=account)
    return scale_job.render_outer(order, scale_job.plans_of(order, study.points()))


@pytest.mark.parametrize("machine", SIZES)
@pytest.mark.parametrize("render", [comm, scale])
def test_scripts_are_as_they_were_reviewed(render: Callable[[Machine, str | None], bytes], machine: str) -> None:
    """After a change on purpose: `UPDATE_GOLDEN=1 pytest tests/launch/test_study_scripts.py`, and review the diff."""
    path, profile = GOLDEN / f"{machine}-{render.__name__}.sh", replace(read_machine(machine), python="/venv/bin/python")
    script = render(profile, "ABC123" if profile.account_required else None).replace(__version__.encode(), b"VERSION")
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_bytes(script)
    assert script == path.read_bytes()
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", str(path)], stdout=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 0, done.stdout
