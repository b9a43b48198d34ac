"""The recipes of the published models hold the published numbers (Elnaggar et al. 2021, Table 2)."""

from __future__ import annotations

import pytest

from prottrans_hpc import architecture
from prottrans_hpc.recipe import read_recipe

# steps, residues, global batch, warm-up of each phase; TPU cores and sequences a core, whose product is the global batch
PUBLISHED = {
    "prot_bert": ([(300_000, 512, 15_360, 40_000), (100_000, 2_048, 2_560, 0)], 512, (30, 5)),
    "prot_bert_bfd": ([(800_000, 512, 32_768, 140_000), (200_000, 2_048, 6_144, 20_000)], 1_024, (32, 6)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recipe_is_the_published_one(name):
    recipe = read_recipe(name)
    phases, num_cores, per_core = PUBLISHED[name]
    assert [(phase.steps, phase.max_residues, phase.global_batch_size, phase.warmup_steps) for phase in recipe.phases] == phases
    assert [phase[2] for phase in phases] == [num_cores * size for size in per_core]
    assert (recipe.architecture.name, recipe.architecture.size) == ("prot_bert", name)
    assert (recipe.optimizer.name, recipe.optimizer.learning_rate, recipe.optimizer.weight_decay) == ("lamb", 2e-3, 0.01)
    assert (recipe.objective.fraction, recipe.objective.mask_share, recipe.objective.random_share) == (0.15, 0.8, 0.1)
    assert recipe.precision == "fp32"


@pytest.mark.parametrize("name", [*PUBLISHED, "tiny_prot_bert", "small_prot_bert"])
def test_the_position_table_holds_the_longest_sequence_of_the_recipe(name):
    recipe = read_recipe(name)
    record = architecture.get(recipe.architecture.name)
    num_special = len(record.vocabulary.prefix) + len(record.vocabulary.suffix)
    assert max(phase.max_residues for phase in recipe.phases) + num_special <= record.size(recipe.architecture.size).shape.max_positions
