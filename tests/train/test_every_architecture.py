"""What every architecture promises when it trains, with real processes: it learns, and no stop and no world size changes what."""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from pathlib import Path

import pytest

from prottrans_hpc import architecture, config
from prottrans_hpc.recipe import read_recipe

TWINS = [name for name in config.shipped_names("jobs") if name.startswith("tiny_")]
STEPS = 16


def test_every_architecture_has_a_twin():
    assert {read_recipe(name).architecture.name for name in TWINS} == set(architecture.BUILT_IN)


@pytest.fixture(scope="module", params=TWINS)
def twin(request):
    return str(request.param)


PREDICT_ENDS = ("tiny_prot_txl", "tiny_prot_t5")
"""They predict the ends of proteins, too."""
SHORT_OF_IT = {"tiny_prot_txl": 0.003}
"""Nats. From the left alone, with what it remembers, it comes to all frequencies in 30 steps, and no further."""


def entropy_of(corpus: Path, *, with_ends: bool = False) -> float:
    """Of the frequencies of residues (and of ends, one a protein), nats: the loss of a model that knows nothing else."""
    index = json.loads((corpus / "index.json").read_text())
    counts = [count for count in index["residue_counts"].values() if count] + ([index["sequences"]] if with_ends else [])
    return -sum(count / sum(counts) * math.log(count / sum(counts)) for count in counts)


def test_it_learns_more_than_the_residue_frequencies_in_30_steps_of_two_ranks(twin, tmp_path, prottrans, small_corpus):
    run = tmp_path / "run"
    arguments = ("--corpus", str(small_corpus), "--run-dir", str(run), "--nodes", "2", "--steps", "30", "--set", "validation.every_steps=0", "-q")
    prottrans("pretrain", twin, *arguments, timeout=500)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # Where the loss has several parts, the first is that of predicted residues.
    parts = architecture.get(read_recipe(twin).architecture.name).loss_parts
    losses = [line[parts[0] if parts else "loss"] for line in lines]
    limit = entropy_of(small_corpus, with_ends=twin in PREDICT_ENDS) + SHORT_OF_IT.get(twin, 0.0)
    assert losses[0] > limit
    assert sum(losses[-5:]) / 5 < limit, losses


@pytest.fixture(scope="module")
def straight(twin, tmp_path_factory, make_run):
    return make_run(tmp_path_factory.mktemp("straight") / "run", name=twin)


def test_killed_and_resumed_or_moved_it_is_the_straight_run(twin, straight, tmp_path, make_run, start_ranks, outcome, same):
    start_ranks(straight, 2).end(0)
    expected = outcome(straight)
    assert [line["step"] for line in expected["metrics"]] == list(range(1, STEPS + 1))

    killed, dice = make_run(tmp_path / "killed", name=twin), random.Random(twin)
    gang = start_ranks(killed, 2)
    gang.wait_for_step(dice.randint(6, STEPS - 2))
    time.sleep(dice.random() * 0.05)
    gang.kill()
    moved = tmp_path / "moved"
    shutil.copytree(killed, moved)
    start_ranks(killed, 2).end(0)
    same(outcome(killed), expected)

    make_run(moved, num_ranks=3, name=twin)
    start_ranks(moved, 3).end(0)
    _same_to_tolerance(outcome(moved), expected)


def _same_to_tolerance(found, expected):
    exact = ("step", "phase", "epoch", "samples", "order", "lr", "num_sequences", "num_residues", "num_targets")
    assert [[line[key] for key in exact] for line in found["metrics"]] == [[line[key] for key in exact] for line in expected["metrics"]]
    for losses in ("metrics", "validation"):
        assert [line["loss"] for line in found[losses]] == pytest.approx([line["loss"] for line in expected[losses]], rel=1e-4)
    assert found["state"] == expected["state"]
