"""The torch-free record of ProtXLNet and its recipes: what was published, and its checks."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from prottrans_hpc import architecture, config
from prottrans_hpc.architectures.prot_xlnet import XLNetShape, activation_bytes, flops, lane_bytes, num_parameters
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.recipe import read_recipe

RECORD = architecture.get("prot_xlnet")


def test_the_published_size_has_the_published_numbers():
    published = RECORD.size("prot_xlnet")
    shape = published.shape
    assert (shape.num_layers, shape.hidden_size, shape.intermediate_size, shape.num_heads, shape.head_size) == (30, 1024, 4096, 16, 64)
    assert (shape.memory_length, shape.dropout, shape.vocabulary_size) == (384, 0.1, 37)
    assert num_parameters(shape) == 409_413_669
    assert published.parameters_published == 409_000_000


@pytest.mark.parametrize("said", ["409,413,669", "no mem_len", "1,024 residues", "on TPU cores", "80 and as 88 billion"])
def test_errata_are_attached(said):
    assert said in " ".join(RECORD.size("prot_xlnet").errata)


def test_the_vocabulary_has_37_tokens_of_which_20_are_residues():
    vocabulary = RECORD.vocabulary
    assert len(vocabulary.tokens) == len(set(vocabulary.tokens)) == 37
    assert vocabulary.residue_ids() == tuple(range(17, 37))
    table = vocabulary.residue_table()
    assert {table[ord(letter)] for letter in "XUZOB"} == {vocabulary.index("<unk>")} == {0}
    # The ids that the authors' code and transformers' tokenizer count on.
    assert [vocabulary.index(token) for token in ("<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>")] == list(range(1, 9))


def test_reading_the_record_needs_neither_torch_nor_numpy():
    code = "import sys; from prottrans_hpc import architecture; architecture.get('prot_xlnet'); print({'torch', 'numpy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_flops_grow_with_the_square_of_each_length_and_with_the_memory():
    shape = RECORD.size("small").shape
    without = dataclasses.replace(shape, memory_length=0)
    assert flops(shape, [512]) > 1.1 * flops(without, [512])
    # But for the table of distances, made once, two pieces cost twice as much as one.
    assert 1.9 * flops(without, [300]) < flops(without, [300, 300]) < 2 * flops(without, [300])
    assert flops(without, [600]) > flops(without, [300, 300])
    assert flops(shape, []) == 0.0


def test_activations_are_smaller_in_bf16_and_without_dropout():
    shape = RECORD.size("small").shape
    assert activation_bytes(shape, [512], "bf16") < 0.6 * activation_bytes(shape, [512], "fp32")
    assert activation_bytes(dataclasses.replace(shape, dropout=0.0), [512], "fp32") < 0.7 * activation_bytes(shape, [512], "fp32")
    with pytest.raises(ConfigError, match="'fp8'; known are fp32 and bf16"):
        activation_bytes(shape, [300], "fp8")


def test_a_lane_of_the_published_size_has_a_memory_of_45_mib():
    assert lane_bytes(RECORD.size("prot_xlnet").shape, 512) == 30 * 384 * 1024 * 4 == 45 * 2**20


@pytest.mark.parametrize(
    "change", [{"num_heads": 3}, {"num_layers": 0}, {"hidden_size": "64"}, {"hidden_size": 65, "num_heads": 5}, {"dropout": 1.0}, {"memory_length": -1}]
)
def test_a_shape_that_cannot_be_is_refused(change):
    values = dataclasses.asdict(RECORD.size("tiny").shape) | change
    with pytest.raises(ConfigError):
        config.parse(XLNetShape, values, source="a test")


def test_the_recipe_is_the_published_one():
    recipe = read_recipe("prot_xlnet")
    (phase,) = recipe.phases
    assert (phase.steps, phase.max_residues, phase.global_batch_size, phase.warmup_steps) == (847_000, 512, 1_024, 20_000)
    assert phase.global_batch_size == 512 * 2, "TPU cores x local batch"
    assert (recipe.architecture.name, recipe.architecture.size) == ("prot_xlnet", "prot_xlnet")
    assert (recipe.optimizer.name, recipe.optimizer.learning_rate, recipe.optimizer.weight_decay) == ("adam", 1e-5, 0.01)
    assert (recipe.objective.name, recipe.objective.max_span, recipe.objective.permute_within) == ("permutation", 5, 256)
    assert recipe.objective.fraction == pytest.approx(85 / 512, rel=0.005)
    assert recipe.precision == "fp32"


@pytest.mark.parametrize("name", ["prot_xlnet", "small_prot_xlnet", "tiny_prot_xlnet"])
def test_the_lanes_of_a_recipe_divide_over_many_world_sizes_and_outlast_the_memory(name):
    recipe = read_recipe(name)
    (phase,) = recipe.phases
    assert all(phase.global_batch_size % world_size == 0 for world_size in (1, 2, 4, 8, 16))
    assert phase.max_residues >= RECORD.size(recipe.architecture.size).shape.memory_length
