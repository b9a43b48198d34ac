"""The global batch on so many ranks, held against the packing that the ranks do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prottrans_hpc import architecture
from prottrans_hpc.corpus.packing import plan_step
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.launch import planner
from prottrans_hpc.launch.batch_arithmetic import check_lanes, plan_batches
from prottrans_hpc.launch.demand import Demand
from prottrans_hpc.machine import read_machine
from prottrans_hpc.recipe import Recipe, read_recipe

# Elnaggar et al. 2021, Table 2: recipe, cores, local batch of each phase.
PUBLISHED = [("prot_bert", 512, [30.0, 5.0]), ("prot_bert_bfd", 1024, [32.0, 6.0])]


@pytest.mark.parametrize(("recipe", "num_ranks", "local"), PUBLISHED)
def test_the_published_local_batches_come_out(recipe: str, num_ranks: int, local: list[float]) -> None:
    assert [batch.sequences_per_rank for batch in plan_batches(read_recipe(recipe), num_ranks=num_ranks)] == local


def lengths_like_uniref(number: int, max_residues: int, *, seed: int = 0) -> Any:
    """Log-normal with a mean of about 350 residues, cut."""
    drawn = np.random.default_rng(seed).lognormal(5.6, 0.72, number)
    return np.clip(drawn, 20, max_residues).astype(np.int64)


@pytest.mark.parametrize("num_ranks", [1, 7, 96, 936, 5616])
@pytest.mark.parametrize("phase", [0, 1])
@pytest.mark.parametrize("bin_residues", [2048, 16_384])
def test_the_plan_agrees_with_the_real_packing(num_ranks: int, phase: int, bin_residues: int) -> None:
    recipe = read_recipe("prot_bert", (f"loading.bin_residues={bin_residues}",))
    settings = recipe.phases[phase]
    assert settings.global_batch_size
    lengths = lengths_like_uniref(settings.global_batch_size, settings.max_residues)
    batch = plan_batches(recipe, num_ranks=num_ranks, mean_residues=float(lengths.mean()))[phase]
    real = plan_step(lengths, bin_residues=batch.bin_residues, num_ranks=num_ranks)
    assert real.num_micro_batches == pytest.approx(batch.num_micro_batches, rel=0.15, abs=1)
    fullest = max(int(lengths[members].sum()) for rank in range(num_ranks) for members in real.bins_of(rank))
    assert fullest <= batch.fullest_micro_batch(settings.max_residues), "the memory is planned for what really comes"
    assert sum(len(members) for rank in range(num_ranks) for members in real.bins_of(rank)) == len(lengths), "no sequence is lost"


def test_ranks_without_work_are_counted() -> None:
    (batch,) = plan_batches(read_recipe("tiny_prot_bert"), num_ranks=100)
    assert (batch.num_sequences, batch.num_idle_ranks, batch.num_micro_batches) == (64, 36, 1)


def test_a_batch_in_residues_is_sequences_of_the_mean_length() -> None:
    recipe = read_recipe("tiny_prot_bert")
    phase = dataclasses.replace(recipe.phases[0], global_batch_size=None, global_batch_residues=64_000)
    (batch,) = plan_batches(dataclasses.replace(recipe, phases=(phase,)), num_ranks=2, mean_residues=320.0)
    assert (batch.num_sequences, batch.sequences_per_rank) == (200, 100.0)


def test_lengths_are_cut_to_the_limit_of_the_phase() -> None:
    recipe = read_recipe("tiny_prot_bert", ("phases.0.max_residues=100",))
    assert plan_batches(recipe, num_ranks=1, mean_residues=400.0)[0].mean_residues == 100.0
    assert plan_batches(recipe, num_ranks=1, mean_residues=40.0)[0].mean_residues == 40.0


LANE_PLUG_IN = """
import dataclasses
from prottrans_hpc.architectures.prot_bert import ARCHITECTURE
RECORD = dataclasses.replace(ARCHITECTURE, name="lane_model", lanes=True)
"""


@pytest.fixture
def lane_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A lane-wise architecture, installed as a third party's plug-in."""
    metadata = tmp_path / "lane_model_plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: lane-model-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[prottrans_hpc.architectures]\nlane_model = lane_model_module:RECORD\n")
    (tmp_path / "lane_model_module.py").write_text(LANE_PLUG_IN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "lane_model"


def lane_recipe(name: str, *lanes: int) -> Recipe:
    recipe = read_recipe("tiny_prot_bert", (f"architecture.name={name}",))
    return dataclasses.replace(recipe, phases=tuple(dataclasses.replace(recipe.phases[0], global_batch_size=number) for number in lanes))


@pytest.mark.parametrize(("lanes", "local"), [(44_928, 8.0), (22_464, 4.0)])
def test_the_published_lanes_of_prot_txl_divide_over_52_racks(lane_model: str, lanes: int, local: float) -> None:
    recipe = lane_recipe(lane_model, lanes)
    allocation = planner.plan(recipe, read_machine("summit"), Demand(num_racks=52))
    assert plan_batches(recipe, num_ranks=allocation.num_ranks)[0].sequences_per_rank == local


@pytest.mark.parametrize(
    ("demand", "said"),
    [
        (Demand(num_racks=53), "52 racks = 936 nodes (8 lanes a rank) and 104 racks = 1872 nodes (4 lanes a rank)"),
        (Demand(num_racks=256), "208 racks = 3744 nodes (2 lanes a rank)"),
        (Demand(num_nodes=930, partial_rack=True), "832 nodes (9 lanes a rank) and 936 nodes (8 lanes a rank)"),
    ],
)
def test_lanes_that_do_not_divide_are_answered_with_the_nearest_sizes(lane_model: str, demand: Demand, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planner.plan(lane_recipe(lane_model, 44_928), read_machine("summit"), demand)
    assert said in str(caught.value) and "44,928 lanes" in str(caught.value)


def test_every_phase_must_divide(lane_model: str) -> None:
    with pytest.raises(ConfigError, match=r"phases\.1\.global_batch_size"):
        planner.plan(lane_recipe(lane_model, 44_928, 10_000), read_machine("summit"), Demand(num_racks=52))


def test_lanes_that_divide_over_no_size(lane_model: str) -> None:
    with pytest.raises(ConfigError, match="no size of this machine does"):
        planner.plan(lane_recipe(lane_model, 44_929), read_machine("summit"), Demand(num_racks=52))


def test_lanes_may_be_shared_out_unevenly_where_the_recipe_says_so(lane_model: str) -> None:
    plain = lane_recipe(lane_model, 1_024)
    with pytest.raises(ConfigError, match=r"3 lanes and the others, which wait, 2: --set loading\.uneven_lanes=true"):
        planner.plan(plain, read_machine("summit"), Demand(num_racks=4))
    uneven = dataclasses.replace(plain, loading=dataclasses.replace(plain.loading, uneven_lanes=True))
    assert planner.plan(uneven, read_machine("summit"), Demand(num_racks=4)).num_ranks == 432
    (batch,) = plan_batches(read_recipe("prot_xlnet"), num_ranks=432)
    assert batch.fullest_micro_batch(512) == 3 * 512
    with pytest.raises(ConfigError, match="do not divide"):  # fewer lanes than ranks
        planner.plan(uneven, read_machine("summit"), Demand(num_racks=52))


def test_lanes_are_shared_out_over_tensor_groups() -> None:
    settings = ("architecture.name=prot_txl", "architecture.size=prot_txl", "parallel.tensor_ranks=2", "precision=fp16")
    recipe = read_recipe("prot_txl", settings)
    assert plan_batches(recipe, num_ranks=5_616)[0].sequences_per_rank == 8
    check_lanes(architecture.get("prot_txl"), recipe, read_machine("summit"), num_nodes=936)
    with pytest.raises(ConfigError) as caught:
        check_lanes(architecture.get("prot_txl"), recipe, read_machine("summit"), num_nodes=930)
    assert "on one tensor group, and 930 nodes have 2,790 tensor groups, which do not divide them" in str(caught.value)
    assert "832 nodes (9 lanes a tensor group) and 936 nodes (8 lanes a tensor group)" in str(caught.value)


def test_lanes_are_counted_in_sequences(lane_model: str) -> None:
    recipe = lane_recipe(lane_model, 64)
    phase = dataclasses.replace(recipe.phases[0], global_batch_size=None, global_batch_residues=1000)
    with pytest.raises(ConfigError, match="not global_batch_residues"):
        planner.plan(dataclasses.replace(recipe, phases=(phase,)), read_machine("laptop"), Demand())


@pytest.mark.parametrize("num_nodes", [1, 3, 52, 64])
def test_packed_architectures_run_on_any_number_of_ranks(num_nodes: int) -> None:
    check_lanes(architecture.get("prot_bert"), read_recipe("tiny_prot_bert"), read_machine("laptop"), num_nodes=num_nodes)


@pytest.mark.parametrize("bin_residues", [512, 2048, 4096])
def test_lanes_are_full_whatever_the_lengths_in_the_corpus(bin_residues: int) -> None:
    """Every lane gives a piece of exactly so many tokens; ranks take as many together as a bin holds, as the loader does."""
    from prottrans_hpc.train.lane_loader import split_lanes
    from prottrans_hpc.train.loader import Share

    recipe = read_recipe("prot_txl_bfd", (f"loading.bin_residues={bin_residues}",))
    for mean_residues in (None, 180.0):
        (batch,) = plan_batches(recipe, num_ranks=5616, mean_residues=mean_residues)
        assert (batch.mean_residues, batch.sequences_per_rank) == (512.0, 8.0)
        assert batch.num_micro_batches == len(split_lanes(recipe, recipe.phases[0], Share(0, 5616))) == 8 * 512 // bin_residues
        assert batch.fullest_micro_batch(512) == bin_residues


def test_the_published_36_hours_of_prot_txl_are_two_jobs_of_the_24_hour_bin() -> None:
    from prottrans_hpc.launch.plan_text import describe
    from prottrans_hpc.launch.prospect import Assumptions, look_ahead

    recipe, summit = read_recipe("prot_txl_bfd"), read_machine("summit")
    published = look_ahead(recipe, summit, Demand(num_racks=52), assumptions=Assumptions(total_min=36 * 60))
    assert (published.allocation.num_nodes, published.allocation.num_ranks, published.allocation.walltime_min) == (936, 5616, 1440)
    assert published.num_jobs == 2
    told = dict(describe(published))
    assert "bin 2" in told["queue"] and told["jobs"].startswith("2 chained jobs")
    # By 6 x parameters x tokens, 36 hours are 3.5 % of the tensor cores' peak (see the notes of the recipe); here memory and distances count too.
    slow = look_ahead(recipe, summit, Demand(num_racks=52), assumptions=Assumptions(utilisation=0.045))
    assert slow.num_jobs == 2
