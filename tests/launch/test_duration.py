"""Time and chained jobs."""

from __future__ import annotations

from typing import Any

import pytest

from prottrans_hpc import architecture
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.launch.batch_arithmetic import plan_batches
from prottrans_hpc.launch.duration import MAX_JOBS, count_jobs, estimate_minutes
from prottrans_hpc.launch.rate import rate_of
from prottrans_hpc.machine import read_machine
from prottrans_hpc.recipe import read_recipe


def minutes(
    recipe_name: str = "prot_bert_bfd",
    machine: str = "summit",
    num_ranks: int = 5616,
    settings: tuple[str, ...] = (),
    utilisation: float | None = None,
    **options: Any,
) -> float:
    recipe = read_recipe(recipe_name, settings)
    chosen = architecture.get(recipe.architecture.name)
    batches = plan_batches(recipe, num_ranks=num_ranks, mean_residues=200.0)
    gpu = read_machine(machine).node.gpu
    assert gpu is not None
    rate = rate_of(gpu, recipe.precision, utilisation=utilisation)
    assert rate is not None
    return estimate_minutes(recipe, chosen, chosen.size(recipe.architecture.size).shape, batches, rate, **options)


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


def test_layers_that_are_computed_again_take_their_time() -> None:
    plain, again = minutes(), minutes(settings=("memory.recompute_every=1",))
    assert again / plain == pytest.approx(4 / 3, rel=0.01)
    assert plain < minutes(settings=("memory.recompute_every=2",)) < again
    assert minutes(settings=("memory.lms_limit_gib=0",)) == plain


def test_the_published_run_takes_the_published_hours() -> None:
    """202,176 GPU-hours are 36 on 5,616, if they are ProtTXL-BFD's; the profile's rate was worked out from them."""
    hours = minutes("prot_txl_bfd") / 60
    assert hours == pytest.approx(36.0, rel=0.005)
    assert count_jobs(60 * hours, walltime_min=1440, warning_min=10) == 2


def test_a_rate_that_was_seen_goes_before_a_guess_and_a_given_one_before_both() -> None:
    gpu = read_machine("summit").node.gpu
    assert gpu is not None
    seen, guessed, given = rate_of(gpu, "fp16_o2"), rate_of(gpu, "fp32"), rate_of(gpu, "fp16_o2", utilisation=0.1)
    assert seen and guessed and given and rate_of(gpu, "bf16") is None
    assert [one.flops_per_s for one in (seen, guessed, given)] == pytest.approx([5.8e12, 0.3 * 15.7e12, 12.5e12])
    assert seen.utilisation == pytest.approx(5.8 / 125)
    for rate, words in ((seen, "was seen to reach"), (guessed, "30 % of the peak (a guess: --utilisation)"), (given, "10 % of the peak (as given)")):
        assert words in rate.source


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
