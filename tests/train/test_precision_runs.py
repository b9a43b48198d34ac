"""Training in every precision, with real processes: equal loss curves within a tolerance, exact resumes, loss scaling."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from prottrans_hpc.precision_levels import LEVELS
from prottrans_hpc.train.checkpoint import find_checkpoint, read_checkpoint

QUICK = ("phases.0.steps=8", "validation.every_steps=8", "checkpoint.every_steps=4", "optimizer.learning_rate=5e-3")


@pytest.fixture(scope="module")
def fp32(tmp_path_factory, make_run, outcome):
    """What fp32 leaves on one rank."""
    known: dict[str, Any] = {}

    def run(start_ranks):
        if not known:
            folder = make_run(tmp_path_factory.mktemp("fp32") / "run", *QUICK, num_ranks=1)
            start_ranks(folder, 1).end(0)
            known.update(outcome(folder))
        return known

    return run


@pytest.mark.parametrize("precision", [name for name in LEVELS if name != "fp32"])
def test_the_loss_curve_is_that_of_fp32(precision, tmp_path, make_run, start_ranks, outcome, fp32):
    """Stated: to 1 %, pure bf16 to 2 %, whose 8 bits swallow small updates; on a CPU tf32 is fp32 itself."""
    folder = make_run(tmp_path / "run", *QUICK, f"precision={precision}", num_ranks=1)
    start_ranks(folder, 1).end(0)
    found, expected = outcome(folder), fp32(start_ranks)
    curves = [[line["loss"] for line in run["metrics"]] for run in (found, expected)]
    if precision == "tf32":
        assert curves[0] == curves[1]
        return
    assert curves[0] != curves[1]
    tolerance = 2e-2 if precision == "bf16_o3" else 1e-2
    assert curves[0] == pytest.approx(curves[1], rel=tolerance)
    assert found["validation"][-1]["loss"] == pytest.approx(expected["validation"][-1]["loss"], rel=tolerance)
    assert [line.get("loss_scale") for line in found["metrics"]] == [65536.0 if LEVELS[precision].scales_loss else None] * 8


@pytest.mark.parametrize("precision", ["fp16_o2", pytest.param("bf16_o3", marks=pytest.mark.slow)])
def test_two_ranks_stopped_and_resumed_are_the_straight_run_to_the_bit(precision, tmp_path, make_run, start_ranks, outcome, same):
    settings = (*QUICK, f"precision={precision}", "loss_scaling.growth_every=3")
    straight = make_run(tmp_path / "straight", *settings)
    start_ranks(straight, 2).end(0)
    broken = make_run(tmp_path / "broken", *settings, stop_after_step=5)
    start_ranks(broken, 2).end(0)
    make_run(broken, *settings)
    start_ranks(broken, 2).end(0)
    same(outcome(broken), outcome(straight))
    if LEVELS[precision].scales_loss:
        assert [line["loss_scale"] for line in outcome(broken)["metrics"]] == [65536.0] * 3 + [131072.0] * 3 + [262144.0] * 2
        assert outcome(broken)["state"]["loss_scale"] == {"value": 262144.0, "num_good_steps": 2}


def test_two_ranks_train_as_one_does_with_half_weights(tmp_path, make_run, start_ranks, outcome):
    curves = []
    for num_ranks in (1, 2):
        folder = make_run(tmp_path / str(num_ranks), *QUICK, "precision=fp16_o2", num_ranks=num_ranks)
        start_ranks(folder, num_ranks).end(0)
        curves.append([line["loss"] for line in outcome(folder)["metrics"]])
    assert curves[0] == pytest.approx(curves[1], rel=3e-3)


def test_an_overflow_halves_the_scale_and_is_no_failure(tmp_path, make_run, start_ranks, outcome, history):
    """2^10 times the usual: the first steps overflow; with a limit of one bad step they would end the run."""
    settings = (*QUICK, "precision=fp16_o2", "loss_scaling.initial=67108864.0", "non_finite_limit=1")
    folder = make_run(tmp_path / "run", *settings, num_ranks=1)
    start_ranks(folder, 1).end(0)
    lines = outcome(folder)["metrics"]
    assert lines[0]["skipped"] and not all(line["skipped"] for line in lines)
    for line, following in itertools.pairwise(lines):
        assert following["loss_scale"] == line["loss_scale"] / (2.0 if line["skipped"] else 1.0)
    assert not [line for line in history(folder) if line.get("event") == "went back"]


def test_an_overflow_at_the_floor_is_a_failure(tmp_path, make_run, start_ranks):
    settings = (*QUICK, "precision=fp16_o2", "loss_scaling.initial=67108864.0", "loss_scaling.floor=67108864.0", "non_finite_limit=2")
    start_ranks(make_run(tmp_path / "run", *settings, num_ranks=1), 1).end(76)


def test_checkpoints_hold_the_masters_and_no_optimizer_holds_half_numbers(tmp_path, make_run, start_ranks):
    kinds = {}
    for precision in ("bf16_o2", "fp16_o3"):
        folder = make_run(tmp_path / precision, *QUICK, f"precision={precision}", num_ranks=1, stop_after_step=2)
        start_ranks(folder, 1).end(0)
        found = read_checkpoint(find_checkpoint(folder))
        kinds[precision] = {tensor.dtype for name, tensor in found.model.items() if not name.startswith(("pooler", "next_sentence"))}
        assert {tensor.dtype for name, tensor in found.optimizer.items() if name != "num_updates"} == {torch.float32}
    assert kinds == {"bf16_o2": {torch.float32}, "fp16_o3": {torch.float16}}
