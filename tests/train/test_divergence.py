"""Spikes of the loss: the detector by itself, and runs that tell of them or go back and on with a lower rate."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

import pytest

from prottrans_hpc.recipe import Divergence
from prottrans_hpc.train.divergence import SpikeDetector

POISONED = Path(__file__).with_name("poisoned_rank.py")
WATCH = ("divergence.window=10", "divergence.patience=2", "divergence.z_score=20.0", "checkpoint.every_steps=5")


def noise(count: int, seed: int = 0) -> list[float]:
    dice = random.Random(seed)
    return [2.9 + 0.05 * dice.gauss(0, 1) for _ in range(count)]


def test_it_is_the_patience_th_high_step_in_a_row_and_told_once():
    detector = SpikeDetector(Divergence(window=50, patience=3))
    losses = noise(60)
    assert [detector.observe(loss) for loss in losses] == [None] * 60
    told = [detector.observe(loss) for loss in (5.0, 5.0, 2.9, 5.0, 5.0, 5.0, 5.0, 5.0, 2.9, 2.9)]
    assert [spike is not None for spike in told] == [False] * 5 + [True] + [False] * 4
    spike, window = told[5], [*losses[15:], 5.0, 5.0, 2.9, 5.0, 5.0]
    median = statistics.median(window)
    assert spike is not None and spike.median == median
    assert spike.z_score == pytest.approx((5.0 - median) / (1.4826 * statistics.median(abs(loss - median) for loss in window)))


def test_noise_falling_losses_and_single_outliers_are_no_spikes():
    detector = SpikeDetector(Divergence(window=50))
    falling = [loss + 0.3 - 0.3 * step / 5000 for step, loss in enumerate(noise(5000, 1))]
    falling[1000] = falling[2000] = falling[2001] = 9.0
    assert [step for step, loss in enumerate(falling) if detector.observe(loss)] == []


def test_nothing_is_told_before_the_window_is_full_nor_where_the_loss_falls():
    detector = SpikeDetector(Divergence(window=20, patience=1))
    assert not any(detector.observe(loss) for loss in [1.0, 99.0] * 9 + [1.0])
    detector = SpikeDetector(Divergence(window=20, patience=1))
    assert not any(detector.observe(loss) for loss in [3.0] * 20 + [1.0])
    assert SpikeDetector(Divergence(window=20, patience=1)).observe(1e9) is None


def test_a_loss_that_stands_still_needs_more_than_rounding():
    detector = SpikeDetector(Divergence(window=20, patience=1))
    assert not any(detector.observe(loss) for loss in [3.0] * 20 + [3.0001])
    assert detector.observe(3.5)


def test_the_state_goes_through_json_and_continues_alike():
    first, second = (SpikeDetector(Divergence(window=20, patience=2, action="rollback")) for _ in range(2))
    for loss in [*noise(30), 7.0]:
        first.observe(loss)
    first.lower(0.5, 1)
    first.observe(7.0)
    second.take(json.loads(json.dumps(first.to_json())))
    assert second.to_json() == first.to_json()
    assert first.is_suspicious and second.is_suspicious
    assert (second.rate_factor, second.num_rollbacks) == (0.25, 2)
    assert first.observe(7.0) == second.observe(7.0) is not None
    second.take(None)
    assert second.to_json() == SpikeDetector(Divergence(window=20)).to_json()


def spike_at(*steps: int, from_factor: float) -> dict[str, str]:
    return {"POISON": json.dumps({"steps": steps, "ranks": [0, 1], "how": "spike", "from_factor": from_factor})}


def test_a_spike_is_told_and_the_run_goes_on(tmp_path, make_run, start_ranks, outcome, history):
    folder = make_run(tmp_path / "run", *WATCH)
    start_ranks(folder, 2, main=POISONED, env=spike_at(12, 13, 14, from_factor=0.0)).end(0)
    told = [event for event in history(folder) if event["event"] == "spike"]
    lines = outcome(folder)["metrics"]
    assert [(event["step"], event["action"]) for event in told] == [(13, "log")]
    assert told[0]["loss"] == lines[12]["loss"] > 3 * told[0]["median"]
    assert [line["step"] for line in lines] == list(range(1, 17))


def test_a_rollback_lowers_the_rate_and_a_stop_in_the_middle_changes_nothing(tmp_path, make_run, start_ranks, outcome, same, history):
    settings = (*WATCH, "divergence.action=rollback")
    once = spike_at(12, 13, from_factor=1.0)
    straight = make_run(tmp_path / "straight", *settings)
    start_ranks(straight, 2, main=POISONED, env=once).end(0)
    expected = outcome(straight)
    assert [(event["step"], event["to"], event["rate_factor"]) for event in history(straight) if event["event"] == "went back"] == [(13, 10, 0.5)]
    calm = make_run(tmp_path / "calm", *settings)
    start_ranks(calm, 2).end(0)
    rates = [[line["lr"] for line in run["metrics"]] for run in (expected, outcome(calm))]
    assert rates[0] == [*rates[1][:10], *(rate / 2 for rate in rates[1][10:])]

    stopped = make_run(tmp_path / "stopped", *settings, stop_after_step=12)
    start_ranks(stopped, 2, main=POISONED, env=once).end(0)
    make_run(stopped, *settings)
    start_ranks(stopped, 2, main=POISONED, env=once).end(0)
    same(outcome(stopped), expected)
    assert [(event["step"], event["to"]) for event in history(stopped) if event["event"] == "went back"] == [(13, 10)]


def test_a_spike_that_no_lower_rate_prevents_ends_the_run(tmp_path, make_run, start_ranks, history):
    folder = make_run(tmp_path / "run", *WATCH, "divergence.action=rollback", "divergence.max_rollbacks=2", num_ranks=1)
    start_ranks(folder, 1, main=POISONED, env=spike_at(12, 13, from_factor=0.0)).end(76)
    assert [event["rate_factor"] for event in history(folder) if event["event"] == "went back"] == [0.5, 0.25]
    assert "after 2 rollbacks that brought the learning rate down to 0.25" in history(folder)[-1]["cause"]
