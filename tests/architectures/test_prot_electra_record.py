"""The torch-free record of ProtElectra and its recipes: what was published, and their checks."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from prottrans_hpc import architecture, config
from prottrans_hpc.architectures.prot_electra import (
    ElectraShape,
    GeneratorShape,
    activation_bytes,
    discriminator_parameters,
    flops,
    generator_parameters,
    num_parameters,
)
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.recipe import read_recipe

RECORD = architecture.get("prot_electra")


def test_the_published_size_has_the_published_numbers():
    published = RECORD.size("prot_electra")
    shape = published.shape
    assert (shape.num_layers, shape.hidden_size, shape.intermediate_size, shape.num_heads, shape.max_positions) == (30, 1024, 4096, 16, 40_000)
    quarter = GeneratorShape(num_layers=30, hidden_size=1024 // 4, intermediate_size=4096 // 4, num_heads=16 // 4)
    assert shape.generator == quarter
    assert published.parameters_published == 420_000_000
    assert discriminator_parameters(shape) == 419_932_161
    head = 256 * 1024 + 3 * 1024 + 30
    assert round((generator_parameters(shape) - head) / 1e6, 1) == 24.0
    assert num_parameters(shape) == discriminator_parameters(shape) + generator_parameters(shape) == 444_152_607


def test_the_released_discriminator_is_another_model():
    shape = RECORD.size("prot_electra_released").shape
    assert (shape.num_layers, shape.hidden_size, shape.generator) == (32, 1280, None)
    assert num_parameters(shape) == discriminator_parameters(shape) == 682_562_561


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("prot_electra", "419,932,161"),
        ("prot_electra", "named after BFD"),
        ("prot_electra", "32 layers x 1,280"),
        ("prot_electra", "sinusoidal"),
        ("prot_electra_released", "682.56 M"),
        ("prot_electra_released", "named after BFD"),
    ],
)
def test_errata_are_attached_to_their_size(size, said):
    assert said in " ".join(RECORD.size(size).errata)


def test_the_loss_has_two_parts_and_counts_tokens():
    assert RECORD.loss_parts == ("generator_loss", "discriminator_loss")
    assert RECORD.counts_tokens
    assert RECORD.vocabulary == architecture.get("prot_bert").vocabulary


def test_both_models_are_counted():
    shape = RECORD.size("small").shape
    alone = dataclasses.replace(shape, generator=None)
    assert flops(alone, [300]) < flops(shape, [300]) < 1.2 * flops(alone, [300])
    for precision in ("fp32", "bf16"):
        assert activation_bytes(alone, [300], precision) < activation_bytes(shape, [300], precision) < 1.6 * activation_bytes(alone, [300], precision)
    with pytest.raises(ConfigError, match="'fp8'"):
        activation_bytes(shape, [300], "fp8")


@pytest.mark.parametrize("change", [{"num_heads": 3}, {"num_layers": 0}, {"embedding_size": 0}, {"hidden_size": "64"}, {"generator": {"num_layers": 2}}])
def test_a_shape_that_cannot_be_is_refused(change):
    values = dataclasses.asdict(RECORD.size("tiny").shape) | change
    with pytest.raises(ConfigError):
        config.parse(ElectraShape, values, source="a test")


def test_a_shape_in_a_checkpoint_reads_back():
    for size in RECORD.sizes.values():
        assert config.parse(ElectraShape, dataclasses.asdict(size.shape), source="a test") == size.shape


def test_reading_the_record_needs_neither_torch_nor_numpy():
    code = "import sys; from prottrans_hpc import architecture; architecture.get('prot_electra'); print({'torch', 'numpy'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_the_recipe_is_the_published_one():
    recipe = read_recipe("prot_electra")
    phases = [(phase.steps, phase.max_residues, phase.global_batch_size, phase.warmup_steps) for phase in recipe.phases]
    assert phases == [(400_000, 512, 512 * 18, 40_000), (400_000, 1_024, 512 * 7, 40_000)]
    assert (recipe.optimizer.name, recipe.optimizer.learning_rate, recipe.optimizer.weight_decay) == ("lamb", 2e-3, 0.01)
    objective = recipe.objective
    assert (objective.name, objective.fraction, objective.mask_share, objective.discriminator_weight) == ("replaced_token", 0.25, 0.85, 50.0)


@pytest.mark.parametrize("name", ["prot_electra", "small_prot_electra", "tiny_prot_electra"])
def test_the_position_table_holds_the_longest_sequence_of_the_recipe(name):
    recipe = read_recipe(name)
    assert recipe.architecture.name == "prot_electra"
    assert max(phase.max_residues for phase in recipe.phases) + 2 <= RECORD.size(recipe.architecture.size).shape.max_positions
