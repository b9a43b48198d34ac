"""What `corpus show` prints and draws."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prottrans_hpc import stage, terminal
from prottrans_hpc.corpus.index import Index
from prottrans_hpc.corpus.statistics import unigram_entropy

from .conftest import Build, Records, fasta_text, preprocess_request


@pytest.fixture
def corpora(tmp_path: Path, proteins: Records, build_corpus: Build) -> list[Index]:
    found = []
    for name, records in {"first": proteins[:100], "second": [*proteins[100:400], (b"rare", b"MUU")]}.items():
        (tmp_path / f"{name}.fasta").write_bytes(fasta_text(records))
        found.append(build_corpus(tmp_path / f"{name}.fasta", name=name, validation=0.1, keep_rare=name == "second"))
    return found


def show(*corpora: Index, as_json: bool = False, plot: Path | None = None) -> None:
    paths = [str(index.path) for index in corpora]
    stage.run_stage("corpus-show", {"corpora": paths, "json": as_json, "plot": str(plot) if plot else None})


def test_one_corpus_as_json_is_an_object(corpora: list[Index], capsys: pytest.CaptureFixture[str]) -> None:
    show(corpora[0], as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert (printed["sequences"], printed["residues"], printed["bytes"]) == (100, corpora[0].num_residues, corpora[0].num_bytes)
    assert printed["sha256"] == corpora[0].sha256
    assert printed["splits"]["train"]["sequences"] + printed["splits"]["validation"]["sequences"] == 100
    assert 2.7 < printed["unigram_entropy"] < 3.0


def test_several_corpora_as_json_are_a_list(corpora: list[Index], capsys: pytest.CaptureFixture[str]) -> None:
    show(*corpora, as_json=True)
    assert [entry["sequences"] for entry in json.loads(capsys.readouterr().out)] == [100, 301]


def test_the_table_has_a_column_a_corpus(corpora: list[Index], capsys: pytest.CaptureFixture[str]) -> None:
    show(*corpora)
    printed = capsys.readouterr().out
    rows = {cells[0]: cells[1:] for line in printed.splitlines() if (cells := [cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]])}
    assert rows[""] == ["first", "second"]
    assert rows["proteins"] == ["100", "301"]
    assert rows["U"] == ["0.000 %", f"{200 / corpora[1].num_residues:.3f} %"]


def test_a_quiet_preprocess_prints_nothing_but_what_was_asked_for(tmp_path: Path, corpora: list[Index], capsys: pytest.CaptureFixture[str]) -> None:
    request = preprocess_request(tmp_path / "first.fasta", out=tmp_path / "quiet") | {"json": False}
    terminal.set_verbosity(terminal.QUIET)
    stage.run_stage("preprocess", request)
    assert capsys.readouterr() == ("", "")
    stage.run_stage("preprocess", request | {"json": True})
    assert json.loads(capsys.readouterr().out)["sequences"] == 100
    show(corpora[0])
    assert "proteins" in capsys.readouterr().out


@pytest.mark.parametrize("num", [1, 2])
def test_the_picture_is_a_png(tmp_path: Path, corpora: list[Index], num: int) -> None:
    pytest.importorskip("matplotlib")
    show(*corpora[:num], plot=tmp_path / "corpora.png")
    data = (tmp_path / "corpora.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["corpora.png"]


def test_names_from_outside_cannot_steer_the_terminal(tmp_path: Path, proteins: Records, build_corpus: Build, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.fasta").write_bytes(fasta_text(proteins[:9]))
    show(build_corpus(tmp_path / "a.fasta", name="\x1b[31m[bold]evil"))
    printed = capsys.readouterr().out
    assert "\x1b[31m" not in printed
    assert "[bold]evil" in printed


def test_entropy_of_equal_shares_is_the_logarithm_of_their_number() -> None:
    assert unigram_entropy({"A": 5, "C": 5, "D": 5, "E": 5, "X": 0}) == pytest.approx(1.3862943611)
    assert unigram_entropy({}) == 0
