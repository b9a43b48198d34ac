"""The torch-free record of ProteinLM and its recipes: what was published (Xiao et al. 2021, and the authors' code)."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from prottrans_hpc import architecture, config
from prottrans_hpc.architectures.protein_lm import ProteinLmShape, num_layer_parameters, num_parameters
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.recipe import read_recipe

RECORD = architecture.get("protein_lm")
TABLE_7 = ["512-32-8", "768-12-6", "768-16-16", "768-16-24", "1024-12-16", "1024-12-32", "2048-12-16", "2048-24-16", "2048-24-8", "3072-24-16"]
NAMED = {"protein_lm_200m": (1024, 16, 16), "protein_lm_1p2b": (2048, 24, 16), "protein_lm_3b": (3072, 24, 16)}
CONFIGURATIONS = {"protein_lm_h{}_l{}_a{}".format(*row.split("-")): tuple(map(int, row.split("-"))) for row in TABLE_7}
PUBLISHED = NAMED | CONFIGURATIONS


def test_the_sizes_are_the_published_ones_and_two_of_ours():
    assert list(RECORD.sizes) == [*PUBLISHED, "small", "tiny"]
    for name, (hidden, layers, heads) in PUBLISHED.items():
        shape = RECORD.size(name).shape
        assert (shape.hidden_size, shape.num_layers, shape.num_heads, shape.intermediate_size) == (hidden, layers, heads, 4 * hidden)
        assert (shape.max_positions, shape.dropout, shape.attention_dropout, shape.layer_norm_epsilon) == (2176, 0.1, 0.1, 1e-12)
        assert any("1,920 rows" in line for line in RECORD.size(name).errata)


@pytest.mark.parametrize(
    ("size", "layers", "whole"),
    [
        ("protein_lm_200m", 201_539_584, 204_953_728),
        ("protein_lm_1p2b", 1_208_598_528, 1_217_523_840),
        ("protein_lm_3b", 2_718_867_456, 2_735_401_088),
    ],
)
def test_the_published_sizes_are_those_of_the_layers(size, layers, whole):
    """201 M and 2.72 B are the layers alone, so the counts do not tell whether the vocabulary was padded: 31 rows differ by 0.1 % at most."""
    shape = RECORD.size(size).shape
    assert (num_layer_parameters(shape), num_parameters(shape)) == (layers, whole)
    published = RECORD.size(size).parameters_published
    assert published is not None
    assert abs(layers - published) < 0.1 * published
    assert 97 * shape.hidden_size < 1e-3 * whole


def test_the_vocabulary_is_the_released_one(repository):
    published = (repository / "tests/recorded/proteinlm/iupac_vocab.txt").read_text().split()
    assert list(RECORD.vocabulary.tokens) == published
    assert len(published) == 31 <= RECORD.size("tiny").shape.vocabulary_size
    assert [RECORD.vocabulary.tokens[i] for i in RECORD.vocabulary.residue_ids()] == list("ACDEFGHIKLMNPQRSTVWY")


def test_the_released_configuration_is_that_of_the_200m_model(repository):
    import json

    released = json.loads((repository / "tests/recorded/proteinlm/config.json").read_text())
    shape = RECORD.size("protein_lm_200m").shape
    keys = {"hidden_size": "hidden_size", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads", "intermediate_size": "intermediate_size"}
    keys |= {"max_position_embeddings": "max_positions", "layer_norm_eps": "layer_norm_epsilon", "type_vocab_size": "num_token_types"}
    keys |= {"hidden_dropout_prob": "dropout", "attention_probs_dropout_prob": "attention_dropout", "initializer_range": "initializer_range"}
    assert {theirs: released[theirs] for theirs in keys} == {theirs: getattr(shape, ours) for theirs, ours in keys.items()}
    assert released["vocab_size"] == len(RECORD.vocabulary.tokens) - 1, "the conversion drops [unused1]"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recipe_is_the_scripts(name):
    recipe = read_recipe(name)
    (phase,) = recipe.phases
    assert (recipe.architecture.name, recipe.architecture.size) == ("protein_lm", name)
    assert (phase.steps, phase.decay_steps, phase.warmup_steps, phase.max_residues + 1) == (1_000_000, 990_000, 9_900, 2176)
    assert phase.global_batch_residues == 480 * 4 * 2176
    optimizer = recipe.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.weight_decay, optimizer.clip_norm) == ("adamw", 1e-4, 0.01, 1.0)
    assert (recipe.schedule.decay, recipe.schedule.final_fraction * optimizer.learning_rate) == ("linear", pytest.approx(1e-5))
    assert (recipe.objective.name, recipe.objective.fraction, recipe.precision) == ("masked", 0.15, "fp16_o2")


def test_every_published_size_has_a_recipe_of_its_name_and_states_its_parameters(repository):
    shipped = {name for name in config.shipped_names("jobs") if name.startswith("protein_lm")}
    assert shipped == set(PUBLISHED)
    for name in shipped:
        (said,) = re.findall(r"; ([\d.]+) ([MB]) parameters in its layers, ([\d.]+) ([MB]) in all", (repository / "jobs" / f"{name}.toml").read_text())
        unit = {"M": 1e6, "B": 1e9}
        shape = RECORD.size(name).shape
        counts = (num_layer_parameters(shape), num_parameters(shape))
        assert [float(said[0]) * unit[said[1]], float(said[2]) * unit[said[3]]] == [pytest.approx(count, rel=6e-3) for count in counts]


def test_reading_the_record_needs_neither_torch_nor_numpy():
    code = "import sys; from prottrans_hpc import architecture; architecture.get('protein_lm'); print({'torch', 'numpy'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


@pytest.mark.parametrize("change", [{"num_heads": 3}, {"num_layers": 0}, {"dropout": 1.0}, {"attention_dropout": -0.1}])
def test_a_shape_that_cannot_be_is_refused(change):
    values = config.to_json(RECORD.size("tiny").shape) | change
    with pytest.raises(ConfigError):
        config.parse(ProteinLmShape, values, source="a test")
