"""Nodes that a job must not get: how they are named, what the schedulers are told, and what a history proposes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prottrans_hpc import errors
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.launch import cli, exclusion, lsf, slurm
from prottrans_hpc.launch.demand import Demand
from prottrans_hpc.launch.job import Job
from prottrans_hpc.launch.planner import allocate
from prottrans_hpc.machine import Machine, read_machine
from prottrans_hpc.run_dir import RunDir, read_run

SLOW = {"event": "slow node", "step": 60, "node": 3, "ranks": [7], "factor": 1.6}


def job(machine: str, excluded: tuple[str, ...], **demand: Any) -> Job:
    profile = read_machine(machine)
    allocation = replace(allocate(profile, Demand(**demand)), excluded_nodes=excluded)
    return Job("pretrain", "first", RunDir(Path("/data/runs/first")), profile, allocation, "/venv/bin/python")


def write_history(folder: Path, *events: dict[str, Any]) -> RunDir:
    folder.mkdir(exist_ok=True)
    directory = RunDir(folder)
    directory.history.write_text("".join(json.dumps(event) + "\n" for event in events))
    return directory


@pytest.mark.parametrize(
    ("text", "nodes"), [("n3", ("n3",)), ("n[1-3],n7,n2", ("n1", "n2", "n3", "n7")), ("h36n08,e01n02", ("h36n08", "e01n02")), ("none", ())]
)
def test_nodes_are_named_as_slurm_names_them(text: str, nodes: tuple[str, ...]) -> None:
    assert exclusion.parse_nodes(text) == nodes


@pytest.mark.parametrize("text", ["", "n1;id", "n[1-", "-x", "n1'", "n 1"])
def test_what_is_no_node_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        exclusion.parse_nodes(text or ",")


def test_schedulers_are_told() -> None:
    assert "#SBATCH --exclude=n[1-2],n7" in slurm.render_header(job("slurm_cluster", ("n1", "n2", "n7"), num_nodes=2))
    assert not any("--exclude=" in line for line in slurm.render_header(job("slurm_cluster", (), num_nodes=2)))
    easy = lsf.render_header(job("summit", ("h36n08", "e01n02"), num_nodes=2, partial_rack=True))
    assert "#BSUB -R \"select[hname!='h36n08' && hname!='e01n02']\"" in easy
    (expert,) = [line for line in lsf.render_header(job("summit", ("h36n08",), num_racks=2)) if line.startswith("#BSUB -R")]
    assert "select[((CN)&&(type==any)&&(hname!='h36n08'))]" in expert
    assert "select[((LN)&&(type==any))]" in expert  # launch nodes have other names


@pytest.fixture
def machine() -> Machine:
    return replace(read_machine("slurm_cluster"), max_nodes=8)


def test_one_computer_and_too_few_nodes_are_refused(machine: Machine, tmp_path: Path) -> None:
    laptop = read_machine("laptop")
    with pytest.raises(ConfigError, match="no other node to take"):
        exclusion.leave_out(laptop, allocate(laptop, Demand(num_nodes=2)), ("n1",), RunDir(tmp_path))
    allocation = replace(allocate(machine, Demand(num_nodes=2)), num_nodes=6)
    with pytest.raises(ConfigError, match=r"without n\[1-3\] \(3\) 5 are left, and 6 were asked for"):
        exclusion.leave_out(machine, allocation, ("n1", "n2", "n3"), RunDir(tmp_path))
    assert exclusion.leave_out(machine, allocation, ("n1", "n2"), RunDir(tmp_path)).excluded_nodes == ("n1", "n2")


def test_a_history_proposes_what_is_slow_still_and_the_profile_decides(machine: Machine, tmp_path: Path) -> None:
    recovered = {**SLOW, "event": "node recovered", "host": "n2.site.org"}
    slow = [{**SLOW, "host": f"{name}.site.org"} for name in ("n1", "n2", "n3")]
    directory = write_history(tmp_path / "run", {"event": "start", "step": 0}, *slow, recovered, {**SLOW, "host": "n1.site.org"})
    assert exclusion.slow_nodes(directory) == ["n3", "n1"]
    allocation = replace(allocate(machine, Demand(num_nodes=2)), num_nodes=6)
    assert exclusion.leave_out(machine, allocation, (), directory).excluded_nodes == ()
    asked = replace(machine, exclude_slow_nodes=True)
    assert exclusion.leave_out(asked, allocation, ("n5",), directory).excluded_nodes == ("n5", "n1")  # eight nodes, six wanted
    assert exclusion.leave_out(asked, replace(allocation, num_nodes=8), (), directory).excluded_nodes == ()


def test_a_resume_leaves_nodes_out_until_told_otherwise(runs_folder: Any, fake_slurm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    directory = runs_folder.make("run", machine="slurm_cluster", nodes=2, job_ids=("1",))
    fake_slurm.says()
    assert cli.main(["runs", "resume", "run", "--exclude", "n3,n4"]) == 0
    assert "without n[3-4]" in capsys.readouterr().err
    assert "#SBATCH --exclude=n[3-4]" in directory.job_script.read_text()
    assert read_run(directory).allocation.excluded_nodes == ("n3", "n4")
    for more in ((), ("--walltime", "0:30")):
        assert cli.main(["runs", "resume", "run", "--dry-run", *more]) == 0
        assert "#SBATCH --exclude=n[3-4]" in capsys.readouterr().out
    assert cli.main(["runs", "resume", "run", "--dry-run", "--exclude", "none"]) == 0
    assert "--exclude" not in capsys.readouterr().out
    assert cli.main(["runs", "resume", "run", "--exclude", "n3;id"]) == errors.USAGE


def test_a_first_start_may_leave_nodes_out_too(small_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--corpus", str(small_corpus), "--run-dir", str(tmp_path / "run"), "--dry-run"]
    assert cli.main(["pretrain", "tiny_prot_bert", *where, "--machine", "slurm_cluster", "--nodes", "2", "--exclude", "n[1-2]"]) == 0
    assert "#SBATCH --exclude=n[1-2]" in capsys.readouterr().out
    assert cli.main(["pretrain", "tiny_prot_bert", *where, "--exclude", "n1"]) == errors.USAGE
    assert "no other node to take" in capsys.readouterr().err
