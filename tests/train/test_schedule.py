"""The learning rate against closed forms, and the published schedules of ProtBert."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest

from prottrans_hpc.recipe import ArchitectureChoice, Checkpointing, Phase, Recipe, Schedule
from prottrans_hpc.recipe_optimizers import Lamb
from prottrans_hpc.train.schedule import DECAYS, learning_rate, phase_of


def recipe(*phases, decay="linear", final_fraction=0.0, peak=2e-3):
    return Recipe(
        description="test",
        architecture=ArchitectureChoice("prot_bert", "tiny"),
        phases=phases,
        optimizer=Lamb(learning_rate=peak),
        checkpoint=Checkpointing(every_steps=10),
        schedule=Schedule(decay=decay, final_fraction=final_fraction),
    )


def phase(steps, warmup=0, peak=None):
    return Phase(steps=steps, max_residues=512, global_batch_size=8, warmup_steps=warmup, learning_rate=peak)


@pytest.mark.parametrize("decay", sorted(DECAYS.keys() - {"exponential_rise"}))
def test_the_warm_up_is_linear_reaches_the_peak_and_wastes_no_step(decay):
    rates = [learning_rate(recipe(phase(100, 10), decay=decay, peak=1.0), step) for step in range(100)]
    assert rates[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert max(rates) == 1.0
    assert min(rates) > 0.0
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))


def test_linear_decay():
    rates = [learning_rate(recipe(phase(50, 10), peak=4.0), step) for step in range(50)]
    assert rates[10:] == pytest.approx([4.0 * (50 - step) / 40 for step in range(10, 50)])


def test_cosine_decay():
    rates = [learning_rate(recipe(phase(50, 10), decay="cosine", final_fraction=0.1, peak=1.0), step) for step in range(50)]
    assert rates[10:] == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * (step - 10) / 40)) for step in range(10, 50)])
    assert rates[30] == pytest.approx(0.55)


def test_an_exponential_rise_multiplies_the_rate_alike_at_every_step():
    rising = recipe(phase(41), decay="exponential_rise", peak=10.0)
    rates = [learning_rate(rising, step) for step in range(41)]
    assert rates[0] == pytest.approx(10.0 * 1e-4) and rates[-1] == 10.0
    assert [b / a for a, b in itertools.pairwise(rates)] == pytest.approx([10 ** (4 / 40)] * 40)


def test_inverse_square_root_decay_is_that_of_t5():
    """1 / sqrt(max(n, k)) with k = 10,000, as ProtT5 was trained: 1e-2 at the peak, half of it at 4 k."""
    published = recipe(phase(1_200_000, 10_000), decay="inverse_square_root", peak=1e-2)
    assert [learning_rate(published, n - 1) for n in (10_000, 40_000, 1_000_000)] == pytest.approx([1e-2, 1 / math.sqrt(40_000), 1e-3])
    without = recipe(phase(10), decay="inverse_square_root", peak=1.0)
    assert [learning_rate(without, step) for step in (0, 3, 8)] == pytest.approx([1.0, 0.5, 1 / 3])


def test_constant_rate():
    assert {learning_rate(recipe(phase(20, 5), decay="constant", peak=3.0), step) for step in range(4, 20)} == {3.0}


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_a_phase_ends_at_the_final_fraction(decay):
    rate = learning_rate(recipe(phase(100_000), decay=decay, final_fraction=0.25, peak=1.0), 99_999)
    assert rate == pytest.approx(0.25, abs=1e-5)
    assert rate >= 0.25


def test_each_phase_has_its_own_warm_up_peak_and_decay():
    both = recipe(phase(30, 10), phase(20, 5, peak=1e-4))
    alone = recipe(phase(20, 5), peak=1e-4)
    assert [learning_rate(both, 30 + step) for step in range(20)] == [learning_rate(alone, step) for step in range(20)]
    assert learning_rate(both, 9) == 2e-3


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_a_decay_may_be_over_before_its_phase(decay):
    early = recipe(dataclasses.replace(phase(30, 4), decay_steps=20), decay=decay, final_fraction=0.1, peak=1.0)
    short = recipe(phase(20, 4), decay=decay, final_fraction=0.1, peak=1.0)
    assert [learning_rate(early, step) for step in range(20)] == [learning_rate(short, step) for step in range(20)]
    assert {round(learning_rate(early, step), 12) for step in range(20, 30)} == {0.1}


@pytest.mark.parametrize("steps", [4, 31])
def test_a_decay_that_cannot_be_is_refused(steps):
    with pytest.raises(ValueError, match=f"decay_steps {steps} must be more than warmup_steps 4 and at most steps 30"):
        dataclasses.replace(phase(30, 4), decay_steps=steps)


def test_a_phase_that_is_all_warm_up():
    assert [learning_rate(recipe(phase(4, 4), peak=1.0), step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_phases_are_found_by_their_borders():
    both = recipe(phase(3), phase(2))
    assert [phase_of(both, step)[::2] for step in range(5)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    for step in (-1, 5):
        with pytest.raises(ValueError, match="not one of this recipe's 5"):
            phase_of(both, step)


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        # ProtBert: 300K steps at 512 with 40K of warm-up, then 100K at 2,048 without; peak 2e-3; linear as in BERT.
        ([(300_000, 40_000), (100_000, 0)], {0: 5e-8, 19_999: 1e-3, 39_999: 2e-3, 170_000: 1e-3, 300_000: 2e-3, 350_000: 1e-3, 399_999: 2e-8}),
        # ProtBert-BFD: 800K with 140K, 200K with 20K.
        ([(800_000, 140_000), (200_000, 20_000)], {69_999: 1e-3, 139_999: 2e-3, 470_000: 1e-3, 809_999: 1e-3, 819_999: 2e-3, 910_000: 1e-3}),
    ],
    ids=["ProtBert", "ProtBert-BFD"],
)
def test_the_published_schedules(phases, expected):
    published = recipe(*(phase(steps, warmup) for steps, warmup in phases))
    assert {step: learning_rate(published, step) for step in expected} == {step: pytest.approx(rate) for step, rate in expected.items()}
