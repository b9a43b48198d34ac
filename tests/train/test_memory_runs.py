"""Training under memory policies, with real processes: lossless ones may change from start to start, and change no bit."""

from __future__ import annotations

import pytest

QUICK = ("phases.0.steps=4", "validation.every_steps=4", "checkpoint.every_steps=2")
SPARING = ("memory.recompute_every=1", "memory.recompute_keeps=attention_and_narrow", "memory.lms_limit_gib=0")


def test_two_ranks_under_changing_policies_are_the_plain_run_to_the_bit(tmp_path, make_run, start_ranks, outcome, same):
    straight = make_run(tmp_path / "straight", *QUICK)
    start_ranks(straight, 2).end(0)
    broken = make_run(tmp_path / "broken", *QUICK, *SPARING, stop_after_step=3)
    start_ranks(broken, 2).end(0)
    make_run(broken, *QUICK, "memory.recompute_every=2", "memory.recompute_keeps=attention")
    start_ranks(broken, 2).end(0)
    same(outcome(broken), outcome(straight))


def test_saved_in_bf16_the_loss_curve_is_close(tmp_path, make_run, start_ranks, outcome):
    curves = []
    for number, settings in enumerate(((), ("memory.saved=bf16", *SPARING))):
        folder = make_run(tmp_path / str(number), *QUICK, "loading.bin_residues=2048", "phases.0.global_batch_size=40", *settings, num_ranks=1)
        start_ranks(folder, 1).end(0)
        curves.append([line["loss"] for line in outcome(folder)["metrics"]])
    assert curves[0] != curves[1]
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
