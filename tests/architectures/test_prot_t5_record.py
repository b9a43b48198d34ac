"""The torch-free record of ProtT5 and the recipes of its published models (Elnaggar et al. 2021, Table 2)."""

from __future__ import annotations

import dataclasses

import pytest

from prottrans_hpc import architecture, config
from prottrans_hpc.architectures.prot_t5 import T5Shape, activation_bytes, flops, num_parameters
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.recipe import read_recipe
from prottrans_hpc.train.schedule import learning_rate

RECORD = architecture.get("prot_t5")

# steps, global batch, TPU cores, sequences a core, sequences a replica, ways of model parallelism, dropout, feed-forward width, heads
PUBLISHED = {
    "prot_t5_xl_bfd": (1_200_000, 4_096, 1_024, 4, 32, 8, 0.1, 16_384, 32),
    "prot_t5_xl_u50": (991_000, 2_048, 256, 8, 64, 8, 0.1, 16_384, 32),
    "prot_t5_xxl_bfd": (920_000, 4_096, 1_024, 4, 128, 32, 0.0, 65_536, 128),
    "prot_t5_xxl_u50": (343_000, 2_048, 256, 8, 256, 32, 0.1, 65_536, 128),
}
COUNTS = {"xl": (2_818_830_336, 1_208_141_824), "xxl": (11_274_553_344, 4_832_023_552)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recipe_is_the_published_one(name):
    recipe = read_recipe(name)
    steps, batch, cores, per_core, replica, ways, *_ = PUBLISHED[name]
    (phase,) = recipe.phases
    assert (phase.steps, phase.max_residues, phase.global_batch_size, phase.warmup_steps) == (steps, 512, batch, 10_000)
    assert batch == cores * per_core == cores // ways * replica
    assert (recipe.architecture.name, recipe.architecture.size) == ("prot_t5", name)
    assert (recipe.optimizer.name, recipe.optimizer.learning_rate, recipe.optimizer.weight_decay) == ("adafactor", 1e-2, 0.0)
    objective = recipe.objective
    assert (objective.name, objective.fraction, objective.noise, objective.target, objective.random_share) == ("denoising", 0.15, "single", "whole", 0.0)
    assert recipe.precision == "fp32"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_rate_is_one_over_the_root_of_the_step_from_10_000_on(name):
    recipe = read_recipe(name)
    assert [learning_rate(recipe, step) for step in (0, 1, 9_999)] == [0.01] * 3
    for step in (10_000, 39_999, 342_999):
        assert learning_rate(recipe, step) == pytest.approx((step + 1) ** -0.5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_sizes_have_the_published_numbers(name):
    size = RECORD.size(name)
    shape = size.shape
    *_, dropout, inner, heads = PUBLISHED[name]
    assert (shape.num_layers, shape.num_decoder_layers, shape.hidden_size, shape.head_size) == (24, 24, 1024, 128)
    assert (shape.intermediate_size, shape.num_heads, shape.dropout) == (inner, heads, dropout)
    whole, encoder = COUNTS[name.split("_")[2]]
    assert num_parameters(shape) == whole
    assert num_parameters(dataclasses.replace(shape, num_decoder_layers=0)) == encoder
    assert size.parameters_published == {"xl": 3, "xxl": 11}[name.split("_")[2]] * 10**9
    errata = " ".join(size.errata)
    assert f"{whole:,}" in errata and f"{encoder:,}" in errata and "average a core" in errata


def test_the_vocabulary_is_in_the_order_of_the_published_weights():
    tokens = RECORD.vocabulary.tokens
    assert tokens[:3] == ("<pad>", "</s>", "<unk>") and "".join(tokens[3:28]) == "ALGVSREDTIPKFQNYMHWCXBOUZ"
    assert tokens[28:] == tuple(f"<extra_id_{index}>" for index in range(99, -1, -1)) and len(tokens) == 128
    assert [tokens[i] for i in RECORD.vocabulary.residue_ids()] == list("ALGVSREDTIPKFQNYMHWC")


def test_flops_count_both_stacks_and_the_attention_between_them():
    shape = RECORD.size("small").shape
    encoder = flops(dataclasses.replace(shape, num_decoder_layers=0), [300])
    one_less = flops(dataclasses.replace(shape, num_decoder_layers=shape.num_decoder_layers - 1), [300])
    width, attention = shape.hidden_size, shape.attention_size
    layer = 6 * (2 * (300 * 4 * width * attention + 2 * 300**2 * attention) + 300 * 2 * width * shape.intermediate_size)
    assert flops(shape, [300]) - one_less == layer
    assert encoder < flops(shape, [300]) / 2
    assert flops(shape, [300, 300]) == 2 * flops(shape, [300])


def test_bf16_keeps_less_for_the_backward_pass():
    shape = RECORD.size("small").shape
    assert activation_bytes(shape, [300], "bf16") < 0.7 * activation_bytes(shape, [300], "fp32")
    assert activation_bytes(dataclasses.replace(shape, num_decoder_layers=0), [300], "bf16") < 0.5 * activation_bytes(shape, [300], "bf16")
    dropping = dataclasses.replace(shape, dropout=0.1)
    inner = 300 * 2 * shape.num_layers * shape.intermediate_size * (2 + 1)  # the feed-forward parts' dropped copies and masks
    assert inner < activation_bytes(dropping, [300], "bf16") - activation_bytes(shape, [300], "bf16") < 2 * inner
    with pytest.raises(ConfigError, match="'fp8'"):
        activation_bytes(shape, [300], "fp8")


@pytest.mark.parametrize("change", [{"num_heads": 0}, {"num_decoder_layers": -1}, {"num_buckets": 6}, {"max_distance": 16}, {"dropout": 1.0}])
def test_a_shape_that_cannot_be_is_refused(change):
    with pytest.raises(ConfigError):
        config.parse(T5Shape, dataclasses.asdict(RECORD.size("tiny").shape) | change, source="a test")
