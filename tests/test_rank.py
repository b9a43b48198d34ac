"""A rank learns its place from whatever started it."""

from __future__ import annotations

import pytest

from prottrans_hpc import rank
from prottrans_hpc.errors import ConfigError

SRUN = {
    "SLURM_PROCID": "19",
    "SLURM_NTASKS": "24",
    "SLURM_STEP_NUM_TASKS": "22",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "3",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_TASKS_PER_NODE": "6(x3),4",
}
ENVIRONMENTS = {
    "processes": {
        "PROTTRANS_RANK": "3",
        "PROTTRANS_WORLD_SIZE": "4",
        "PROTTRANS_LOCAL_RANK": "1",
        "PROTTRANS_LOCAL_WORLD_SIZE": "2",
        "PROTTRANS_NODE_RANK": "1",
    },
    "horovodrun": {
        "HOROVOD_RANK": "3",
        "HOROVOD_SIZE": "4",
        "HOROVOD_LOCAL_RANK": "1",
        "HOROVOD_LOCAL_SIZE": "2",
        "HOROVOD_CROSS_RANK": "1",
        "HOROVOD_CROSS_SIZE": "2",
    },
    "torchrun": {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2"},
    "jsrun": {"JSM_NAMESPACE_RANK": "3", "JSM_NAMESPACE_SIZE": "4", "JSM_NAMESPACE_LOCAL_RANK": "1", "JSM_NAMESPACE_LOCAL_SIZE": "2"},
    "mpirun": {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
}

TORCHRUN = ENVIRONMENTS["torchrun"]


@pytest.mark.parametrize("starter", ENVIRONMENTS)
def test_every_starter_gives_the_same_place(starter):
    place = rank.detect({"HOME": "/root"} | ENVIRONMENTS[starter])
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (3, 4, 1, 2)
    assert (place.node_rank, place.num_nodes, place.starter) == (1, 2, starter)
    assert not place.is_main
    assert not place.is_node_main


def test_every_starter_but_srun_is_in_the_table_above():
    assert set(rank.STARTERS) == {*ENVIRONMENTS, "srun"}


def test_srun_with_uneven_nodes():
    place = rank.detect(SRUN)
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (19, 22, 1, 4)
    assert (place.node_rank, place.num_nodes, place.starter) == (3, 4, "srun")


def test_a_batch_script_under_slurm_is_no_rank():
    batch_shell = {name: value for name, value in SRUN.items() if not name.startswith("SLURM_STEP")}
    assert rank.detect(batch_shell).starter == "none"


def test_an_interactive_shell_of_an_allocation_is_one_rank():
    step = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"}
    place = rank.detect(SRUN | step | {"SLURM_STEP_TASKS_PER_NODE": "1"})
    assert (place.rank, place.world_size) == (0, 1)


def test_nothing_means_one_rank():
    place = rank.detect({"RANK": "3"})  # a stray variable is not a starter
    assert (place.rank, place.world_size, place.local_world_size, place.num_nodes, place.starter) == (0, 1, 1, 1, "none")
    assert place.is_main
    assert place.is_node_main


def test_our_own_processes_win_inside_a_batch_job():
    assert rank.detect(SRUN | ENVIRONMENTS["processes"]).starter == "processes"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "did not set LOCAL_RANK"),
        (TORCHRUN | {"RANK": "one"}, "RANK is 'one', not a number"),
        (TORCHRUN | {"RANK": "4"}, "contradict each other"),
        (TORCHRUN | {"RANK": "-1"}, "contradict each other"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "contradict each other"),
        (TORCHRUN | {"GROUP_RANK": "2"}, "contradict each other"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "0"}, "contradict each other"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "six"}, "not of the form"),
        (SRUN | {"SLURM_NODEID": "9"}, "tells of 4 nodes"),
        ({name: value for name, value in SRUN.items() if name != "SLURM_NODEID"}, "did not set SLURM_NODEID"),
    ],
)
def test_variables_that_make_no_sense_are_told(environment, said):
    with pytest.raises(ConfigError) as caught:
        rank.detect(environment)
    assert said in str(caught.value)
