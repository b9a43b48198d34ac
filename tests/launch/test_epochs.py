"""A warm-up in epochs is the steps in which the real sample order goes through the corpus so often."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from prottrans_hpc import architecture
from prottrans_hpc.corpus.order import ArrayLengths, SampleOrder, SamplePosition, next_step
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.launch.checks import CorpusFacts
from prottrans_hpc.launch.epochs import resolve_warmup, steps_per_epoch
from prottrans_hpc.recipe import Recipe, read_recipe

if TYPE_CHECKING:
    from tests.conftest import Prottrans

LENGTHS = np.random.default_rng(0).integers(40, 900, 3000).astype(np.int64)
FACTS = CorpusFacts(Path("/corpus"), "0" * 64, len(LENGTHS), int(LENGTHS.sum()), 0)
BERT = architecture.get("prot_bert")


def tiny(*settings: str) -> Recipe:
    return read_recipe("tiny_prot_bert", ("phases.0.warmup_steps=0", *settings))


def steps_until_next_epoch(recipe: Recipe) -> int:
    order = SampleOrder(ArrayLengths(LENGTHS), seed=1, order=recipe.order, max_residues=recipe.phases[0].max_residues)
    position, steps = SamplePosition(), 0
    while position.epoch == 0:
        _, position = next_step(order, position, recipe.phases[0])
        steps += 1
    return steps


@pytest.mark.parametrize("size", [1, 64, 1000])
def test_an_epoch_of_whole_sequences_is_exact(size: int) -> None:
    recipe = tiny(f"phases.0.global_batch_size={size}", "phases.0.warmup_epochs=1.0", "phases.0.steps=100_000")
    (phase,) = resolve_warmup(recipe, BERT, FACTS).phases
    assert (phase.warmup_steps, phase.warmup_epochs) == (steps_until_next_epoch(recipe), None)


@pytest.mark.parametrize("changes", [{"order.long_sequences": "split"}, {"phases.0.global_batch_residues": "20_000"}])
def test_an_epoch_by_the_mean_length_is_close(changes: dict[str, str]) -> None:
    settings = [f"{key}={value}" for key, value in changes.items()]
    recipe = read_recipe("tiny_prot_bert", ("phases.0.max_residues=900", *settings[:1])) if "order.long_sequences" in changes else tiny()
    if "phases.0.global_batch_residues" in changes:
        phase = dataclasses.replace(recipe.phases[0], global_batch_size=None, global_batch_residues=20_000, max_residues=900)
        recipe = dataclasses.replace(recipe, phases=(phase,))
    assert steps_per_epoch(recipe, BERT, FACTS) == [pytest.approx(steps_until_next_epoch(recipe), rel=0.05)]


def test_an_epoch_of_lanes_counts_tokens() -> None:
    lanes = dataclasses.replace(BERT, lanes=True)
    recipe = tiny("phases.0.global_batch_size=8", "phases.0.max_residues=128")
    assert steps_per_epoch(recipe, lanes, FACTS) == [(int(LENGTHS.sum()) + 2 * len(LENGTHS)) // (8 * 128)]


def test_each_phase_has_its_own_and_a_recipe_without_is_left_alone() -> None:
    two = tiny("phases=[{steps=100,max_residues=512,global_batch_size=60,warmup_epochs=0.5},{steps=90,max_residues=512,global_batch_size=6,warmup_steps=7}]")
    assert [phase.warmup_steps for phase in resolve_warmup(two, BERT, FACTS).phases] == [25, 7]
    assert resolve_warmup(tiny(), BERT, FACTS) == tiny()


def test_a_plan_tells_how_much_of_the_corpus_a_warm_up_is(small_corpus: Path, prottrans: Prottrans) -> None:
    command = ["plan", "tiny_prot_bert", "--corpus", str(small_corpus), "--set", "phases.0.global_batch_size=10", "--set", "phases.0.warmup_steps=0"]
    num_sequences = json.loads((small_corpus / "index.json").read_text())["splits"]["train"]["sequences"]
    (phase,) = json.loads(prottrans(*command, "--set", "phases.0.warmup_epochs=0.5", "--json").stdout)["phases"]
    assert (phase["steps"], phase["warmup_steps"], phase["steps_per_epoch"]) == (200, -(-num_sequences // 20), num_sequences / 10)
    said = prottrans("plan", "tiny_prot_bert", "--machine", "laptop", "--set", "phases.0.warmup_steps=0", "--set", "phases.0.warmup_epochs=0.5").stdout
    assert "warm-up:  phase 0, 0.5 epochs to a learning rate of 0.03\n" in said


def test_what_cannot_be_is_told_with_what_could() -> None:
    recipe = tiny("phases.0.warmup_epochs=5.0", "phases.0.steps=200")
    with pytest.raises(ConfigError, match=r"is 235 steps of this corpus \(46.9 steps an epoch\), but the phase has 200: at most 4.27 epochs"):
        resolve_warmup(recipe, BERT, FACTS)
    with pytest.raises(ConfigError, match=r"the phase has room for 99: at most 2.11 epochs"):
        resolve_warmup(tiny("phases.0.warmup_epochs=5.0", "phases.0.decay_steps=100"), BERT, FACTS)
    with pytest.raises(ConfigError, match="not on this machine"):
        resolve_warmup(recipe, BERT, CorpusFacts(Path("/corpus"), "", 0, 0, 0))
    with pytest.raises(ConfigError, match="either warmup_steps or warmup_epochs"):
        read_recipe("tiny_prot_bert", ("phases.0.warmup_epochs=1.0",))


def test_a_run_has_the_steps_and_is_found_again(small_corpus: Path, tmp_path: Path, prottrans: Prottrans) -> None:
    command: list[Any] = ["pretrain", "tiny_prot_bert", "--corpus", str(small_corpus), "--steps", "1"]
    command += ["--set", "phases.0.warmup_steps=0", "--set", "phases.0.warmup_epochs=0.5", "--set", "phases.0.global_batch_size=16"]
    prottrans(*command, cwd=tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    (phase,) = json.loads((run / "run.json").read_text())["recipe"]["phases"]
    num_sequences = json.loads((small_corpus / "index.json").read_text())["splits"]["train"]["sequences"]
    assert (phase["warmup_steps"], phase["warmup_epochs"]) == (-(-num_sequences // 32), None)
    rate = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["lr"]
    assert rate == pytest.approx(3e-2 / phase["warmup_steps"])
    assert "newest checkpoint: step 1 of 1" in prottrans(*command, cwd=tmp_path).stderr
