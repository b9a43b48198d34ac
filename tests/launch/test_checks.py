"""What is refused before anything is started."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from prottrans_hpc.errors import CheckpointError, ConfigError, DataError
from prottrans_hpc.launch import checks
from prottrans_hpc.recipe import read_recipe


def write(corpus: Path, *, train: int = 10, validation: int = 2, shards: tuple[dict[str, Any], ...] = ()) -> Path:
    corpus.mkdir(exist_ok=True)
    splits = {
        "train": {"sequences": train, "residues": 100 * train, "bytes": 0, "shards": list(shards)},
        "validation": {"sequences": validation, "residues": 100 * validation, "bytes": 0, "shards": []},
    }
    (corpus / "index.json").write_text(json.dumps({"format": 1, "splits": splits}))
    return corpus


def test_facts_of_a_real_corpus(small_corpus: Path) -> None:
    facts = checks.read_corpus_facts(small_corpus)
    assert facts.train_sequences + facts.validation_sequences == 600
    assert facts.train_residues > 100 * facts.train_sequences
    assert facts.sha256 == hashlib.sha256((small_corpus / "index.json").read_bytes()).hexdigest()
    assert checks.remarks(read_recipe("tiny_prot_bert"), facts) == []


def test_a_corpus_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "nothing", tmp_path, tmp_path / "file"):
        with pytest.raises(CheckpointError, match="prottrans preprocess"):
            checks.read_corpus_facts(place)
    assert checks.read_corpus_facts(tmp_path / "elsewhere", must_exist=False).sha256 == ""


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"splits": {}}', '{"splits": {"train": 1, "validation": 2}}', "[" * 100_000, "\x00"])
def test_a_damaged_index(content: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(DataError, match="damaged"):
        checks.read_corpus_facts(tmp_path)


def test_a_missing_or_short_shard(tmp_path: Path) -> None:
    write(tmp_path, shards=({"file": "train-00000.h5", "bytes": 5},))
    with pytest.raises(DataError, match=r"train-00000\.h5 is missing"):
        checks.read_corpus_facts(tmp_path)
    (tmp_path / "train-00000.h5").write_bytes(b"abc")
    with pytest.raises(DataError, match="has 3 bytes, 5 were written"):
        checks.read_corpus_facts(tmp_path)
    (tmp_path / "train-00000.h5").write_bytes(b"abcde")
    assert checks.read_corpus_facts(tmp_path).train_sequences == 10


def test_an_empty_training_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training sequences"):
        checks.read_corpus_facts(write(tmp_path, train=0))


def test_what_may_surprise_is_said(tmp_path: Path) -> None:
    facts = checks.read_corpus_facts(write(tmp_path, train=3, validation=0))
    said = checks.remarks(read_recipe("tiny_prot_bert"), facts)
    assert any("no validation split" in line for line in said)
    assert any("a step takes 64 sequences, the corpus has 3" in line for line in said)


def test_an_objective_that_the_architecture_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from prottrans_hpc import architecture

    known = architecture.get("prot_bert")
    monkeypatch.setattr(architecture, "get", lambda name: dataclasses.replace(known, objectives=("causal",)))
    with pytest.raises(ConfigError, match="trained with causal"):
        checks.check_model(read_recipe("tiny_prot_bert"))


@pytest.mark.parametrize(("residues", "fits"), [(2558, True), (2559, False)])
def test_sequences_fit_the_position_table(residues: int, fits: bool) -> None:
    recipe = read_recipe("tiny_prot_bert", (f"phases.0.max_residues={residues}",))
    if fits:
        checks.check_model(recipe)
    else:
        with pytest.raises(ConfigError, match="at most 2558"):
            checks.check_model(recipe)


@pytest.mark.parametrize(("name", "has_lanes"), [("tiny_prot_txl", True), ("tiny_prot_xlnet", True), ("tiny_prot_bert", False)])
def test_lanes_have_no_long_sequences_to_split(name: str, has_lanes: bool) -> None:
    checks.check_model(read_recipe(name))
    recipe = read_recipe(name, ("order.long_sequences=split",))
    if has_lanes:
        with pytest.raises(ConfigError, match=r'order\.long_sequences is "split", but the lanes of .* read whole proteins of any length'):
            checks.check_model(recipe)
    else:
        checks.check_model(recipe)
