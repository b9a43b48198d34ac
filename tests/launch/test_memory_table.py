"""The policies side by side: which one fits, what each costs in time, and how sharded models share what they need."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prottrans_hpc import architecture, config
from prottrans_hpc.launch import cli, memory_table
from prottrans_hpc.launch.memory_cut import smallest_cut
from prottrans_hpc.launch.memory_need import MemoryNeed, Rank, need_of, own_parameters
from prottrans_hpc.launch.memory_policies import POLICIES
from prottrans_hpc.launch.memory_time import ASSUMED_HOST_BYTES_PER_S, HOST_UPDATE_S, NARROWING, MicroBatch, Speed, speed_of, time_factor
from prottrans_hpc.launch.recomputation import Tokens
from prottrans_hpc.machine import Machine, read_machine
from prottrans_hpc.parallel_layout import ParallelLayout
from prottrans_hpc.recipe import read_recipe

GPU = {"name": "V100", "memory_gib": 16.0, "peak_tflops": {"fp32": 15.7}}
TOKENS = Tokens([514] * 8)


def machine(memory_gib: float) -> Machine:
    values = {"name": "m", "description": "", "scheduler": "local", "starter": "processes", "max_nodes": 5000, "ranks_per_node": 4}
    node = {"num_cpu_cores": 8, "num_gpus": 4, "gpu": GPU | {"memory_gib": memory_gib}}
    return config.parse(Machine, values | {"node": node}, source="test")


def need_with(policy: str, recipe_name: str = "prot_bert_bfd") -> tuple[Any, MemoryNeed]:
    recipe = POLICIES[policy].of(read_recipe(recipe_name))
    record = architecture.get(recipe.architecture.name)
    shape = record.size(recipe.architecture.size).shape
    return recipe, need_of(recipe, record, shape, [TOKENS], Rank(True, ParallelLayout(1)))


def factor_of(policy: str, speed: Speed, *, num_micro_batches: int = 1) -> float:
    recipe, need = need_with(policy)
    record = architecture.get("prot_bert")
    return time_factor(recipe, record, record.size("prot_bert_bfd").shape, MicroBatch(TOKENS, num_micro_batches), need, speed)


def test_what_is_computed_again_is_a_third_of_a_step_at_most() -> None:
    counted = {name: factor_of(name, Speed(None)) for name in POLICIES}
    assert counted["none"] == counted["LMS"] == 1.0
    assert counted["every layer"] == pytest.approx(4 / 3, rel=0.01)
    assert counted["every 2nd layer"] == pytest.approx(1 + 1 / 6, rel=0.01)
    order = ["none", "attention and half", "attention and narrow", "attention", "every layer"]
    assert [counted[name] for name in order] == sorted(counted[name] for name in order)


def test_copies_cost_what_does_not_hide_behind_the_computation() -> None:
    recipe, need = need_with("LMS")
    record = architecture.get("prot_bert")
    step_s = record.flops(record.size("prot_bert_bfd").shape, TOKENS.lengths) / 1e13
    assert need.moved > 2**30
    assert factor_of("LMS", Speed(1e13, 1e13)) == pytest.approx(1.0)
    slow = 1.5 * need.moved / step_s  # a copy takes two thirds of a step: twice the forward pass, and just the backward pass
    assert factor_of("LMS", Speed(1e13, slow)) == pytest.approx(4 / 3, rel=0.01)
    assert recipe.memory.lms_limit_gib == 0.0


def test_an_update_on_the_host_is_shared_by_the_micro_batches_of_a_step() -> None:
    once, often = (factor_of("host optimizer", Speed(1e13), num_micro_batches=number) for number in (1, 100))
    assert 1.0 < often < 1.01 < once
    assert (once - 1.0) / (often - 1.0) == pytest.approx(100)


def test_link_and_rate_of_a_machine_are_those_of_its_profile() -> None:
    summit = speed_of(read_machine("summit").node.gpu, "fp16_o2")
    assert (summit.flops_per_s, summit.host_bytes_per_s) == (5.8e12, 50e9) and "was seen to reach" in summit.source
    unseen = speed_of(machine(16).node.gpu, "fp32")
    assert (unseen.flops_per_s, unseen.host_bytes_per_s) == (pytest.approx(15.7e12 * 0.3), ASSUMED_HOST_BYTES_PER_S) and "a guess" in unseen.source
    assert speed_of(None, "fp32").flops_per_s is None


def test_what_is_called_measured_is_what_the_benchmarks_found() -> None:
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    policies, lamb = (json.loads((results / name).read_text()) for name in ("memory_policies.json", "lamb.json"))
    found = next(row["time_ratio"] for row in policies["rows"] if row["policy"] == "saved in bf16")
    assert pytest.approx(found - 1.0, abs=0.0015) == NARROWING
    seconds = {name: took / lamb["parameters"] for name, took in lamb["2 threads"]["seconds"].items()}
    assert HOST_UPDATE_S["lamb"] == pytest.approx(seconds["prottrans_hpc, C kernel, with clipping"], rel=0.01)
    assert HOST_UPDATE_S["adamw"] == pytest.approx(seconds["torch.optim.AdamW, fused"], rel=0.01)


def test_host_memory_decides_which_policy_fits() -> None:
    recipe = read_recipe("prot_bert_bfd", ("loading.bin_residues=8192",))
    fits = {}
    for host_gib in (None, 512.0, 4.0):
        own = machine(16.0)
        rows = memory_table.planned_rows(recipe, replace(own, node=replace(own.node, host_memory_gib=host_gib)), num_ranks=4)
        fits[host_gib] = {row.name: row.fits for row in rows}
    assert fits[None] == fits[512.0] and fits[None]["LMS"] and fits[None]["every layer"]
    assert fits[4.0]["every layer"] and not fits[4.0]["LMS"] and not fits[4.0]["every layer, host optimizer"]


def test_the_policy_that_fits_at_the_least_time_is_named() -> None:
    recipe = read_recipe("prot_bert_bfd", ("loading.bin_residues=8192",))
    found = {}
    for memory_gib in (80.0, 16.0, 7.0, 1.0):
        rows = memory_table.planned_rows(recipe, machine(memory_gib), num_ranks=4)
        best = memory_table.chosen(rows)
        found[memory_gib] = best.name if best else None
        fitting = [row for row in rows if row.need.peak <= 0.9 * memory_gib * 2**30]
        assert [row.name for row in rows if row.fits] == [row.name for row in fitting]
        if best:
            assert best.factor == min(row.factor for row in fitting)
    assert found[80.0] == "none"
    assert found[16.0] not in ("none", None)
    assert found[7.0] is not None and "host optimizer" in found[7.0]
    assert found[1.0] is None
    assert "nothing fits" in memory_table.verdict(rows, recipe, machine(1.0), 4)


def test_where_nothing_fits_the_smallest_cut_that_does_is_named() -> None:
    recipe, frontier = read_recipe("prot_t5_xxl_u50"), read_machine("frontier")
    found = smallest_cut(recipe, frontier, 64)
    assert found is not None and found.num_ranks == 2 and found.policy.memory.saved == "as_is"
    said = memory_table.verdict(memory_table.planned_rows(recipe, frontier, num_ranks=64), recipe, frontier, 64)
    assert "nothing fits" in said and "Cut over 2 ranks a copy it fits" in said
    cut = read_recipe("prot_t5_xxl_u50", found.settings)
    assert all(f"--set {setting}" in said for setting in found.settings)
    own = next(row for row in memory_table.planned_rows(cut, frontier, num_ranks=64) if row.policy.memory == cut.memory)
    assert own.fits and own.need.peak == found.peak
    assert smallest_cut(recipe, frontier, 1) is smallest_cut(cut, frontier, 64) is None, "one rank has nobody to share with, and what is cut is cut"
    small = replace(frontier, node=replace(frontier.node, gpu=replace(frontier.node.gpu, memory_gib=8.0)))
    further = smallest_cut(recipe, small, 64)
    assert further is not None and further.num_ranks > 2


def test_shards_share_everything_and_tensor_groups_the_layers() -> None:
    record = architecture.get("prot_t5")
    shape: Any = record.size("prot_t5_xl_bfd").shape
    whole = record.num_parameters(shape)
    assert own_parameters(record, shape, ParallelLayout(4)) == whole
    assert own_parameters(record, shape, ParallelLayout(1, num_shards=8)) == pytest.approx(whole / 8, rel=1e-6)
    by_tensor = own_parameters(record, shape, ParallelLayout(1, num_tensor=8))
    assert whole / 8 < by_tensor < 1.01 * whole / 8, "its tables and norms are whole"
    recipe = read_recipe("prot_t5_xl_bfd")
    needs = [need_of(recipe, record, shape, [TOKENS], Rank(True, layout)) for layout in (ParallelLayout(8), ParallelLayout(1, 8), ParallelLayout(1, 1, 8))]
    assert needs[1].fixed == pytest.approx(needs[0].fixed / 8, rel=0.01) and needs[1].activations == needs[0].activations
    assert 0 < needs[1].gathered < needs[0].parameters / 4
    assert 0.2 * needs[0].activations < needs[2].activations < 0.6 * needs[0].activations
    assert needs[2].gathered == needs[0].gathered == 0


@pytest.mark.parametrize("name", ["prot_bert", "prot_txl", "prot_xlnet"])
def test_tensors_that_a_rank_holds_are_as_many_as_counted(name: str) -> None:
    """Held against the modules: what the record says is cut is what layers have."""
    import torch

    from prottrans_hpc.stage import find

    record = architecture.get(name)
    shape = record.size("small").shape
    with torch.device("meta"):
        module = find(record.build)(shape)
    split = record.tensor_parallel.split if record.tensor_parallel else {}
    own = 0.0
    for name, parameter in module.named_parameters():
        owner, kind = ["", *name.split(".")][-2:]
        is_cut = f"{owner}.{kind}".lstrip(".") in split or (owner in split and (kind == "weight" or split[owner] == "column"))
        own += parameter.numel() / (4 if is_cut else 1)
    assert own_parameters(record, shape, ParallelLayout(1, num_tensor=4)) == pytest.approx(own, rel=0.01)


def test_the_recipes_own_policy_is_among_them_and_cut_weights_leave_none_out() -> None:
    own = memory_table.policies_of(read_recipe("prot_bert", ("memory.recompute_every=3",)))
    assert own[memory_table.OWN].settings == ("memory.recompute_every=3",)
    assert memory_table.OWN not in memory_table.policies_of(read_recipe("prot_bert", ("memory.recompute_every=1",)))
    cut = memory_table.policies_of(read_recipe("prot_bert", ("parallel.sharding=full",)))
    assert cut.keys() == POLICIES.keys()


def test_settings_are_those_that_a_recipe_understands() -> None:
    for policy in POLICIES.values():
        assert read_recipe("prot_bert", policy.settings).memory == policy.memory


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["memory", *arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_the_verb_prints_a_line_a_policy_and_what_to_take(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "prot_bert_bfd", "--machine", "summit", "--racks", "3")
    assert code == 0
    assert all(any(line.startswith(name) for line in out.splitlines()) for name in POLICIES)
    assert "324 ranks of summit" in out and "at the least predicted time: 'LMS'" in out and "--set memory.lms_limit_gib=0" in out


def test_json_has_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "prot_txl_bfd", "--machine", "summit", "--racks", "52", "--json")
    found = json.loads(out)
    assert code == 0 and found["chosen"] == "none" and found["num_ranks"] == 5616 and found["parameters"] == 562_363_932
    plain = next(policy for policy in found["policies"] if policy["name"] == "none")
    assert plain["need"]["peak"] > plain["need"]["parameters"] and plain["fits"] is True and plain["measured"] is None


def test_without_torch_the_prediction_stands_alone_and_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    code, out, err = run(capsys, "tiny_prot_bert", "--measure")
    assert code == 0 and "every layer" in out and "measured" not in out.splitlines()[1]
    assert "torch is not installed here" in err and "predictions alone" in err


def test_measured_peaks_stand_beside_the_predicted_ones(capsys: pytest.CaptureFixture[str], small_corpus: Any) -> None:
    code, out, _ = run(capsys, "tiny_prot_bert", "--measure", "--corpus", str(small_corpus), "--set", "loading.bin_residues=600", "--json", "-q")
    found = json.loads(out)
    assert code == 0
    for policy in found["policies"]:
        assert policy["need"]["peak"] == pytest.approx(policy["measured"]["peak"], rel=0.1), policy["name"]
        assert policy["measured"]["step_s"] > 0.0


def test_a_row_without_room_is_a_no() -> None:
    rows = memory_table.planned_rows(read_recipe("prot_bert"), machine(16.0), num_ranks=4)
    lines = list(memory_table.describe([replace(row, fits=False) for row in rows]))
    assert len(lines) == 1 + len(rows) and all(" no " in line for line in lines[1:])
