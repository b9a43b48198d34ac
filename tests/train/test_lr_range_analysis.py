"""What a sweep of the learning rate says, on curves whose answer is known."""

from __future__ import annotations

import csv
import io
import math
import random

import pytest

from prottrans_hpc.train import lr_range

STEPS = 100
RATES = [1e-5 * 10 ** (5 * step / (STEPS - 1)) for step in range(STEPS)]


def curve(*, diverges_at: float, seed: int = 0, noise: float = 0.01) -> list[float | None]:
    """Falls the faster the higher the rate, and explodes from a rate on."""
    dice, losses, loss = random.Random(seed), [], 3.3
    for rate in RATES:
        loss += -0.4 * rate / diverges_at * (loss - 2.7) if rate < diverges_at else 0.15
        losses.append(loss + noise * dice.gauss(0, 1))
    return losses


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("limit", [1e-3, 3e-2, 0.3])
def test_the_limit_is_found_within_a_factor_of_two_and_the_peak_lies_below(seed, limit):
    found = lr_range.analyse("x", RATES, curve(diverges_at=limit, seed=seed))
    assert found.diverged is not None
    assert limit / 2 < found.rates[found.diverged] < 2 * limit
    assert limit / 10 < found.suggested < limit / 1.2


def test_a_sweep_that_never_diverges_says_so():
    found = lr_range.analyse("x", RATES, curve(diverges_at=10.0))
    assert found.diverged is None
    assert "nowhere up to a learning rate of 1" in "\n".join(lr_range.summary(found))
    assert found.suggested == found.rates[found.lowest] > 0.5


def test_numbers_that_are_not_finite_are_a_divergence():
    losses = curve(diverges_at=10.0)[:60] + [None] * 2
    found = lr_range.analyse("x", RATES[:62], losses)
    assert found.diverged == 60
    rows = list(csv.DictReader(io.StringIO(lr_range.render_table(found))))
    assert [row["loss"] == "" for row in rows] == [False] * 60 + [True] * 2
    assert float(rows[7]["lr"]) == RATES[7] and float(rows[7]["loss"]) == losses[7] and rows[7]["step"] == "8"


def test_noise_alone_is_no_divergence():
    for seed in range(30):
        dice = random.Random(seed)
        assert lr_range.analyse("x", RATES, [3.3 + 0.05 * dice.gauss(0, 1) for _ in RATES]).diverged is None


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="only 3 steps"):
        lr_range.analyse("x", RATES[:4], [3.0, 3.0, 3.0, None])


def test_the_picture_shows_the_limit(tmp_path):
    pytest.importorskip("matplotlib")
    found = lr_range.analyse("x", RATES, curve(diverges_at=0.1))
    axes = lr_range.draw(found).axes[0]
    labels = [line.get_label() for line in axes.get_lines()]
    assert any(label.startswith("diverged at") for label in labels) and axes.get_xscale() == "log"
    low, high = axes.get_ylim()
    assert low < min(found.smooth) and math.isfinite(high)
