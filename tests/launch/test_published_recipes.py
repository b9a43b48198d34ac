"""Every published recipe against Table 2 of Elnaggar et al. 2021 (ProtTrans), planned on the published number of ranks.

Summit has a profile, so what ran there is planned in full. No profile is made up for the TPU pods: their cores are
ranks of the same arithmetic. A local batch is sequences a core, as the table counts it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from prottrans_hpc import architecture, config
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.launch import cli
from prottrans_hpc.launch.batch_arithmetic import plan_batches
from prottrans_hpc.launch.campaign import is_campaign, read_campaign
from prottrans_hpc.launch.checks import check_model
from prottrans_hpc.launch.demand import Demand
from prottrans_hpc.launch.memory_room import GIB
from prottrans_hpc.launch.prospect import look_ahead
from prottrans_hpc.machine import Machine, read_machine
from prottrans_hpc.recipe import read_recipe


@dataclass(frozen=True)
class Column:
    """A column of Table 2; what has two values has one a phase."""

    cores: int
    """V100 of Summit, or TPU cores."""
    global_batch: tuple[int, ...]
    local_batch: tuple[int, ...]
    target_length: tuple[int, ...]
    steps: tuple[int, ...]
    warmup: tuple[int, ...]
    optimizer: str
    learning_rate: float
    weight_decay: float
    parameters: int
    """Millions."""
    data: str
    """The campaign that made the corpus."""
    decay: str = "linear"
    model_parallel: int = 1
    """Cores that share a replica."""


LAMB = ("lamb", 2e-3, 0.01)
ADAFACTOR = ("adafactor", 1e-2, 0.0)
TABLE_2 = {
    "prot_txl_bfd": Column(5616, (44_928,), (8,), (512,), (40_700,), (13_600,), "lamb", 5e-4, 0.0, 562, "bfd"),
    "prot_txl": Column(5616, (22_464,), (5,), (512,), (31_300,), (5_500,), "lamb", 2e-3, 0.0, 409, "uniref100"),
    "prot_bert_bfd": Column(1024, (32_768, 6_144), (32, 6), (512, 2048), (800_000, 200_000), (140_000, 20_000), *LAMB, 420, "bfd"),
    "prot_bert": Column(512, (15_360, 2_560), (30, 5), (512, 2048), (300_000, 100_000), (40_000, 0), *LAMB, 420, "uniref100"),
    "prot_xlnet": Column(512, (1_024,), (2,), (512,), (847_000,), (20_000,), "adam", 1e-5, 0.01, 409, "uniref100"),
    "prot_albert": Column(512, (10_752, 1_024), (21, 2), (512, 2048), (150_000, 150_000), (40_000, 5_000), *LAMB, 224, "uniref100"),
    "prot_electra": Column(512, (9_216, 3_584), (18, 7), (512, 1024), (400_000, 400_000), (40_000, 40_000), *LAMB, 420, "uniref100"),
    "prot_t5_xl_bfd": Column(1024, (4_096,), (4,), (512,), (1_200_000,), (10_000,), *ADAFACTOR, 3_000, "bfd", "inverse_square_root", 8),
    "prot_t5_xl_u50": Column(256, (2_048,), (8,), (512,), (991_000,), (10_000,), *ADAFACTOR, 3_000, "uniref50", "inverse_square_root", 8),
    "prot_t5_xxl_bfd": Column(1024, (4_096,), (4,), (512,), (920_000,), (10_000,), *ADAFACTOR, 11_000, "bfd", "inverse_square_root", 32),
    "prot_t5_xxl_u50": Column(256, (2_048,), (8,), (512,), (343_000,), (10_000,), *ADAFACTOR, 11_000, "uniref50", "inverse_square_root", 32),
}
NOT_ARITHMETIC = {"prot_txl": (4,)}
"""Local batches that the global batch contradicts: 5 x 5,616 are 28,080, not 22,464."""
SUMMIT = [name for name, column in TABLE_2.items() if column.cores == 5616]


def test_every_column_has_its_recipe_and_every_recipe_of_a_published_size_a_column() -> None:
    shipped = {name for name in config.shipped_names("jobs") if name.startswith("prot_")}
    assert shipped == set(TABLE_2)


@pytest.mark.parametrize("name", TABLE_2)
def test_the_recipe_is_the_column(name: str) -> None:
    recipe, column = read_recipe(name), TABLE_2[name]
    phases = [(p.global_batch_size, p.max_residues, p.steps, p.warmup_steps) for p in recipe.phases]
    assert phases == list(zip(column.global_batch, column.target_length, column.steps, column.warmup, strict=True))
    optimizer = recipe.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.weight_decay) == (column.optimizer, column.learning_rate, column.weight_decay)
    assert (recipe.schedule.decay, recipe.architecture.size) == (column.decay, name)
    chosen, size = check_model(recipe)
    assert size.parameters_published == column.parameters * 10**6
    assert name in chosen.sizes


@pytest.mark.parametrize("name", TABLE_2)
def test_the_published_ranks_get_the_published_local_batch(name: str) -> None:
    recipe, column = read_recipe(name), TABLE_2[name]
    batches = plan_batches(recipe, num_ranks=column.cores)
    assert [batch.sequences_per_rank for batch in batches] == list(NOT_ARITHMETIC.get(name, column.local_batch))
    assert [batch.num_idle_ranks for batch in batches] == [0] * len(recipe.phases)


def as_published(name: str) -> tuple[str, ...]:
    """The table's model parallelism, as settings."""
    return (f"parallel.tensor_ranks={TABLE_2[name].model_parallel}", "parallel.tensor_within=machine")


T5 = {"prot_t5_xl_bfd": 32, "prot_t5_xl_u50": 64, "prot_t5_xxl_bfd": 128, "prot_t5_xxl_u50": 256}
"""Sequences a replica: what the table's local batch comes to, which is that of a core."""


def tpu_pod(num_cores: int) -> Machine:
    """Hosts of eight cores, as many as the table has; its cores had 16 GiB (v3)."""
    core = {"name": "TPU v3 core", "memory_gib": 16.0, "peak_tflops": {"fp32": 61.0}}
    node = {"num_cpu_cores": 96, "num_gpus": 8, "gpu": core}
    values = {"name": "tpu_pod", "description": "", "scheduler": "local", "starter": "processes", "max_nodes": num_cores // 8, "ranks_per_node": 8}
    return config.parse(Machine, values | {"node": node}, source="test")


@pytest.mark.parametrize("name", T5)
def test_model_parallel_as_published_gives_a_replica_the_derived_batch_and_fits(name: str) -> None:
    column = TABLE_2[name]
    recipe, pod = read_recipe(name, as_published(name)), tpu_pod(column.cores)
    seen = look_ahead(recipe, pod, Demand(num_nodes=column.cores // 8))
    (batch,) = seen.batches
    assert (batch.num_data_ranks, batch.sequences_per_rank) == (column.cores // column.model_parallel, T5[name])
    assert seen.memory is not None and seen.memory.peak < 0.9 * 16 * GIB
    assert read_recipe(name).parallel.tensor_ranks == 1, "the size of a group is chosen with the machine, as the recipe says"


@pytest.mark.parametrize("name", T5)
def test_the_ways_that_a_recipe_names_plan(name: str) -> None:
    text = config.find_file("jobs", name).read_text(encoding="utf-8")
    commands = re.findall(r"^# +prottrans plan (.+)$", text, re.M)
    assert len(commands) == 3 and f"parallel.tensor_ranks = {TABLE_2[name].model_parallel} " in text
    for command in commands:
        assert cli.main(["plan", *command.split(), "--json", "-q"]) == 0, command


@pytest.mark.parametrize("name", SUMMIT)
def test_summit_holds_it_on_52_racks(name: str) -> None:
    """Planned in full: queue, lanes, memory."""
    column = TABLE_2[name]
    seen = look_ahead(read_recipe(name), read_machine("summit"), Demand(num_racks=52))
    allocation, (batch,) = seen.allocation, seen.batches
    assert (allocation.num_nodes, allocation.num_ranks, allocation.walltime_min) == (936, column.cores, 1440)
    assert (batch.num_sequences, batch.num_ranks) == (column.global_batch[0], column.cores)
    assert batch.sequences_per_rank * batch.num_ranks == column.global_batch[0]
    assert seen.memory is not None and seen.memory.peak < 0.9 * 16 * GIB
    with pytest.raises(ConfigError, match="on one rank"):
        look_ahead(read_recipe(name), read_machine("summit"), Demand(num_racks=51))


@pytest.mark.parametrize("name", NOT_ARITHMETIC)
def test_what_cannot_be_is_an_erratum(name: str) -> None:
    column, record = TABLE_2[name], architecture.get(read_recipe(name).architecture.name)
    assert column.local_batch[0] * column.cores != column.global_batch[0] == NOT_ARITHMETIC[name][0] * column.cores
    assert any("28,080" in line for line in record.size(name).errata)


# Derived from the table and the sizes of the data: billions of samples, and epochs by sequences.
SEEN = {
    "prot_txl_bfd": (1.83, 0.86),
    "prot_txl": (0.70, 3.3),
    "prot_bert_bfd": (27.4, 12.9),
    "prot_bert": (4.86, 22.5),
    "prot_xlnet": (0.87, 4.0),
    "prot_albert": (1.77, 8.2),
    "prot_electra": (5.12, 23.7),
    "prot_t5_xl_bfd": (4.92, 2.3),
    "prot_t5_xl_u50": (2.03, 45.1),
    "prot_t5_xxl_bfd": (3.77, 1.8),
    "prot_t5_xxl_u50": (0.70, 15.6),
}


@pytest.mark.parametrize("name", TABLE_2)
def test_the_samples_seen_are_the_derived_ones(name: str) -> None:
    recipe, (billions, epochs) = read_recipe(name), SEEN[name]
    samples = sum(phase.steps * (phase.global_batch_size or 0) for phase in recipe.phases)
    assert samples / 1e9 == pytest.approx(billions, abs=0.006 if billions < 10 else 0.06)
    corpus = read_campaign(f"preprocess_{TABLE_2[name].data}").expected
    assert samples / corpus.sequences == pytest.approx(epochs, abs=0.06)


@pytest.mark.parametrize("name", [name for name in config.shipped_names("jobs") if not is_campaign(name)])
def test_every_recipe_fits_its_architecture(name: str) -> None:
    """Objective, length and size go together, and every phase has more steps than its warm-up."""
    recipe = read_recipe(name)
    chosen, _ = check_model(recipe)
    assert all(phase.warmup_steps < phase.steps for phase in recipe.phases)
    assert not chosen.lanes or all(phase.global_batch_size for phase in recipe.phases)


TOO_LARGE = (
    "prot_txl_bfd",
    "prot_t5_xl_bfd",
    "prot_t5_xl_u50",
    "protein_lm_1p2b",
    *(f"protein_lm_h{shape}" for shape in ("2048_l24_a8", "2048_l24_a16")),
)
"""On 4 racks a copy of the model does not fit into 16 GiB; cut over the ranks it does, as `prottrans memory` says. The largest
recipes of ProteinLM are cut as they are."""
CUT = ("--set", "parallel.sharding=full")
SETTINGS = {**dict.fromkeys(TOO_LARGE, CUT), **dict.fromkeys(("prot_t5_xxl_bfd", "prot_t5_xxl_u50"), (*CUT, "--set", "memory.recompute_every=1"))}
PUBLISHED = [name for name in config.shipped_names("jobs") if not name.startswith(("preprocess_", "tiny_", "small_"))]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_model_is_one_command_on_summit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: Any) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["pretrain", name, "--machine", "summit", "--racks", "4", "--dry-run"]
    assert cli.main([*command, *SETTINGS.get(name, ())]) == 0
    script = capfdbinary.readouterr().out.decode()
    assert script.startswith("#!/bin/bash\n#BSUB ") and "jsrun -n 432 " in script and not list(tmp_path.iterdir())
    if name in SETTINGS:
        assert cli.main(command) == 64
        assert "does not fit" in capfdbinary.readouterr().err.decode()


PROTEIN_LM = [name for name in config.shipped_names("jobs") if name.startswith("protein_lm_")]
"""Xiao et al. 2021: 480 V100 of 32 GB for about three weeks, 4 rows of 2,176 tokens each a step; how many a node had is not said, eight are assumed."""


def v100_32gb() -> Machine:
    card = {"name": "V100-32GB", "memory_gib": 32.0, "peak_tflops": {"fp32": 15.7, "fp16": 125.0}}
    node = {"num_cpu_cores": 48, "num_gpus": 8, "gpu": card, "host_memory_gib": 512.0}
    values = {"name": "v100", "description": "", "scheduler": "local", "starter": "processes", "max_nodes": 60, "ranks_per_node": 8}
    return config.parse(Machine, values | {"node": node}, source="test")


def test_every_configuration_of_protein_lm_has_its_recipe() -> None:
    assert len(PROTEIN_LM) == 13 and {"protein_lm_200m", "protein_lm_1p2b", "protein_lm_3b"} < set(PROTEIN_LM)


@pytest.mark.parametrize("name", PROTEIN_LM)
def test_480_cards_hold_protein_lm(name: str) -> None:
    seen = look_ahead(read_recipe(name), v100_32gb(), Demand(num_nodes=60))
    (batch,), (phase,) = seen.batches, seen.recipe.phases
    assert (batch.num_ranks, phase.steps, phase.warmup_steps, phase.max_residues) == (480, 1_000_000, 9_900, 2_175)
    assert phase.global_batch_residues == 480 * 4 * 2_176
    assert batch.sequences_per_rank * batch.mean_residues == pytest.approx(4 * 2_176, rel=0.001)
    assert seen.memory is not None and seen.memory.peak < 0.9 * 32 * GIB and not seen.notes


@pytest.mark.parametrize("name", ["protein_lm_3b", "protein_lm_h3072_l24_a16"])
def test_the_largest_protein_lm_has_to_be_cut(name: str) -> None:
    with pytest.raises(ConfigError, match="does not fit"):
        look_ahead(read_recipe(name, ("parallel.sharding=none",)), v100_32gb(), Demand(num_nodes=60))
