"""Recipes: every shipped one reads, every number is bounded, and science is told from logistics."""

from __future__ import annotations

import json

import pytest

from prottrans_hpc import architecture, config, recipe
from prottrans_hpc.errors import ConfigError


@pytest.mark.parametrize("name", config.shipped_names("jobs"))
def test_every_shipped_recipe_reads_and_names_a_registered_architecture(name):
    values = config.read_toml(config.find_file("jobs", name))
    if "phases" not in values:
        pytest.skip("not a training recipe")
    read = recipe.read_recipe(name)
    record = architecture.get(read.architecture.name)
    record.size(read.architecture.size)
    assert read.objective.name in record.objectives
    assert read.description


def test_settings_reach_every_section():
    read = recipe.read_recipe("tiny_prot_bert", ("optimizer.name=adamw", "phases.0.steps=70", "seed=1"))
    assert (read.optimizer.name, read.num_steps, read.seed) == ("adamw", 70, 1)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("phases=[]", "at least one [[phases]]"),
        ("phases.0.steps=0", "phases.0.steps = 0"),
        ("phases.0.warmup_steps=201", "warmup_steps 201 exceeds steps 200"),
        ("phases.0.global_batch_residues=1000", "either global_batch_size or global_batch_residues"),
        ("phases.0.global_batch_size=0", "phases.0.global_batch_size = 0"),
        ("phases.0.learning_rate=0.0", "phases.0.learning_rate = 0.0"),
        ("objective.fraction=0.0", "fraction must be between 0 and 1"),
        ("objective.fraction=1.0", "fraction must be between 0 and 1"),
        ("objective.mask_share=0.95", "exceed 1 together"),
        ("objective.random_share=-0.1", "objective.random_share = -0.1"),
        ("objective.name=telepathy", "objective.name = 'telepathy'"),
        ("optimizer.name=sgd", "known are lamb, adamw, adam, adafactor"),
        ("optimizer.learning_rate=-1.0", "optimizer.learning_rate = -1.0"),
        ("optimizer.learning_rate=nan", "finite"),
        ("optimizer.beta1=1.0", "beta1 and beta2"),
        ("optimizer.weight_decay=-0.1", "optimizer.weight_decay"),
        ("optimizer.clip_norm=-1.0", "optimizer.clip_norm"),
        ("schedule.final_fraction=1.5", "schedule.final_fraction"),
        ("order.long_sequences=drop", "'crop' or 'split'"),
        ("order.block_sequences=0", "order.block_sequences"),
        ("loading.bin_residues=0", "loading.bin_residues"),
        ("loading.prefetch_steps=0", "loading.prefetch_steps"),
        ("parallel.comm=carrier_pigeon", "'torch' or 'horovod'"),
        ("parallel.timeout_s=0", "parallel.timeout_s"),
        ("checkpoint.every_steps=0", "checkpoint.every_steps"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last"),
        ("validation.max_sequences=0", "validation.max_sequences"),
        ("precision=fp8", "'fp16_o2'"),
        ("loss_scaling.initial=3.0", "power of two"),
        ("loss_scaling.floor=131072.0", "exceeds initial"),
        ("seed=-1", "seed = -1"),
        ("non_finite_limit=0", "non_finite_limit"),
        ("sede=1", "did you mean 'seed'?"),
        ("optimiser.name=lamb", "did you mean 'optimizer'?"),
    ],
)
def test_a_number_that_cannot_be_is_refused_with_its_key(setting, said):
    with pytest.raises(ConfigError) as caught:
        recipe.read_recipe("tiny_prot_bert", (setting,))
    assert said in str(caught.value)
    assert "tiny_prot_bert.toml" in str(caught.value)


def test_only_what_changes_the_result_is_science():
    base = recipe.science(recipe.read_recipe("tiny_prot_bert"))
    logistics = ("loading.bin_residues=512", "parallel.comm=horovod", "checkpoint.every_steps=7", "validation.every_steps=3", "description=other")
    assert recipe.science(recipe.read_recipe("tiny_prot_bert", logistics)) == base
    for setting in (
        "seed=1",
        "phases.0.steps=70",
        "optimizer.beta1=0.8",
        "precision=bf16",
        "order.block_sequences=8",
        "objective.fraction=0.2",
        "schedule.decay=cosine",
    ):
        assert len(config.differences(base, recipe.science(recipe.read_recipe("tiny_prot_bert", (setting,))))) == 1


def test_a_recipe_goes_through_run_json_unchanged():
    read = recipe.read_recipe("tiny_prot_bert")
    assert recipe.recipe_from_json(json.loads(json.dumps(config.to_json(read))), source="run.json") == read


def test_a_run_json_of_another_version_says_so():
    values = config.to_json(recipe.read_recipe("tiny_prot_bert")) | {"quantum": True}
    with pytest.raises(ConfigError, match="another version of prottrans-hpc"):
        recipe.recipe_from_json(values, source="run.json")


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        (
            "objective.name=masket",
            "objective.name = 'masket': unknown (did you mean 'masked'?); known are masked, replaced_token, causal",
        ),
        ("objective.fractoin=0.1", "unknown key objective.fractoin (did you mean 'fraction'?)"),
        ("objective.name=causal", "unknown key objective.fraction (did you mean 'direction'?)"),
    ],
)
def test_an_objective_is_told_apart_by_its_name(setting, told):
    with pytest.raises(ConfigError) as refused:
        recipe.read_recipe("tiny_prot_bert", (setting,))
    assert told in str(refused.value)
