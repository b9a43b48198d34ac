"""The torch-free record of ProtAlbert and its recipes: what was published, and their checks."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from prottrans_hpc import architecture, config
from prottrans_hpc.architectures.prot_albert import AlbertShape, activation_bytes, flops, num_parameters
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.recipe import read_recipe

RECORD = architecture.get("prot_albert")


def test_the_published_size_has_the_published_numbers():
    published = RECORD.size("prot_albert")
    shape = published.shape
    assert (shape.num_layers, shape.hidden_size, shape.intermediate_size, shape.num_heads, shape.embedding_size) == (12, 4096, 16384, 64, 128)
    assert (shape.max_positions, shape.vocabulary_size) == (40_000, 34)
    assert num_parameters(shape) == 224_339_106
    assert num_parameters(dataclasses.replace(shape, has_pooler=False)) == 207_557_794
    assert published.parameters_published == 224_000_000


@pytest.mark.parametrize("said", ["1,024 residues for all models", "sinusoidal", "207.56 M", "80 and as 88 billion", "SeqVec's 30 M", "34 tokens"])
def test_errata_are_attached(said):
    assert said in " ".join(RECORD.size("prot_albert").errata)


def test_the_vocabulary_is_alberts_with_residues():
    vocabulary = RECORD.vocabulary
    assert vocabulary.tokens[:5] == ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")
    assert len(set(vocabulary.tokens)) == 34
    table = vocabulary.residue_table()
    assert [vocabulary.tokens[table[ord(letter)]] for letter in "MKX"] == list("MKX")
    assert {table[ord(letter)] for letter in "BOUZJ("} == {vocabulary.index("<unk>")}, "no sign is a residue"
    assert len(vocabulary.residue_ids()) == 20


def test_sharing_saves_parameters_but_neither_work_nor_activations():
    shape = RECORD.size("small").shape
    once, twice = (dataclasses.replace(shape, num_layers=layers) for layers in (6, 12))
    assert num_parameters(once) == num_parameters(twice)
    outside = flops(dataclasses.replace(shape, num_layers=1), [300]) * 2 - flops(dataclasses.replace(shape, num_layers=2), [300])
    assert flops(twice, [300]) - outside == pytest.approx(2 * (flops(once, [300]) - outside))
    assert activation_bytes(twice, [300], "fp32") > 1.9 * activation_bytes(once, [300], "fp32")
    with pytest.raises(ConfigError, match="'fp8'"):
        activation_bytes(shape, [300], "fp8")


@pytest.mark.parametrize("change", [{"num_heads": 3}, {"num_layers": 0}, {"embedding_size": 0}, {"hidden_size": "64"}])
def test_a_shape_that_cannot_be_is_refused(change):
    values = dataclasses.asdict(RECORD.size("tiny").shape) | change
    with pytest.raises(ConfigError):
        config.parse(AlbertShape, values, source="a test")


def test_reading_the_record_needs_neither_torch_nor_numpy():
    code = "import sys; from prottrans_hpc import architecture; architecture.get('prot_albert'); print({'torch', 'numpy'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_the_recipe_is_the_published_one():
    recipe = read_recipe("prot_albert")
    phases = [(phase.steps, phase.max_residues, phase.global_batch_size, phase.warmup_steps) for phase in recipe.phases]
    assert phases == [(150_000, 512, 512 * 21, 40_000), (150_000, 2_048, 512 * 2, 5_000)]
    assert (recipe.optimizer.name, recipe.optimizer.learning_rate, recipe.optimizer.weight_decay) == ("lamb", 2e-3, 0.01)
    assert (recipe.objective.name, recipe.objective.fraction) == ("masked", 0.15)


@pytest.mark.parametrize("name", ["prot_albert", "small_prot_albert", "tiny_prot_albert"])
def test_the_position_table_holds_the_longest_sequence_of_the_recipe(name):
    recipe = read_recipe(name)
    assert recipe.architecture.name == "prot_albert"
    assert max(phase.max_residues for phase in recipe.phases) + 2 <= RECORD.size(recipe.architecture.size).shape.max_positions
