"""Slurm's six functions: directives, and reading what its commands printed (recorded from 22.05). tests/cluster/ runs them for real."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from prottrans_hpc.errors import SubmitError
from prottrans_hpc.launch import slurm
from prottrans_hpc.launch.job import Job
from prottrans_hpc.launch.job_state import State
from prottrans_hpc.launch.starters import STARTERS
from prottrans_hpc.machine import Allocation, read_machine
from prottrans_hpc.run_dir import RunDir


def job(run_dir: str = "/data/runs/first", placement: str = "switches", **allocation: object) -> Job:
    machine = replace(read_machine("slurm_cluster"), nodes_per_rack=4, rack_placement=placement)
    values = {"walltime_min": 600, "queue": "gpu", **allocation}
    return Job("pretrain", "first", RunDir(Path(run_dir)), machine, Allocation(8, 8, 8, 1, **values), "/venv/bin/python")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("placement", "allocation", "expected"),
    [
        ("switches", {"num_racks": 2}, "#SBATCH --switches=2"),
        ("segment", {"num_racks": 2}, "#SBATCH --segment=4"),
        ("node_list", {"num_racks": 1, "node_names": ("n1", "n2", "n3", "n5", "login")}, "#SBATCH --nodelist=n[1-3],n5,login"),
    ],
)
def test_whole_racks_are_asked_for_as_the_machine_wants(placement: str, allocation: dict[str, object], expected: str) -> None:
    assert expected in slurm.render_header(job(placement=placement, **allocation))


@pytest.mark.parametrize("placement", ["switches", "segment", "node_list"])
def test_any_nodes_are_asked_for_without_a_place(placement: str) -> None:
    text = "\n".join(slurm.render_header(job(placement=placement)))
    assert not any(option in text for option in ("--switches", "--segment", "--nodelist"))


def test_percent_signs_and_quotes_in_paths_are_no_patterns() -> None:
    assert '#SBATCH --output="/data/50%% \\"of\\" %%j/logs/job.log"' in slurm.render_header(job('/data/50% "of" %j'))


@pytest.mark.parametrize(("walltime_min", "seconds"), [(600, 600), (20, 600), (12, 360), (1, 30)])
def test_the_warning_comes_before_the_end_and_not_in_the_first_half(walltime_min: int, seconds: int) -> None:
    assert f"#SBATCH --signal=B:USR1@{seconds}" in slurm.render_header(job(walltime_min=walltime_min))


def test_srun_is_told_everything_that_it_would_take_from_the_environment() -> None:
    argv = STARTERS["srun"].argv(job())
    assert argv[:5] == ["srun", "--export=ALL", "--nodes=8", "--ntasks=64", "--ntasks-per-node=8"]
    assert {"--cpus-per-task=8", "--kill-on-bad-exit=1"} <= set(argv)


@pytest.mark.parametrize(("output", "job_id"), [("17\n", "17"), ("17;cluster\n", "17"), (" 4294901760 \n", "4294901760")])
def test_job_ids(output: str, job_id: str) -> None:
    assert slurm.parse_job_id(output) == job_id


@pytest.mark.parametrize("output", ["", "Submitted batch job 17", "17\n18\n", "sbatch: 17", "17; rm -rf /"])
def test_what_is_no_job_id_is_refused(output: str) -> None:
    with pytest.raises(SubmitError, match="instead of a job id"):
        slurm.parse_job_id(output)


def test_states_as_squeue_prints_them() -> None:
    printed = "15|CANCELLED\n14|RUNNING\n16|COMPLETING\n18|NODE_FAIL\n19|SOMETHING_NEW\n20|OUT_OF_MEMORY\n"
    expected = {"15": State.CANCELLED, "14": State.RUNNING, "16": State.STOPPING, "18": State.NODE_LOST, "19": State.UNKNOWN, "20": State.OUT_OF_MEMORY}
    assert slurm.parse_states(printed) == expected
    assert slurm.parse_states("slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n") == {}
