"""What is predicted without torch, held against real steps that are watched: every architecture, every policy, within ten percent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prottrans_hpc import architecture, config
from prottrans_hpc.corpus.index import read_index
from prottrans_hpc.corpus.reader import Corpus
from prottrans_hpc.launch import memory_storages
from prottrans_hpc.launch.memory_need import AHEAD_BYTES, MemoryNeed, Rank, need_of
from prottrans_hpc.launch.memory_policies import POLICIES
from prottrans_hpc.launch.recomputation import Tokens
from prottrans_hpc.parallel_layout import ParallelLayout
from prottrans_hpc.profile.memory_step import Measured, Trainee, measure, some_corpus, step_seconds
from prottrans_hpc.recipe import Recipe, read_recipe

CPU = torch.device("cpu")
TINY = [name for name in config.shipped_names("jobs") if name.startswith("tiny_")]
SMALL = [name for name in config.shipped_names("jobs") if name.startswith("small_")]
SMALLER = [name for name in POLICIES if name != "none" and "LMS" not in name]


@pytest.fixture(scope="module")
def proteins(small_corpus: Path) -> Corpus:
    return Corpus(read_index(small_corpus), "train")


def recipe_of(name: str, policy: str, precision: str = "fp32", bins: int = 1024) -> Recipe:
    return read_recipe(name, (f"loading.bin_residues={bins}", f"precision={precision}", *POLICIES[policy].settings))


def predicted(recipe: Recipe, found: Measured) -> MemoryNeed:
    record = architecture.get(recipe.architecture.name)
    shape = record.size(recipe.architecture.size).shape
    return need_of(recipe, record, shape, [Tokens(found.lengths, found.num_decoder)], Rank(False, ParallelLayout(1)))


def check(recipe: Recipe, proteins: Corpus, *, within: float = 0.10) -> Measured:
    found = measure(Trainee(recipe, proteins, device=CPU))
    need = predicted(recipe, found)
    # Between steps a save has no copy here, and the memory of lanes is counted by the planner.
    assert need.peak - need.checkpoint + found.lanes == pytest.approx(found.peak, rel=within)
    return found


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", TINY)
def test_the_peak_is_the_predicted_one(name: str, policy: str, proteins: Corpus) -> None:
    check(recipe_of(name, policy), proteins)


@pytest.mark.parametrize("policy", ["none", "attention", "every layer", "LMS"])
@pytest.mark.parametrize("name", TINY)
def test_so_it_is_in_half_precision(name: str, policy: str, proteins: Corpus) -> None:
    check(recipe_of(name, policy, "bf16", bins=2048), proteins)


def test_so_it_is_with_half_weights_and_masters(proteins: Corpus) -> None:
    assert check(recipe_of("tiny_prot_bert", "none", "bf16_o2", bins=2048), proteins).masters


@pytest.mark.parametrize("policy", ["none", "attention and narrow", "every layer", "LMS"])
@pytest.mark.parametrize("name", TINY)
def test_so_it_is_with_half_weights_alone(name: str, policy: str, proteins: Corpus) -> None:
    """Norms and residuals are half, too."""
    assert not check(recipe_of(name, policy, "bf16_o3", bins=2048), proteins).masters


@pytest.mark.parametrize("name", ["tiny_prot_bert", "tiny_prot_electra", "tiny_prot_t5", "tiny_protein_lm"])
def test_large_model_support_leaves_small_storages_where_they_are(name: str, proteins: Corpus) -> None:
    """At 3,000 residues hidden states of 64 numbers are smaller than 1 MiB, and the feed-forward part's four times as wide are not."""
    recipe = recipe_of(name, "LMS", bins=3000)
    found = check(recipe, proteins)
    need, whole = predicted(recipe, found), predicted(recipe_of(name, "none", bins=3000), found)
    assert need.kept == pytest.approx(found.activations, rel=0.05)
    assert 0.1 < need.moved / whole.kept < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", SMALL)
def test_so_it_is_for_small_models(name: str, policy: str, proteins: Corpus) -> None:
    check(recipe_of(name, policy), proteins)


@pytest.mark.parametrize("policy", ["none", "every layer", "attention and narrow"])
def test_gradients_that_layers_share_are_counted(policy: str, proteins: Corpus) -> None:
    """Those of ProtAlbert's one layer, which are added up beside the old ones, are an eighth of the peak where nothing else is left."""
    check(recipe_of("small_prot_albert", policy, bins=512), proteins)


def test_every_policy_spares_memory(proteins: Corpus) -> None:
    peaks = {name: measure(Trainee(recipe_of("tiny_prot_bert", name), proteins, device=CPU)).peak for name in ["none", *SMALLER]}
    assert all(peaks[name] < 0.97 * peaks["none"] for name in SMALLER), peaks


def test_a_limit_is_heeded_where_more_is_kept(proteins: Corpus) -> None:
    """4 of 6 layers of the small model and 3,072 tokens keep several times what large model support brings back ahead."""
    recipe = recipe_of("small_prot_bert", "LMS", bins=3072)
    found, whole = (measure(Trainee(one, proteins, device=CPU)) for one in (recipe, recipe_of("small_prot_bert", "none", bins=3072)))
    need = predicted(recipe, found)
    assert whole.activations > 4 * AHEAD_BYTES
    assert found.activations < 0.15 * whole.activations
    assert need.peak - need.checkpoint == pytest.approx(found.peak, rel=0.10)
    assert need.moved == pytest.approx(whole.activations - found.activations, rel=0.05)


def test_what_is_brought_back_ahead_and_what_is_small_is_what_the_ranks_do() -> None:
    from prottrans_hpc.memory import lms

    assert lms.AHEAD_BYTES == AHEAD_BYTES
    assert lms.SIZE_BYTES == memory_storages.SIZE_BYTES


def test_random_proteins_do_where_there_is_no_corpus() -> None:
    with some_corpus(None, num_residues=1024) as made:
        trainee = Trainee(recipe_of("tiny_prot_txl", "none"), made, device=CPU)
    assert 0.5 * 1024 < sum(measure(trainee).lengths) <= 1100
    assert step_seconds(trainee, num_steps=1) > 0.0


@pytest.mark.parametrize("bins", [512, 1100, 2048])
def test_a_micro_batch_is_full(bins: int, proteins: Corpus) -> None:
    lengths = measure(Trainee(recipe_of("tiny_prot_bert", "every layer", bins=bins), proteins, device=CPU)).lengths
    assert bins - 512 < sum(lengths) - 2 * len(lengths) <= bins


@pytest.mark.gpu
@pytest.mark.parametrize("policy", list(POLICIES))
def test_on_a_gpu_the_allocator_counts_as_much(policy: str, proteins: Corpus) -> None:
    recipe = recipe_of("small_prot_bert", policy, "bf16", bins=16384)
    found = measure(Trainee(recipe, proteins, device=torch.device("cuda")))
    record = architecture.get("prot_bert")
    shape = record.size("small").shape
    need = need_of(recipe, record, shape, [Tokens(found.lengths, found.num_decoder)], Rank(True, ParallelLayout(1)))
    assert need.peak == pytest.approx(found.peak, rel=0.10), "blocks of the allocator and workspaces of libraries are not predicted"
