"""What a farm would submit, on every machine that ships: as it was reviewed, good shell, and the same as `--dry-run` prints."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from prottrans_hpc import config
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.launch import farm
from prottrans_hpc.launch.demand import Demand
from prottrans_hpc.launch.farm_options import FarmDemand, plan_farm
from prottrans_hpc.machine import read_machine

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
ROUNDS = {"preprocess": "01-scan", "embed": "embed"}
MACHINES = config.shipped_names("hpc")


def plan(stage: str, machine: str, demand: Demand | None = None, *, num_items: int | None = None, **changes) -> farm.FarmPlan:
    account = "ABC123" if read_machine(machine).account_required else None
    asked = FarmDemand(machine, demand or Demand(num_nodes=4), account, num_items, dry_run=True)
    options = {"out": Path("/data/bfd" if stage == "preprocess" else "/data/bfd.h5"), "one_a_gpu": stage == "embed"} | changes
    found = plan_farm(stage, asked, **options)
    assert found is not None
    return replace(found, machine=replace(found.machine, python="/venv/bin/python"))


@pytest.mark.parametrize("stage", ROUNDS)
@pytest.mark.parametrize("machine", MACHINES)
def test_scripts_are_as_they_were_reviewed(stage, machine):
    """After a change on purpose: `UPDATE_GOLDEN=1 pytest tests/farm/test_dry_run.py`, and review the diff."""
    path = GOLDEN / f"{machine}-{stage}.sh"
    script = farm.preview(plan(stage, machine), ROUNDS[stage])
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(script)
    assert script == path.read_text()


@pytest.mark.parametrize("machine", [name for name in MACHINES if read_machine(name).scheduler == "lsf"])
def test_lsf_scripts_are_good_shell(machine, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text(farm.preview(plan("embed", machine), "embed"))
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", str(script)], stdout=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_the_command_prints_it_and_touches_nothing(prottrans, tmp_path):
    done = prottrans("preprocess", "x.fasta", "--out", "corpus", "--machine", "slurm_cluster", "--nodes", "2", "--dry-run", cwd=tmp_path)
    assert done.stdout.startswith("#!/bin/bash\n")
    assert "#SBATCH --array=0-1%2\n" in done.stdout
    assert "2 jobs of one node, 2 nodes at a time" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_sizes():
    assert plan("preprocess", "slurm_cluster").num_jobs == 4
    embed = plan("embed", "slurm_cluster")
    gpus = read_machine("slurm_cluster").node.num_gpus
    assert (embed.num_jobs, embed.num_at_once, embed.shares_per_job) == (16, 4, gpus)
    assert embed.num_items == 16 * gpus
    assert embed.cores_per_item == read_machine("slurm_cluster").node.num_cpu_cores // gpus
    assert plan("preprocess", "summit", Demand(num_racks=2)).num_at_once == 36
    assert plan("preprocess", "summit", Demand(num_gpus=12)).num_at_once == 2
    few = plan("preprocess", "summit", Demand(num_nodes=10), num_items=3)
    assert (few.num_jobs, few.num_at_once) == (3, 3)
    assert plan("preprocess", "laptop", Demand(), num_items=3).num_at_once == 3


def test_walltime_and_queue_come_from_the_profile():
    found = plan("preprocess", "summit")
    assert (found.queue, found.walltime_min) == ("batch", 120)  # bin 5: one node
    assert plan("preprocess", "summit", Demand(num_nodes=2, queue="killable", walltime_min=600)).walltime_min == 600
    with pytest.raises(ConfigError, match="at most 2:00"):
        plan("preprocess", "summit", Demand(num_nodes=2, walltime_min=600))


def test_a_laptop_without_sizes_works_in_this_process():
    assert plan_farm("embed", FarmDemand("laptop"), out=Path("x.h5"), one_a_gpu=True) is None


@pytest.mark.parametrize(
    ("machine", "demand", "message"),
    [
        ("laptop", Demand(num_racks=1), "has no racks"),
        ("summit", Demand(num_gpus=4), "jobs take whole nodes"),
        ("rhea", Demand(num_gpus=4), "take whole nodes"),
        ("slurm_cluster", Demand(num_nodes=40), "slurm_cluster has 4 nodes; 40 were asked for: take --nodes 4"),
        ("slurm_cluster", Demand(num_gpus=40), r"has 4 nodes \(32 GPUs\); 5 were asked for"),
        ("summit", Demand(num_racks=300), "summit has 256 racks; 300 were asked for: take --racks 256"),
        ("summit", Demand(num_nodes=4609), "summit has 4,608 nodes; 4,609 were asked for"),
    ],
)
def test_sizes_that_a_machine_does_not_have(machine, demand, message):
    with pytest.raises(ConfigError, match=message):
        plan("preprocess", machine, demand)


@pytest.mark.parametrize(("machine", "name"), [("laptop", "50%"), ("slurm_cluster", "%j"), ("summit", "100%J"), ("summit", "a$b"), ("summit", 'a"b')])
def test_paths_that_a_job_script_would_misread_are_refused(machine, name):
    with pytest.raises(ConfigError, match="job scripts would misread: choose another --out"):
        plan("preprocess", machine, out=Path("/data") / name / "corpus")


def script_with(*header_lines: str) -> list[str]:
    found = plan("preprocess", "slurm_cluster")
    return farm.preview(replace(found, machine=replace(found.machine, header_lines=header_lines)), "x").splitlines()


@pytest.mark.parametrize("line", ["#SBATCH -Z gpu", "#SBATCH", "#SBATCH ---x", "# SBATCH --x"])
def test_header_lines_that_submitit_cannot_take_are_refused(line):
    with pytest.raises(ConfigError, match="a farm takes lines of the form"):
        script_with(line)


@pytest.mark.parametrize(("machine", "starter"), [("slurm_cluster", "srun"), ("summit", "jsrun")])
def test_nothing_is_started_where_the_environment_cannot_be_prepared(tmp_path, machine, starter):
    (tmp_path / starter).write_text(f"#!/bin/bash\ntouch {tmp_path}/started\n")
    (tmp_path / starter).chmod(0o755)
    found = plan("preprocess", machine)
    codes = []
    for setup_line in ("true", "false | cat"):
        script = farm.preview(replace(found, folder=tmp_path, machine=replace(found.machine, setup_lines=(setup_line,))), "x")
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "LSB_JOBID": "1"}
        codes.append(subprocess.run(["bash"], input=script, env=environment, cwd=tmp_path, text=True, timeout=60, check=False).returncode)
        assert (tmp_path / "started").exists() == (setup_line == "true")
        (tmp_path / "started").unlink(missing_ok=True)
    assert codes == [0, 1]


def test_header_lines_of_slurm():
    script = script_with("#SBATCH --constraint='a&b'", "#SBATCH --overcommit", "#SBATCH -S 8")
    assert {"#SBATCH --constraint='a&b'", "#SBATCH --overcommit", "#SBATCH --core-spec=8"} <= set(script)
    with pytest.raises(ConfigError, match="once"):
        script_with("#SBATCH -C a", "#SBATCH --constraint=b")
