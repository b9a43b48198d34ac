"""Resizing a learned position table: what is kept, what is new, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prottrans_hpc import architecture
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.stage import find, run_stage
from prottrans_hpc.train import checkpoint
from prottrans_hpc.train.position_table import with_positions

WITH_TABLES = ("prot_albert", "prot_bert", "prot_electra", "protein_lm")


def model_of(name: str) -> tuple[architecture.Architecture, Any, Any]:
    record = architecture.get(name)
    shape = record.size("tiny").shape
    module = find(record.build)(shape)
    module.initialise(1)
    return record, shape, module


@pytest.mark.parametrize("name", WITH_TABLES)
@pytest.mark.parametrize("num_rows", [100, 40_000])
def test_what_fits_is_kept_and_the_model_loads(name: str, num_rows: int) -> None:
    record, shape, module = model_of(name)
    wanted, weights, notes = with_positions(record, shape, module.state_dict(), num_rows)
    resized = find(record.build)(wanted)
    resized.load_state_dict(weights, strict=True)
    assert wanted.max_positions == num_rows and sum(p.numel() for p in resized.parameters()) == record.num_parameters(wanted)
    for key, tensor in module.state_dict().items():
        kept = weights[key][: len(tensor)]
        assert torch.equal(kept, tensor[: len(kept)])
    assert len(notes) == 1 and f"{num_rows:,}" in notes[0]


@pytest.mark.parametrize("name", WITH_TABLES)
def test_new_rows_are_random_as_before_a_training_and_the_same_each_time(name: str) -> None:
    record, shape, module = model_of(name)
    first, second = (with_positions(record, shape, module.state_dict(), 40_000)[1] for _ in range(2))
    (table,) = [key for key in first if key.endswith("positions.weight")]
    new = first[table][shape.max_positions :]
    assert torch.equal(first[table], second[table])
    assert new.std().item() == pytest.approx(shape.initializer_range, rel=0.02) and new.mean().item() == pytest.approx(0.0, abs=0.001)


def test_as_many_as_there_are_changes_nothing() -> None:
    record, shape, module = model_of("prot_bert")
    same, weights, notes = with_positions(record, shape, module.state_dict(), shape.max_positions)
    assert same == shape and notes == () and all(torch.equal(weights[key], tensor) for key, tensor in module.state_dict().items())


@pytest.mark.parametrize("name", ["prot_t5", "prot_txl", "prot_xlnet"])
def test_a_model_without_a_table_says_so(name: str) -> None:
    record, shape, module = model_of(name)
    with pytest.raises(ConfigError, match=f"{name} has no table of positions: it takes sequences of any length"):
        with_positions(record, shape, module.state_dict(), 40_000)


def test_there_and_back_through_export_and_import(tmp_path: Path) -> None:
    record, shape, module = model_of("prot_bert")
    source = tmp_path / "source"
    checkpoint.write_model_checkpoint(source, record=record, shape=shape, weights=module.state_dict(), origin={"imported_from": "a test"})
    request = {"source": str(source), "to": "hf", "out": str(tmp_path / "wide"), "json": False, "positions": 40_000}
    run_stage("export", request)
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["max_position_embeddings"] == 40_000
    run_stage("import", {"source": str(tmp_path / "wide"), "out": str(tmp_path / "back"), "json": False, "positions": shape.max_positions})
    _, same, weights = checkpoint.load_model(tmp_path / "back")
    assert same == shape
    assert all(torch.equal(weights[key], tensor) for key, tensor in module.state_dict().items())
