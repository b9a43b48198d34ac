"""Whether a model fits, held against real tensors, and the way out when it does not."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from prottrans_hpc import architecture, config
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.launch import planner
from prottrans_hpc.launch.batch_arithmetic import plan_batches
from prottrans_hpc.launch.demand import Demand
from prottrans_hpc.launch.memory_fit import MemoryNeed, check_memory, memory_need, need_text
from prottrans_hpc.launch.memory_room import GIB, MARGIN, host_memory_gib, host_text, memory_gib, room_on
from prottrans_hpc.machine import Machine, read_machine
from prottrans_hpc.recipe import Recipe, read_recipe

V100 = {"name": "V100", "memory_gib": 16.0, "peak_tflops": {"fp32": 15.7}}


def need_of(recipe: Recipe, *, num_ranks: int = 1, on_gpu: bool = True) -> MemoryNeed:
    chosen = architecture.get(recipe.architecture.name)
    shape: Any = chosen.size(recipe.architecture.size).shape
    return memory_need(recipe, chosen, shape, plan_batches(recipe, num_ranks=num_ranks), on_gpu=on_gpu)


def machine(**node: Any) -> Machine:
    """A computer with one rank a node, unless the node has GPUs."""
    values = {"name": "m", "description": "", "scheduler": "local", "starter": "processes", "max_nodes": 5000}
    return config.parse(Machine, values | {"ranks_per_node": node.get("num_gpus", 1), "node": {"num_cpu_cores": 8} | node}, source="test")


@pytest.mark.parametrize("optimizer", ["lamb", "adamw", "adam", "adafactor"])
def test_weights_gradients_and_state_are_as_large_as_torch_makes_them(optimizer: str) -> None:
    import torch

    from prottrans_hpc.models import prot_bert
    from prottrans_hpc.train.optim import build_optimizer

    recipe = read_recipe("tiny_prot_bert", (f"optimizer.name={optimizer}",))
    shape: Any = architecture.get("prot_bert").size("tiny").shape
    model = prot_bert.build(shape)
    state = build_optimizer(model.named_parameters(), recipe.optimizer).state_dict()
    need = need_of(recipe)
    assert need.parameters == sum(parameter.nbytes for parameter in model.parameters())
    assert need.gradients == need.parameters
    held = sum(tensor.nbytes for name, tensor in state.items() if name != "num_updates")
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    assert held <= need.optimizer, "weights that are not trained are planned for, too"
    if optimizer == "adafactor":
        assert need.optimizer < trained / 10
    else:
        assert held == 2 * trained and need.optimizer == 2 * need.parameters
    assert isinstance(state["num_updates"], torch.Tensor)


GROUP = 12 * 2**26 / 420_984_864  # LAMB updates so many parameters at once


def test_what_is_updated_at_once_is_what_the_ranks_do() -> None:
    from prottrans_hpc.launch import memory_need
    from prottrans_hpc.train.lamb import GROUP_PARAMETERS

    assert memory_need._GROUP["lamb"] == GROUP_PARAMETERS


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ((), {}),
        (("precision=tf32",), {}),
        (("precision=bf16",), {"cast_weights": 2}),
        (("precision=fp16",), {"cast_weights": 2}),
        (("precision=fp16_o2",), {"parameters": 2, "gradients": 2, "masters": 4, "update": 4 + GROUP}),
        (("precision=bf16_o3",), {"parameters": 2, "gradients": 2, "update": 8 + GROUP}),
        (("optimizer.name=adamw",), {"update": 0}),
        (("optimizer.name=adam",), {"update": 0}),
        (("optimizer.name=adafactor",), {"update": 1, "optimizer": 0.2}),
    ],
)
def test_bytes_a_parameter(settings: tuple[str, ...], changes: dict[str, float]) -> None:
    need, count = need_of(read_recipe("prot_bert_bfd", settings), num_ranks=5616), 420_984_864
    expected: dict[str, float] = {"parameters": 4, "gradients": 4, "optimizer": 8, "cast_weights": 0, "masters": 0, "update": GROUP} | changes
    assert {name: getattr(need, name) / count for name in expected} == pytest.approx(expected)
    assert need.peak == need.fixed + max(need.cast_weights + need.activations, need.update)


def test_bf16_needs_about_half_the_activations() -> None:
    full, half = (need_of(read_recipe("prot_bert", (f"precision={precision}",)), num_ranks=64).activations for precision in ("fp32", "bf16"))
    assert 0.4 < half / full < 0.7


def test_a_save_of_half_weights_is_of_their_masters() -> None:
    needs = [need_of(read_recipe("prot_bert", (f"precision={name}",)), on_gpu=False).checkpoint / 420_984_864 for name in ("fp32", "fp16_o2", "fp16_o3")]
    assert needs == [12, 12, 10]


def test_a_kernel_on_the_cpu_updates_in_place() -> None:
    assert need_of(read_recipe("prot_bert"), on_gpu=False).update == 0


def test_a_save_is_written_from_a_copy_in_host_memory() -> None:
    from prottrans_hpc.train.saving import MAX_WRITERS

    recipe, state = read_recipe("prot_bert"), 12 * 420_984_864
    assert need_of(recipe, on_gpu=False).checkpoint == state
    assert need_of(recipe, num_ranks=4, on_gpu=False).checkpoint == state // 4
    assert need_of(recipe, num_ranks=1000, on_gpu=False).checkpoint == state // MAX_WRITERS
    assert need_of(recipe, num_ranks=4, on_gpu=True).checkpoint == 0


def test_more_ranks_need_less_until_a_sequence_fills_the_micro_batch() -> None:
    needs = [need_of(read_recipe("prot_bert_bfd"), num_ranks=ranks).activations for ranks in (96, 960, 5616, 50_000)]
    assert needs == sorted(needs, reverse=True)
    assert needs[0] > needs[-1] == need_of(read_recipe("prot_bert_bfd"), num_ranks=100_000).activations


def test_the_memory_of_a_rank() -> None:
    assert memory_gib(read_machine("summit"), 5616) == 16.0
    assert memory_gib(read_machine("rhea"), 16) == 128.0
    assert memory_gib(replace(read_machine("rhea"), ranks_per_node=4), 64) == 32.0
    assert memory_gib(read_machine("laptop"), 2) is None
    assert memory_gib(machine(host_memory_gib=96.0), 4) == 24.0, "local ranks share one computer, whatever their nodes are called"


def test_what_cannot_be_known_is_not_checked() -> None:
    recipe = read_recipe("prot_bert_bfd")
    chosen = architecture.get("prot_bert")
    assert check_memory(recipe, read_machine("laptop"), chosen, chosen.size("prot_bert_bfd").shape, plan_batches(recipe, num_ranks=1)) is None


def test_the_published_model_fits_the_published_machine_and_not_three_racks_of_it() -> None:
    summit, recipe = read_machine("summit"), read_recipe("prot_bert_bfd")
    planner.plan(recipe, summit, Demand(num_racks=52))
    with pytest.raises(ConfigError) as caught:
        planner.plan(recipe, summit, Demand(num_racks=3))
    message = str(caught.value)
    assert "activations 32.36" in message and "16.0 GiB, of which 10 % are kept free" in message
    offered = re.search(r"--set (loading\.bin_residues=(\d+))", message)
    assert offered
    planner.plan(read_recipe("prot_bert_bfd", (offered[1],)), summit, Demand(num_racks=3))
    with pytest.raises(ConfigError, match="does not fit"):
        planner.plan(read_recipe("prot_bert_bfd", (f"loading.bin_residues={int(offered[2]) + 256}",)), summit, Demand(num_racks=3))


def test_a_model_that_no_micro_batch_makes_fit() -> None:
    small = machine(num_gpus=4, gpu=V100 | {"memory_gib": 6.0})
    with pytest.raises(ConfigError) as caught:
        planner.plan(read_recipe("prot_bert_bfd"), small, Demand(num_nodes=4))
    assert "Smaller micro batches do not help: a sequence of 2048 residues alone needs" in str(caught.value)
    assert "precision=bf16" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        planner.plan(read_recipe("prot_bert_bfd", ("precision=bf16",)), machine(num_gpus=4, gpu=V100 | {"memory_gib": 6.0, "peak_tflops": {"bf16": 1.0}}))
    assert "precision=bf16" not in str(caught.value)


@pytest.mark.parametrize(("recipe", "changed"), [("prot_t5_xl_bfd", ("memory.recompute_every=1",)), ("protein_lm_3b", ("parallel.sharding=none",))])
def test_a_model_too_large_for_one_gpu_is_advised_to_be_cut_and_fits_then(recipe: str, changed: tuple[str, ...]) -> None:
    summit, racks = read_machine("summit"), Demand(num_racks=4)
    with pytest.raises(ConfigError, match=r"--set parallel\.sharding=full cuts the model over the 432 ranks"):
        planner.plan(read_recipe(recipe, changed[-1:] if "sharding" in changed[-1] else ()), summit, racks)
    planner.plan(read_recipe(recipe, (*changed, "parallel.sharding=full")), summit, racks)


def test_host_memory_is_shared_by_the_ranks_of_a_computer() -> None:
    roomy, recipe = machine(host_memory_gib=64.0), read_recipe("prot_bert", ("loading.bin_residues=4096",))
    planner.plan(recipe, roomy, Demand(num_nodes=3))
    with pytest.raises(ConfigError, match=r"a rank on m has 8\.0 GiB"):
        planner.plan(recipe, roomy, Demand(num_nodes=8))


def test_the_margin_is_kept_free() -> None:
    recipe = read_recipe("tiny_prot_bert")
    chosen = architecture.get("prot_bert")
    shape: Any = chosen.size("tiny").shape
    batches = plan_batches(recipe, num_ranks=1)
    exact = need_of(recipe, on_gpu=False).peak / GIB / (1.0 - MARGIN)
    assert check_memory(recipe, machine(host_memory_gib=exact * 1.001), chosen, shape, batches)
    with pytest.raises(ConfigError, match="does not fit"):
        check_memory(recipe, machine(host_memory_gib=exact * 0.999), chosen, shape, batches)


def test_what_large_model_support_moves_has_to_fit_the_node() -> None:
    summit, asked = read_machine("summit"), ("memory.lms_limit_gib=0", "loading.bin_residues=65536")
    assert host_memory_gib(summit, 5616) == pytest.approx(512 / 6)
    with pytest.raises(ConfigError) as caught:
        planner.plan(read_recipe("prot_bert_bfd", asked), summit, Demand(num_racks=1))
    message = str(caught.value)
    assert "GiB in host memory; 85.3 GiB are a rank's share of its node, as much of it kept free" in message
    offered = re.search(r"--set (loading\.bin_residues=(\d+))", message)
    assert offered
    planner.plan(read_recipe("prot_bert_bfd", (asked[0], offered[1])), summit, Demand(num_racks=1))
    roomier = replace(summit, node=replace(summit.node, host_memory_gib=2048.0))
    planner.plan(read_recipe("prot_bert_bfd", (asked[0], f"loading.bin_residues={2 * int(offered[2])}")), roomier, Demand(num_racks=1))


def test_a_state_that_no_host_holds_is_refused_with_a_way() -> None:
    summit, racks = read_machine("summit"), Demand(num_racks=52)
    small = replace(summit, node=replace(summit.node, host_memory_gib=16.0))
    asked = ("memory.optimizer_on=host", "optimizer.name=adamw")
    planner.plan(read_recipe("prot_bert_bfd", asked), summit, racks)
    with pytest.raises(ConfigError, match=r"alone needs 4\.7 GiB of host memory.*--set memory\.optimizer_on=device"):
        planner.plan(read_recipe("prot_bert_bfd", asked), small, racks)
    planner.plan(read_recipe("prot_bert_bfd", ("optimizer.name=adamw",)), small, racks)


def test_on_cpus_what_is_put_aside_stays_in_the_same_memory() -> None:
    need = MemoryNeed(parameters=GIB, gradients=0, optimizer=0, cast_weights=0, activations=GIB, update=0, moved=2 * GIB)
    held = [room_on(machine(host_memory_gib=gib), 1) for gib in (4.1 / 0.9, 3.9 / 0.9)]
    assert [room and room.holds(need) for room in held] == [True, False]
    assert host_text(need, machine(host_memory_gib=4.0), 1) == "", "there is no other memory"


def test_a_host_of_unknown_size_is_no_limit_and_that_is_said() -> None:
    unknown = machine(num_gpus=4, gpu=V100)
    room = room_on(unknown, 4)
    need = MemoryNeed(parameters=GIB, gradients=0, optimizer=0, cast_weights=0, activations=GIB, update=0, on_host=10_000 * GIB)
    assert room and room.holds(need)
    assert host_text(need, unknown, 4) == "10,000.0 GiB in host memory; the profile of m does not say how much there is: not checked"


def test_the_numbers_are_said() -> None:
    text = need_text(MemoryNeed(parameters=GIB, gradients=GIB, optimizer=2 * GIB, cast_weights=0, activations=GIB, update=3 * GIB))
    assert text == "a rank needs 7.0 GiB: parameters 1.00, gradients 1.00, optimizer 2.00, activations 1.00 (an update needs 3.00 in their place)"
