"""Whole runs of models with lanes whose matrices a tensor group shares: killed, resumed, moved to other layouts, exported, embedded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from prottrans_hpc import architecture
from prottrans_hpc.models import huggingface
from prottrans_hpc.run_dir import RunDir
from prottrans_hpc.train.checkpoint import Checkpoint, find_checkpoint, read_checkpoint
from prottrans_hpc.train.lane_memory import parse_name

SHORT = ("phases.0.steps=6", "phases.0.global_batch_size=8", "loading.bin_residues=100", "checkpoint.every_steps=1", "checkpoint.keep_last=9")
TENSOR = ("parallel.tensor_ranks=2",)
BOTH = ("parallel.sharding=full", "parallel.tensor_ranks=2")
EXACT = ("step", "phase", "epoch", "samples", "order", "lr", "num_sequences", "num_residues", "num_targets")


def _whole(path: Path) -> Checkpoint:
    return read_checkpoint(path, lanes_of=lambda num_lanes: range(num_lanes))


def _memory(folder: Path) -> torch.Tensor:
    found = _whole(find_checkpoint(folder)).memory
    assert found is not None
    return found[1]


def _same_to_tolerance(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["state"] == expected["state"]
    for kind in ("metrics", "validation"):
        assert [[line[key] for key in EXACT if key in line] for line in found[kind]] == [[line[key] for key in EXACT if key in line] for line in expected[kind]]
        assert [line["loss"] for line in found[kind]] == pytest.approx([line["loss"] for line in expected[kind]], rel=3e-5)


def test_killed_and_resumed_or_moved_the_lanes_of_a_tensor_group_go_on(
    tmp_path: Path, make_run: Callable[..., Path], start_ranks: Any, outcome: Callable[[Path], dict[str, Any]], same: Any
) -> None:
    straight = make_run(tmp_path / "straight", *SHORT, *TENSOR, name="tiny_prot_txl")
    start_ranks(straight, 2).end(0)
    expected, memory = outcome(straight), _memory(straight)
    files = sorted(path.name for path in find_checkpoint(straight).glob("memory-*"))
    assert [(parse_name(name).first, parse_name(name).end) for name in files] == [(0, 8)], "a tensor group remembers its lanes once"
    killed = make_run(tmp_path / "killed", *SHORT, *TENSOR, name="tiny_prot_txl")
    gang = start_ranks(killed, 2)
    gang.wait_for_step(3)
    gang.kill()
    moved = Path(shutil.copytree(killed, tmp_path / "moved"))
    start_ranks(killed, 2).end(0)
    same(outcome(killed), expected)
    assert torch.equal(_memory(killed), memory)
    start_ranks(make_run(moved, *SHORT, *BOTH, name="tiny_prot_txl", num_ranks=4), 4).end(0)
    _same_to_tolerance(outcome(moved), expected)
    files = sorted(path.name for path in find_checkpoint(moved).glob("memory-*"))
    assert [(parse_name(name).first, parse_name(name).end) for name in files] == [(0, 4), (4, 8)]
    assert (_memory(moved) - memory).abs().max() < 1e-3


def test_what_a_tensor_group_saved_is_trained_on_exported_and_embedded_with_whole(
    tmp_path: Path, make_run: Callable[..., Path], start_ranks: Any, outcome: Callable[[Path], dict[str, Any]], prottrans: Any, small_fasta: Path
) -> None:
    straight = make_run(tmp_path / "straight", *SHORT, name="tiny_prot_xlnet", num_ranks=1)
    start_ranks(straight, 1).end(0)
    expected = outcome(straight)
    cut = make_run(tmp_path / "cut", *SHORT, *BOTH, name="tiny_prot_xlnet", num_ranks=4, stop_after_step=3)
    start_ranks(cut, 4).end(0)
    source = RunDir(cut).checkpoint(3)
    assert _whole(source).state["format"] == 2, "its files hold pieces"
    of_cut, of_whole = (_whole(path).model for path in (source, RunDir(straight).checkpoint(3)))
    assert of_cut.keys() == of_whole.keys()
    for name, tensor in of_cut.items():
        torch.testing.assert_close(tensor, of_whole[name], rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    (tmp_path / "few.fasta").write_text("".join(f">{record}" for record in small_fasta.read_text().split(">")[1:4]))
    prottrans("embed", str(source), str(tmp_path / "few.fasta"), "--out", str(tmp_path / "few.h5"), "-q")
    with h5py.File(tmp_path / "few.h5") as file:
        vectors = [file[name][()] for name in file if isinstance(file[name], h5py.Dataset) and file[name].dtype.kind == "f"]
    assert vectors and all(np.isfinite(rows).all() and rows.std() > 0.01 for rows in vectors)
    prottrans("export", str(source), "--to", "hf", str(tmp_path / "hf"), "-q")
    back = huggingface.read_folder(tmp_path / "hf", [architecture.get("prot_xlnet")]).weights
    assert all(torch.equal(back[name], tensor) for name, tensor in of_cut.items())
    start_ranks(make_run(cut, *SHORT, name="tiny_prot_xlnet", num_ranks=1), 1).end(0)
    _same_to_tolerance(outcome(cut), expected)
