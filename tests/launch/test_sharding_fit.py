"""Sharded and tensor-parallel layouts that a machine and a model have room for, and what is said about others."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re

import pytest

from prottrans_hpc import architecture
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.launch import cli
from prottrans_hpc.launch.batch_arithmetic import plan_batches
from prottrans_hpc.launch.planner import plan
from prottrans_hpc.launch.sharding_fit import check_sharding, layout_text
from prottrans_hpc.machine import Machine, read_machine
from prottrans_hpc.parallel_layout import ParallelLayout
from prottrans_hpc.precision_levels import LEVELS
from prottrans_hpc.recipe import Recipe, read_recipe


def _checked(recipe: Recipe, machine: Machine, num_ranks: int) -> ParallelLayout:
    chosen = architecture.get(recipe.architecture.name)
    return check_sharding(recipe, machine, chosen, chosen.size(recipe.architecture.size).shape, num_ranks=num_ranks)


@pytest.mark.parametrize(
    ("recipe", "machine", "settings", "num_ranks", "expected"),
    [
        # The degrees of the paper: 8-way for the 3-billion model, 32-way for the one with 11 billion.
        ("prot_t5_xl_u50", "nvl72", ("tensor_ranks=8", "tensor_within=rack"), 64, ParallelLayout(8, 1, 8)),
        ("prot_t5_xxl_u50", "nvl72", ("tensor_ranks=8", "tensor_within=rack", "sharding=hybrid", "shard_ranks=9"), 144, ParallelLayout(2, 9, 8)),
        ("prot_t5_xxl_u50", "frontier", ("tensor_ranks=32", "tensor_within=machine"), 256, ParallelLayout(8, 1, 32)),
        ("prot_bert_bfd", "summit", ("sharding=hybrid",), 108, ParallelLayout(18, 6)),
        ("prot_bert_bfd", "summit", ("sharding=hybrid", "shard_ranks=54"), 108, ParallelLayout(2, 54)),
        ("prot_bert_bfd", "summit", ("sharding=full", "tensor_ranks=2"), 108, ParallelLayout(1, 54, 2)),
        ("tiny_prot_bert", "laptop", ("sharding=full", "tensor_ranks=2"), 4, ParallelLayout(1, 2, 2)),
        ("prot_txl", "nvl72", ("tensor_ranks=4",), 64, ParallelLayout(16, 1, 4)),
        ("prot_txl_bfd", "summit", ("tensor_ranks=2",), 108, ParallelLayout(54, 1, 2)),
        ("prot_xlnet", "frontier", ("sharding=hybrid", "tensor_ranks=8"), 64, ParallelLayout(8, 1, 8)),
    ],
)
def test_layouts_that_fit(recipe: str, machine: str, settings: tuple[str, ...], num_ranks: int, expected: ParallelLayout) -> None:
    settings = ("precision=fp32", *(f"parallel.{setting}" for setting in settings))
    assert _checked(read_recipe(recipe, settings), read_machine(machine), num_ranks) == expected


@pytest.mark.parametrize("precision", LEVELS)
def test_every_precision_can_be_cut(precision: str) -> None:
    settings = (f"precision={precision}", "parallel.sharding=full", "parallel.tensor_ranks=2")
    assert _checked(read_recipe("tiny_prot_bert", settings), read_machine("laptop"), 4) == ParallelLayout(1, 2, 2)


@pytest.mark.parametrize(
    ("recipe", "machine", "settings", "num_ranks", "said"),
    [
        (
            "prot_bert_bfd",
            "summit",
            ("parallel.tensor_ranks=4",),
            24,
            "nearest that would do, for the model too: 2; or let a group reach further: --set parallel.tensor_within=machine",
        ),
        ("prot_bert_bfd", "summit", ("parallel.tensor_ranks=3",), 24, "does not divide num_heads 16, intermediate_size 4,096 of prot_bert"),
        (
            "prot_bert_bfd",
            "summit",
            ("parallel.tensor_ranks=24", "parallel.tensor_within=rack"),
            108,
            "Possible are 1, 2, 4, 8, 16; on 108 ranks of summit 2 would do",
        ),
        ("prot_bert_bfd", "summit", ("parallel.sharding=hybrid", "parallel.shard_ranks=24"), 48, "shard_ranks that do are 18 and 36"),
        ("prot_bert_bfd", "summit", ("parallel.sharding=hybrid", "parallel.shard_ranks=12"), 42, "take 6 or 8 nodes of 6 ranks"),
        ("tiny_prot_bert", "laptop", ("parallel.tensor_ranks=2",), 3, "take 2 or 4 ranks"),
        ("tiny_prot_bert", "laptop", ("parallel.sharding=hybrid", "parallel.shard_ranks=4"), 6, "shard_ranks that do are 3 and 6"),
        ("tiny_prot_electra", "laptop", ("parallel.tensor_ranks=4",), 4, "generator.num_heads 2 of prot_electra"),
        ("prot_txl_bfd", "nvl72", ("parallel.tensor_ranks=4",), 64, "does not divide num_heads 14 of prot_txl"),
        ("prot_txl_bfd", "nvl72", ("parallel.tensor_ranks=4",), 64, "Possible are 1, 2; on 64 ranks of nvl72 2 would do"),
        ("prot_xlnet", "summit", ("parallel.tensor_ranks=6",), 108, "1, 2, 4, 8, 16; on 108 ranks of summit 2 would do"),
    ],
)
def test_what_cannot_be_is_answered_with_what_can(recipe: str, machine: str, settings: tuple[str, ...], num_ranks: int, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        _checked(read_recipe(recipe, settings), read_machine(machine), num_ranks)
    assert said in str(error.value)


WISHES = [*itertools.product(("prot_t5_xl_bfd", "prot_t5_xxl_bfd", "prot_txl_bfd"), (3, 4, 6, 8, 12), ("node", "rack"))]


@pytest.mark.parametrize(("recipe", "tensor", "within"), WISHES)
def test_advice_about_tensor_groups_never_goes_in_a_circle(recipe: str, tensor: int, within: str) -> None:
    """Every size and setting that a refusal names is accepted; TXL-BFD's 14 heads and Summit's six ranks a node leave 2 alone."""
    summit, wish = read_machine("summit"), (f"parallel.tensor_ranks={tensor}", f"parallel.tensor_within={within}")
    with pytest.raises(ConfigError) as error:
        _checked(read_recipe(recipe, wish), summit, 1728)
    said = str(error.value)
    sizes = re.search(r"for the model too: ([\d, and]+)|ranks of summit ([\d, and]+) would do", said)
    assert sizes, said
    for size in re.findall(r"\d+", sizes[1] or sizes[2]):
        assert _checked(read_recipe(recipe, (f"parallel.tensor_ranks={size}", wish[1])), summit, 1728).num_tensor == int(size)
    if wider := re.search(r"--set (parallel\.tensor_within=\w+)", said):
        assert _checked(read_recipe(recipe, (wish[0], wider[1])), summit, 1728).num_tensor == tensor


def test_where_no_size_has_room_near_by_that_is_said_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"none of them but 1 has room on 7 ranks of laptop"):
        _checked(read_recipe("prot_txl_bfd", ("precision=fp32", "parallel.tensor_ranks=4")), read_machine("laptop"), 7)
    lonely = dataclasses.replace(read_machine("summit"), ranks_per_node=1)
    wish = ("parallel.tensor_ranks=2",)
    with pytest.raises(ConfigError, match=r"no size that the model can have does \(2 and 4 .*--set parallel\.tensor_within=rack"):
        _checked(read_recipe("prot_bert_bfd", wish), lonely, 108)
    assert _checked(read_recipe("prot_bert_bfd", (*wish, "parallel.tensor_within=rack")), lonely, 108).num_tensor == 2


def test_whole_racks_are_answered_with_whole_racks() -> None:
    wish = ("parallel.tensor_ranks=32", "parallel.tensor_within=machine")
    with pytest.raises(ConfigError, match=r"take 864 or 1,008 nodes of 6 ranks \(48 or 56 racks\)"):
        _checked(read_recipe("prot_t5_xxl_u50", wish), read_machine("summit"), 5616)
    assert [_checked(read_recipe("prot_t5_xxl_u50", wish), read_machine("summit"), 6 * nodes).num_tensor for nodes in (864, 1008)] == [32, 32]


def test_an_architecture_that_says_nothing_of_tensor_groups_has_none() -> None:
    chosen = dataclasses.replace(architecture.get("prot_bert"), name="window", tensor_parallel=None)
    recipe = read_recipe("tiny_prot_bert", ("parallel.tensor_ranks=2",))
    with pytest.raises(ConfigError, match=r"matrices of window cannot be shared by a tensor group; those of .*prot_t5, prot_txl, prot_xlnet, protein_lm can"):
        check_sharding(recipe, read_machine("laptop"), chosen, chosen.size("tiny").shape, num_ranks=2)


@pytest.mark.parametrize("layout", [("sharding=full",), ("sharding=hybrid", "shard_ranks=2"), ("tensor_ranks=2",), ("sharding=full", "tensor_ranks=2")])
def test_every_memory_policy_goes_with_cut_models(layout: tuple[str, ...]) -> None:
    memory = ("memory.saved=bf16", "memory.lms_limit_gib=1.0", "memory.optimizer_on=host", "memory.recompute_every=1", "memory.recompute_keeps=attention")
    cut = tuple(f"parallel.{setting}" for setting in layout)
    assert not _checked(read_recipe("prot_t5_xl_u50", (*cut, *memory, "precision=fp32")), read_machine("nvl72"), 8).is_plain


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("parallel.comm=horovod", "parallel.sharding=full"), "Horovod keeps the whole model on every rank"),
        (("parallel.shard_ranks=2",), "shard_ranks is for sharding = 'hybrid'"),
        (("parallel.sharding=full", "parallel.compression=bf16"), "reduction and compression are for models that every rank holds whole"),
    ],
)
def test_a_section_that_contradicts_itself_is_refused_when_it_is_read(settings: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_recipe("tiny_prot_bert", settings)


def test_a_tensor_group_is_one_rank_of_the_batch_arithmetic() -> None:
    alone, four = (plan_batches(read_recipe("prot_bert_bfd", (f"parallel.tensor_ranks={tensor}",)), num_ranks=num)[0] for tensor, num in ((1, 64), (4, 256)))
    assert (alone.sequences_per_rank, alone.num_micro_batches) == (four.sequences_per_rank, four.num_micro_batches)
    assert four.num_data_ranks == 64


def test_the_planner_refuses_and_the_plan_shows_the_layout(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("parallel.sharding=full", "parallel.tensor_ranks=2")
    with pytest.raises(ConfigError, match="3 ranks are no whole number of tensor groups of 2 ranks"):
        plan(read_recipe("tiny_prot_bert", settings), read_machine("laptop"), num_nodes=3)
    argv = ["plan", "tiny_prot_bert", "--machine", "laptop", "--nodes", "4", *(part for setting in settings for part in ("--set", setting))]
    assert cli.main(argv) == 0
    assert "1 copy of the model, each cut over 4 ranks = 2 tensor groups of 2; 2 shares of every step" in " ".join(capsys.readouterr().out.split())
    assert cli.main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == {"num_replicas": 1, "num_shards": 2, "num_tensor": 2}


def test_layouts_in_words() -> None:
    assert layout_text(ParallelLayout(4)) == "4 whole copies of the model"
    assert layout_text(ParallelLayout(3, 6)) == "3 copies of the model, each cut over 6 ranks; 18 shares of every step"
