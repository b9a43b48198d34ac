"""Time and chained jobs."""

from __future__ import annotations

from typing import Any

import pytest

from prottrans_hpc import architecture
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.launch.batch_arithmetic import plan_batches
from prottrans_hpc.launch.duration import MAX_JOBS, count_jobs, estimate_minutes
from prottrans_hpc.machine import read_machine
from prottrans_hpc.recipe import read_recipe


def minutes(recipe_name: str = "prot_bert_bfd", machine: str = "summit", num_ranks: int = 5616, settings: tuple[str, ...] = (), **options: Any) -> float | None:
    recipe = read_recipe(recipe_name, settings)
    chosen = architecture.get(recipe.architecture.name)
    batches = plan_batches(recipe, num_ranks=num_ranks, mean_residues=200.0)
    return estimate_minutes(recipe, read_machine(machine), chosen, chosen.size(recipe.architecture.size).shape, batches, **options)


def test_the_estimate_is_steps_times_flops_over_the_assumed_speed() -> None:
    # 6 x parameters x tokens is what the arithmetic comes to for short sequences, without the 41 M of the position table.
    tokens = 202 * (800_000 * 32_768 + 200_000 * 6_144)
    by_rule_of_thumb = 6 * 380e6 * tokens / (5616 * 15.7e12 * 0.25) / 60
    assert minutes(utilisation=0.25) == pytest.approx(by_rule_of_thumb, rel=0.05)


def test_more_ranks_and_a_better_utilisation_are_faster() -> None:
    base, faster, wider = minutes(utilisation=0.2), minutes(utilisation=0.4), minutes(num_ranks=2 * 2808, utilisation=0.2)
    assert base and faster and base == pytest.approx(2 * faster) and wider == base
    half = minutes(num_ranks=2808, utilisation=0.2)
    assert half == pytest.approx(2 * base)


def test_ranks_without_work_speed_nothing_up() -> None:
    full, idle = (minutes("tiny_prot_bert", num_ranks=ranks) for ranks in (64, 128))
    assert full == pytest.approx(idle)


def test_what_is_done_is_not_counted_again() -> None:
    whole, first, second = minutes(), minutes(last_step=800_000), minutes(first_step=800_000)
    assert whole and first and second and whole == pytest.approx(first + second)
    assert minutes(first_step=400_000, last_step=800_000) == pytest.approx(first / 2)
    assert minutes(first_step=1_000_000) == 0.0


def test_nobody_guesses_the_speed_of_a_cpu() -> None:
    assert minutes(machine="rhea", num_ranks=64) is None


@pytest.mark.parametrize(
    ("work", "walltime", "jobs"),
    [
        (36 * 60, 1440, 2),  # the published 36 hours in the bin's 24
        (1, 1440, 1),
        (0, 1440, 1),
        (1425, 1440, 1),
        (1426, 1440, 2),
        (47 * 60, 1440, 2),
        (48 * 60, 1440, 3),  # each job loses its start and its last save
        (60, 120, 1),
        (36 * 60, 120, 21),
    ],
)
def test_jobs_of_a_chain(work: float, walltime: int, jobs: int) -> None:
    assert count_jobs(work, walltime_min=walltime, warning_min=10) == jobs


def test_a_chain_that_never_ends_is_refused() -> None:
    with pytest.raises(ConfigError, match="no time to work"):
        count_jobs(60, walltime_min=15, warning_min=10)
    with pytest.raises(ConfigError, match=f"--chain {MAX_JOBS}"):
        count_jobs(105 * MAX_JOBS + 1, walltime_min=120, warning_min=10)
    assert count_jobs(105 * MAX_JOBS, walltime_min=120, warning_min=10) == MAX_JOBS
