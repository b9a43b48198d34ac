"""Half weights of cut models, with and without fp32 masters: the steps of whole ones, whose checkpoints they share, over real ranks."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prottrans_hpc.precision_levels import LEVELS
from prottrans_hpc.run_dir import RunDir
from prottrans_hpc.train.checkpoint import Checkpoint, read_checkpoint

QUICK = ("phases.0.steps=6", "phases.0.global_batch_size=8", "validation.every_steps=6", "checkpoint.every_steps=1", "checkpoint.keep_last=9")
FULL = ("parallel.sharding=full",)
TENSOR = ("parallel.tensor_ranks=2",)
COPIES = ("parallel.sharding=hybrid", "parallel.shard_ranks=2")
OVERFLOWS = ("loss_scaling.initial=67108864.0",)
EXACT = ("step", "phase", "epoch", "samples", "order", "num_sequences", "num_residues", "num_targets", "loss_scale", "skipped")
Same = Callable[[dict[str, Any], dict[str, Any]], None]


def _held(folder: Path, step: int) -> Checkpoint:
    return read_checkpoint(RunDir(folder).checkpoint(step))


def _kinds(found: Checkpoint) -> dict[str, Any]:
    return {f"{kind}/{name}": (tensor.dtype, tensor.shape) for kind in ("model", "optimizer") for name, tensor in getattr(found, kind).items()}


def _same_to_tolerance(found: dict[str, Any], expected: dict[str, Any], loss: float) -> None:
    for kind in ("metrics", "validation"):
        assert [[line[key] for key in EXACT if key in line] for line in found[kind]] == [[line[key] for key in EXACT if key in line] for line in expected[kind]]
        losses, others = ([line["loss"] for line in run[kind] if line["loss"] is not None] for run in (found, expected))  # None: skipped
        assert losses == pytest.approx(others, rel=loss) and losses


@pytest.mark.parametrize(
    ("name", "precision", "num_ranks", "settings"),
    [
        # ALBERT applies its norms again and again, T5 has its own, and its scale overflows; XLNet's biases are cut with its heads.
        ("tiny_prot_albert", "bf16_o2", 2, FULL),
        ("tiny_prot_t5", "fp16_o2", 4, (*FULL, *TENSOR, *OVERFLOWS)),
        ("tiny_prot_xlnet", "bf16_o2", 2, TENSOR),
        pytest.param("tiny_prot_bert", "bf16_o3", 4, COPIES, marks=pytest.mark.slow),
        pytest.param("tiny_prot_txl", "fp16_o3", 2, TENSOR, marks=pytest.mark.slow),
    ],
)
def test_a_cut_model_trains_as_a_whole_one(
    name: str,
    precision: str,
    num_ranks: int,
    settings: tuple[str, ...],
    tmp_path: Path,
    make_run: Callable[..., Path],
    start_ranks: Any,
    outcome: Callable[[Path], dict[str, Any]],
) -> None:
    shared = (*QUICK, f"precision={precision}", *(setting for setting in settings if setting.startswith("loss_scaling")))
    whole = make_run(tmp_path / "whole", *shared, name=name, num_ranks=1)
    start_ranks(whole, 1).end(0)
    cut = make_run(tmp_path / "cut", *shared, *settings, name=name, num_ranks=num_ranks)
    start_ranks(cut, num_ranks).end(0)
    # Half gradients are summed in half, in another order, and ranks of a tensor group round their own partial products.
    _same_to_tolerance(outcome(cut), outcome(whole), 2e-3)
    held = _held(cut, 6)
    assert _kinds(held) == _kinds(_held(whole, 6))
    assert {tensor.dtype for name, tensor in held.optimizer.items() if name != "num_updates"} == {torch.float32}
    assert (torch.float32 if LEVELS[precision].has_masters else getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[LEVELS[precision].weights])) in {
        tensor.dtype for tensor in held.model.values()
    }
    if OVERFLOWS[0] in settings:
        lines = outcome(cut)["metrics"]
        assert lines[0]["skipped"] and not lines[-1]["skipped"]
        assert all(after["loss_scale"] == line["loss_scale"] / (2.0 if line["skipped"] else 1.0) for line, after in itertools.pairwise(lines))


def test_killed_and_resumed_or_moved_it_is_the_straight_run(
    tmp_path: Path, make_run: Callable[..., Path], start_ranks: Any, outcome: Callable[[Path], dict[str, Any]], same: Same
) -> None:
    shared = (*QUICK, "precision=fp16_o2", "loss_scaling.growth_every=3")
    straight = make_run(tmp_path / "straight", *shared, *FULL)
    start_ranks(straight, 2).end(0)
    expected = outcome(straight)
    killed = make_run(tmp_path / "killed", *shared, *FULL)
    gang = start_ranks(killed, 2)
    gang.wait_for_step(3)
    gang.kill()
    moved = Path(shutil.copytree(killed, tmp_path / "moved"))
    start_ranks(killed, 2).end(0)
    same(outcome(killed), expected)
    assert {line["loss_scale"] for line in expected["metrics"]} == {65536.0, 131072.0}
    start_ranks(make_run(moved, *shared, num_ranks=1, stop_after_step=5), 1).end(0)
    start_ranks(make_run(moved, *shared, *TENSOR), 2).end(0)
    found = outcome(moved)
    _same_to_tolerance(found, expected, 2e-3)
    assert found["state"] == expected["state"]
    assert found["tensors"].keys() == expected["tensors"].keys()
