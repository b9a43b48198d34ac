"""Every published recipe against Table 2 of Elnaggar et al. 2021 (ProtTrans), planned on the published number of ranks.

Summit has a profile, so what ran there is planned in full. No profile is made up for the TPU pods: their cores are
ranks of the same arithmetic. A local batch is sequences a core, as the table counts it.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from prottrans_hpc import architecture, config
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.launch.batch_arithmetic import plan_batches
from prottrans_hpc.launch.campaign import is_campaign, read_campaign
from prottrans_hpc.launch.checks import check_model
from prottrans_hpc.launch.demand import Demand
from prottrans_hpc.launch.memory_room import GIB
from prottrans_hpc.launch.prospect import look_ahead
from prottrans_hpc.machine import read_machine
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
    "prot_t5_xl_bfd": Column(1024, (4_096,), (4,), (512,), (1_200_000,), (10_000,), *ADAFACTOR, 3_000, "bfd", "inverse_square_root"),
    "prot_t5_xl_u50": Column(256, (2_048,), (8,), (512,), (991_000,), (10_000,), *ADAFACTOR, 3_000, "uniref50", "inverse_square_root"),
    "prot_t5_xxl_bfd": Column(1024, (4_096,), (4,), (512,), (920_000,), (10_000,), *ADAFACTOR, 11_000, "bfd", "inverse_square_root"),
    "prot_t5_xxl_u50": Column(256, (2_048,), (8,), (512,), (343_000,), (10_000,), *ADAFACTOR, 11_000, "uniref50", "inverse_square_root"),
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
