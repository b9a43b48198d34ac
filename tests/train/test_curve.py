"""The loss curve of a run directory."""

from __future__ import annotations

import json
import math
import sys

import pytest

from prottrans_hpc import machine, recipe, run_dir
from prottrans_hpc.errors import CheckpointError, ResourceError
from prottrans_hpc.train import curve


@pytest.fixture
def a_run(tmp_path):
    """A run of 60 steps over a corpus of four equally common residues, resumed after step 30."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "index.json").write_text(json.dumps({"residue_counts": {"A": 5, "C": 5, "D": 5, "E": 5, "X": 0}}))
    folder = run_dir.prepare(tmp_path / "run")
    resolved = run_dir.Run(
        run_id="0" * 16,
        created="2026-01-01T00:00:00Z",
        version="0.1.0",
        recipe=recipe.read_recipe("tiny_prot_bert"),
        recipe_name="tiny_prot_bert",
        corpus=str(corpus),
        corpus_sha256="0" * 64,
        machine=machine.read_machine("laptop"),
        allocation=machine.Allocation(num_nodes=2, ranks_per_node=1, cpu_cores_per_rank=1, gpus_per_rank=0),
        stop_after_step=None,
    )
    run_dir.write_run(folder, resolved)
    folder.metrics.write_text("".join(json.dumps({"step": step, "loss": None if step == 7 else 3.0 - step / 100}) + "\n" for step in range(1, 61)))
    folder.validation.write_text(json.dumps({"step": 60, "loss": 2.5}) + "\n")
    events = [{"event": "start", "step": 0}, {"event": "stop", "step": 30, "exit_code": 75}, {"event": "start", "step": 30}]
    folder.history.write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def test_the_curve_is_what_the_run_recorded(a_run):
    read = curve.read_curve(a_run)
    assert len(read.training) == 59  # a skipped step has no loss
    assert read.training[-1] == (60, 2.4)
    assert read.validation == ((60, 2.5),)
    assert read.resumed_at == (30,)
    assert read.unigram_entropy == pytest.approx(math.log(4))
    assert read.title == "tiny_prot_bert, 2 ranks"


def test_a_running_run_may_end_in_half_a_line(a_run):
    with a_run.metrics.open("a") as file:
        file.write('{"step": 61, "lo')
    assert curve.read_curve(a_run).training[-1][0] == 60
    with a_run.metrics.open("a") as file:
        file.write('\n{"step": 61, "loss": 2.0}\n')  # the next start found the half, and went on behind it
    assert curve.read_curve(a_run).training[-1] == (61, 2.0)


def test_the_running_mean_is_centred():
    points = tuple((step, float(step)) for step in range(1, 6))
    assert curve.running_mean(points, width=3) == ((1, 1.5), (2, 2.0), (3, 3.0), (4, 4.0), (5, 4.5))


def test_the_picture_shows_every_curve(a_run):
    axes = curve.draw(curve.read_curve(a_run)).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [label.split(",")[0] for label in labels] == ["training", "training", "validation", "resumed", "residue frequencies alone (1.386)"]
    assert list(axes.lines[0].get_ydata())[-1] == 2.4


def test_the_command_writes_a_picture_and_a_summary(a_run, tmp_path, capsys):
    out = tmp_path / "loss.png"
    assert curve.main([str(a_run.path), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    for part in ("2.990 at step 1", "at step 60", "validation loss  2.500", "1.386", "after step 30", str(out)):
        assert part in said


def test_a_corpus_that_is_gone_and_no_validation_leave_a_curve(a_run):
    a_run.validation.unlink()
    (a_run.path.parent / "corpus" / "index.json").unlink()
    read = curve.read_curve(a_run)
    assert (read.validation, read.unigram_entropy) == ((), None)
    assert len(curve.draw(read).axes[0].lines) == 3


def test_a_run_without_a_step_says_so(a_run, tmp_path, capsys):
    a_run.metrics.unlink()
    with pytest.raises(CheckpointError, match="no finished step yet"):
        curve.read_curve(a_run)
    assert curve.main([str(a_run.path)]) == 66
    assert curve.main([str(tmp_path / "nowhere")]) == 66
    assert "is not a run directory" in capsys.readouterr().err


def test_without_matplotlib_the_command_that_installs_it_is_named(a_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ResourceError, match="plots"):
        curve.draw(curve.read_curve(a_run))
