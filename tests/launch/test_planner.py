"""Recipe + machine + nodes -> Allocation, or an error that says what works."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from prottrans_hpc import config
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.launch import planner
from prottrans_hpc.launch.demand import Demand
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


def test_the_published_run_comes_out() -> None:
    """Elnaggar et al. 2021: 936 nodes = 52 racks, 5,616 GPUs; 24 hours is the longest that Summit's bin 2 allows."""
    for demand in (Demand(num_racks=52), Demand(num_nodes=936), Demand(num_gpus=5616)):
        allocation = planner.plan(read_recipe("prot_bert_bfd"), read_machine("summit"), demand)
        assert (allocation.num_nodes, allocation.num_racks, allocation.num_ranks) == (936, 52, 5616)
        assert (allocation.queue, allocation.walltime_min, allocation.gpus_per_rank, allocation.cpu_cores_per_rank) == ("batch", 1440, 1, 7)


@pytest.mark.parametrize(("racks", "works"), [(1, True), (52, True), (53, True), (54, False), (256, False)])
def test_a_licence_ends_at_its_number_of_nodes(racks: int, works: bool) -> None:
    summit = read_machine("summit")
    planner.plan(read_recipe("tiny_prot_bert"), summit, Demand(num_racks=racks))
    recipe = read_recipe("tiny_prot_bert", ("parallel.comm=horovod",))
    if works:
        assert planner.plan(recipe, summit, Demand(num_racks=racks)).num_racks == racks
    else:
        with pytest.raises(ConfigError, match=r"IBM DDL on summit, whose licence ends at 954 nodes \(53 racks\)"):
            planner.plan(recipe, summit, Demand(num_racks=racks))


def test_bf16_is_refused_on_a_v100() -> None:
    with pytest.raises(ConfigError, match=r"V100.* of summit does not support bf16, only fp32, fp16"):
        planner.plan(read_recipe("tiny_prot_bert", ("precision=bf16",)), read_machine("summit"), Demand(num_racks=52))


@pytest.mark.parametrize("name", config.shipped_names("hpc"))
def test_every_shipped_machine_runs_the_tiny_recipe(name: str) -> None:
    machine = read_machine(name)
    demand = Demand(num_racks=1) if machine.rack_placement != "none" else Demand()
    allocation = planner.plan(read_recipe("tiny_prot_bert"), machine, demand)
    assert allocation.num_ranks == allocation.num_nodes * machine.ranks_per_node
    assert (allocation.walltime_min is None) == (machine.scheduler == "local")


def test_a_farm_needs_no_recipe() -> None:
    allocation = planner.allocate(read_machine("rhea"), Demand(num_nodes=2, walltime_min=90))
    assert (allocation.num_nodes, allocation.walltime_min, allocation.cpu_cores_per_rank) == (2, 90, 16)


@pytest.mark.parametrize(
    ("demand", "said"),
    [
        (Demand(walltime_min=60), "--walltime is for batch systems; laptop has none"),
        (Demand(queue="batch"), "--queue is for batch systems"),
        (Demand(walltime_min=60, queue="batch"), "--walltime and --queue are for"),
    ],
)
def test_a_laptop_has_no_queues(demand: Demand, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        planner.plan(read_recipe("tiny_prot_bert"), read_machine("laptop"), demand)


def test_torchrun_starts_the_ranks_of_one_node() -> None:
    cluster = dataclasses.replace(read_machine("slurm_cluster"), starter="torchrun")
    assert planner.plan(read_recipe("tiny_prot_bert"), cluster, Demand(num_nodes=1)).num_ranks == 8
    with pytest.raises(ConfigError, match="srun or mpirun"):
        planner.plan(read_recipe("tiny_prot_bert"), cluster, Demand(num_nodes=2))


@pytest.mark.parametrize(("machine", "account", "said"), [("summit", None, "--account PROJECT"), ("summit", "", "--account"), ("laptop", "A", "has none")])
def test_accounts(machine: str, account: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        planner.check_account(read_machine(machine), account)


def test_accounts_that_fit() -> None:
    for machine, account in (("summit", "ABC123"), ("slurm_cluster", None), ("slurm_cluster", "group"), ("laptop", None)):
        planner.check_account(read_machine(machine), account)


def test_what_a_site_may_do_is_said() -> None:
    recipe, summit = read_recipe("tiny_prot_bert"), read_machine("summit")
    said = planner.remarks(recipe, summit, planner.plan(recipe, summit, Demand(num_racks=1, queue="killable")))
    assert any("exists no more" in line for line in said) and any("killable may be stopped and requeued after 120 minutes" in line for line in said)


def test_horovod_under_srun_depends_on_the_site() -> None:
    recipe, cluster = read_recipe("tiny_prot_bert", ("parallel.comm=horovod",)), read_machine("slurm_cluster")
    said = planner.remarks(recipe, cluster, planner.plan(recipe, cluster, Demand(num_nodes=2)))
    assert any("MpiDefault" in line for line in said)
    assert not any("MpiDefault" in line for line in planner.remarks(read_recipe("tiny_prot_bert"), cluster, planner.allocate(cluster, Demand())))
