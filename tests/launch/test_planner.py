"""Recipe + machine + nodes -> Allocation, or an error that says what works."""

from __future__ import annotations

from typing import Any

import pytest

from prottrans_hpc import config
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.launch import planner
from prottrans_hpc.machine import Machine, read_machine
from prottrans_hpc.recipe import read_recipe

GPU_NODE = {"num_cpu_cores": 32, "num_gpus": 4, "gpu": {"name": "V100", "memory_gib": 16.0, "peak_tflops": {"fp32": 15.7}}}


def machine(**changes: Any) -> Machine:
    values = {"name": "m", "description": "", "scheduler": "local", "starter": "processes", "ranks_per_node": 1, "max_nodes": 8, "node": {"num_cpu_cores": 8}}
    return config.parse(Machine, values | changes, source="test")


@pytest.mark.parametrize(("nodes", "ranks_per_node", "cores"), [(1, 1, 8), (2, 1, 4), (3, 1, 2), (2, 2, 2), (8, 2, 1)])
def test_local_nodes_share_the_cores_of_one_computer(nodes: int, ranks_per_node: int, cores: int) -> None:
    allocation = planner.plan(read_recipe("tiny_prot_bert"), machine(ranks_per_node=ranks_per_node), num_nodes=nodes)
    assert (allocation.num_ranks, allocation.cpu_cores_per_rank, allocation.gpus_per_rank) == (nodes * ranks_per_node, cores, 0)


def test_the_laptop_takes_the_cores_that_there_are() -> None:
    assert planner.plan(read_recipe("tiny_prot_bert"), read_machine("laptop"), num_nodes=1).cpu_cores_per_rank >= 1


@pytest.mark.parametrize("nodes", [0, 9])
def test_nodes_out_of_range_are_refused_with_the_range(nodes: int) -> None:
    with pytest.raises(ConfigError, match=f"1 to 8 nodes; {nodes} were"):
        planner.plan(read_recipe("tiny_prot_bert"), machine(), num_nodes=nodes)


def test_a_gpu_a_rank() -> None:
    allocation = planner.plan(read_recipe("tiny_prot_bert"), machine(node=GPU_NODE, ranks_per_node=4), num_nodes=1)
    assert (allocation.gpus_per_rank, allocation.cpu_cores_per_rank) == (1, 8)


def test_idle_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match="4 GPUs and 2 ranks"):
        planner.plan(read_recipe("tiny_prot_bert"), machine(node=GPU_NODE, ranks_per_node=2), num_nodes=1)


def test_a_precision_that_the_gpu_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not support bf16, only fp32"):
        planner.plan(read_recipe("tiny_prot_bert", ("precision=bf16",)), machine(node=GPU_NODE, ranks_per_node=4), num_nodes=1)


def test_bf16_works_on_any_cpu() -> None:
    planner.plan(read_recipe("tiny_prot_bert", ("precision=bf16",)), machine(), num_nodes=1)


def test_no_starter_is_one_rank() -> None:
    assert planner.plan(read_recipe("tiny_prot_bert"), machine(starter="none"), num_nodes=1).num_ranks == 1
    with pytest.raises(ConfigError, match="starts one rank"):
        planner.plan(read_recipe("tiny_prot_bert"), machine(starter="none"), num_nodes=2)


@pytest.mark.parametrize(("starter", "works"), [("mpirun", True), ("torchrun", False), ("processes", False)])
def test_horovod_wants_mpirun(starter: str, works: bool) -> None:
    recipe = read_recipe("tiny_prot_bert", ("parallel.comm=horovod",))
    if works:
        planner.plan(recipe, machine(starter=starter), num_nodes=2)
    else:
        with pytest.raises(ConfigError, match="starter = 'mpirun'"):
            planner.plan(recipe, machine(starter=starter), num_nodes=2)


def test_what_may_surprise_is_said() -> None:
    recipe = read_recipe("tiny_prot_bert", ("phases.0.global_batch_size=4",))
    crowded = machine(ranks_per_node=5, max_nodes=2)
    said = planner.remarks(recipe, crowded, planner.plan(recipe, crowded, num_nodes=2))
    assert any("10 ranks share 8 CPU cores" in line for line in said)
    assert any("10 ranks share steps of 4 sequences" in line for line in said)
    assert planner.remarks(read_recipe("tiny_prot_bert"), machine(), planner.plan(recipe, machine(), num_nodes=1)) == []
