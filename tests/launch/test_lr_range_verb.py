"""The sweep as a recipe and as a command."""

from __future__ import annotations

import csv
import itertools
from dataclasses import dataclass, replace

import pytest

from prottrans_hpc.errors import ConfigError
from prottrans_hpc.launch import lr_range
from prottrans_hpc.recipe import Recipe, read_recipe


@dataclass(frozen=True)
class Given:
    lr_range: str | None = ""
    steps: int | None = None
    chain: int | str | None = None
    detach: bool = False


def test_the_sweep_differs_from_the_recipe_in_its_schedule_alone() -> None:
    recipe = read_recipe("prot_bert")
    swept = lr_range.sweep(recipe, Given("1e-5:0.1", steps=200))
    assert (swept.num_steps, swept.optimizer.learning_rate) == (200, 0.1)
    assert (swept.schedule.decay, swept.schedule.first_fraction) == ("exponential_rise", pytest.approx(1e-4))
    first = recipe.phases[0]
    assert swept.phases == (replace(first, steps=200, warmup_steps=0),)
    same: Recipe = replace(
        swept, phases=recipe.phases, optimizer=recipe.optimizer, schedule=recipe.schedule, checkpoint=recipe.checkpoint, validation=recipe.validation
    )
    assert replace(same, divergence=recipe.divergence, non_finite_limit=recipe.non_finite_limit) == recipe


def test_the_default_range_is_around_the_peak() -> None:
    swept = lr_range.sweep(read_recipe("prot_bert"), Given())
    assert (swept.num_steps, swept.optimizer.learning_rate) == (lr_range.DEFAULT_STEPS, pytest.approx(0.2))
    assert swept.schedule.first_fraction == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Given("1e-5"), "LOW:HIGH"),
        (Given("1e-5:1:2"), "LOW:HIGH"),
        (Given("low:high"), "LOW:HIGH"),
        (Given("0:1"), "above 0"),
        (Given("-1:1"), "above 0"),
        (Given("1:0.1"), "at least twice"),
        (Given("1e-5:inf"), "at least twice"),
        (Given("nan:1"), "above 0"),
        (Given(steps=10), "at least --steps 20"),
        (Given(chain=2), "--chain"),
        (Given(detach=True), "--detach"),
    ],
)
def test_nonsense_is_refused(given: Given, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        lr_range.sweep(read_recipe("tiny_prot_bert"), given)


def test_the_command_sweeps_once_and_says_what_it_found(prottrans, small_corpus, tmp_path):
    small = ("--set", "phases.0.max_residues=48", "--set", "phases.0.global_batch_size=6", "--set", "loading.bin_residues=64")
    run = tmp_path / "sweep"
    arguments = ("pretrain", "tiny_prot_bert", "--corpus", str(small_corpus), "--run-dir", str(run), "--lr-range", "1e-3:100", "--steps", "24", *small, "-q")
    first = prottrans(*arguments).stdout
    assert "suggested peak" in first and "diverged        at a learning rate of" in first
    rows = list(csv.DictReader((run / "lr_range.csv").open()))
    assert float(rows[0]["lr"]) == pytest.approx(1e-3)
    assert [float(b["lr"]) / float(a["lr"]) for a, b in itertools.pairwise(rows)] == pytest.approx([1e5 ** (1 / 23)] * (len(rows) - 1))
    assert len(rows) == 24 or rows[-1]["loss"] == ""
    assert (run / "lr_range.png").read_bytes()[:4] == b"\x89PNG"
    lines = (run / "history.jsonl").read_text()
    assert prottrans(*arguments).stdout == first
    assert (run / "history.jsonl").read_text() == lines, "it was not run again"
