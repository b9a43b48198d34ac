"""A model with lanes that was killed, or moved to another world size, goes on with their memory as if nothing had been: real processes."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from prottrans_hpc.train.checkpoint import find_checkpoint, read_checkpoint
from prottrans_hpc.train.lane_memory import parse_name

# 12 lanes of 48 tokens: three or more micro batches a rank, and an epoch of the 40 proteins ends after some 16 steps.
LANES = ("objective.protein_end=reset", "phases.0.global_batch_size=12", "phases.0.steps=20", "loading.bin_residues=100")


@pytest.fixture(scope="module")
def few_proteins(tmp_path_factory, small_fasta, prottrans):
    folder = tmp_path_factory.mktemp("few")
    records = small_fasta.read_text().split(">")[1:41]
    (folder / "few.fasta").write_text("".join(f">{record}" for record in records))
    prottrans("preprocess", str(folder / "few.fasta"), "--out", str(folder / "corpus"), "--validation", "0.1", "-q")
    return folder / "corpus"


@pytest.fixture(scope="module")
def make_lanes(make_run, few_proteins):
    """`make_lanes(folder, settings..., num_ranks=2)`: the run.json of a micro run with lanes."""
    return lambda folder, *settings, **changes: make_run(folder, *LANES, *settings, name="tiny_prot_txl", corpus=few_proteins, **changes)


@pytest.fixture(scope="module")
def remembered():
    """`remembered(run_dir)`: the memory of all lanes in the newest checkpoint."""

    def read(folder):
        found = read_checkpoint(find_checkpoint(folder), lanes_of=lambda num_lanes: range(num_lanes))
        return found.memory[1].numpy()

    return read


@pytest.fixture(scope="module")
def straight(tmp_path_factory, make_lanes, outcome, remembered):
    known = {}

    def run(start_ranks, num_ranks):
        if num_ranks not in known:
            folder = make_lanes(tmp_path_factory.mktemp("straight") / "run", num_ranks=num_ranks)
            start_ranks(folder, num_ranks).end(0)
            known[num_ranks] = outcome(folder), remembered(folder)
        return known[num_ranks]

    return run


def test_a_run_with_lanes_leaves_their_memory(tmp_path, make_lanes, start_ranks, straight):
    expected, memory = straight(start_ranks, 2)
    lines = expected["metrics"]
    assert (lines[0]["epoch"], lines[-1]["epoch"]) == (0, 1), "an epoch has ended on the way"
    assert len({line["order"] for line in lines}) == len(lines)
    assert memory.shape == (12, 2, 64, 64) and np.isfinite(memory).all() and np.abs(memory).max() > 0.1
    assert lines[0]["num_targets"] <= 12 * 48 and lines[-1]["samples"] == sum(line["num_sequences"] for line in lines)


@pytest.mark.parametrize("num_ranks", [pytest.param(number, marks=pytest.mark.slow) for number in (1, 2)])
def test_killed_and_resumed_is_bitwise_the_straight_run(num_ranks, tmp_path, make_lanes, start_ranks, straight, outcome, same, remembered):
    expected, memory = straight(start_ranks, num_ranks)
    folder = make_lanes(tmp_path / "run", "checkpoint.every_steps=1", num_ranks=num_ranks)
    dice = random.Random(num_ranks)
    gang = start_ranks(folder, num_ranks)
    gang.wait_for_step(dice.randint(3, 9))
    time.sleep(dice.random() * 0.05)
    gang.kill()
    start_ranks(folder, num_ranks).end(0)
    same(outcome(folder), expected)
    assert np.array_equal(remembered(folder), memory)
    assert not [path for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")]


def _poisoned(steps):
    """`start_ranks(..., **_poisoned(steps))`: in these steps, once, neither loss nor memory of rank 1 are numbers."""
    poison = {"steps": steps, "ranks": [1], "how": "memory", "passes": 1}
    return {"main": Path(__file__).with_name("poisoned_rank.py"), "env": {"POISON": json.dumps(poison)}}


def test_going_back_brings_the_memories_back(tmp_path, make_lanes, start_ranks, straight, outcome, same, remembered, history):
    expected, memory = straight(start_ranks, 2)
    folder = make_lanes(tmp_path / "run", num_ranks=2)
    start_ranks(folder, 2, **_poisoned([5, 6, 7])).end(0)
    same(outcome(folder), expected)
    assert np.array_equal(remembered(folder), memory)
    (back,) = [event for event in history(folder) if event["event"] == "went back"]
    assert (back["step"], back["to"]) == (7, 3)


def test_memories_that_are_no_numbers_are_forgotten_with_their_step(tmp_path, make_lanes, start_ranks, straight, remembered):
    """On all ranks: else they would stay in the lanes for good."""
    expected, _ = straight(start_ranks, 2)
    folder = make_lanes(tmp_path / "run", num_ranks=2, stop_after_step=7)
    start_ranks(folder, 2, **_poisoned([5])).end(0)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [False] * 4 + [True] + [False] * 2
    assert [line["order"] for line in lines] == [line["order"] for line in expected["metrics"][:7]]
    memory = remembered(folder)
    assert memory.shape == (12, 2, 64, 64) and np.isfinite(memory).all()


def test_resume_at_other_world_sizes(tmp_path, make_lanes, start_ranks, straight, outcome, remembered):
    expected, memory = straight(start_ranks, 2)
    half = make_lanes(tmp_path / "half", num_ranks=2, stop_after_step=7)
    start_ranks(half, 2).end(0)
    files = sorted(path.name for path in (half / "checkpoints" / "step-00000007").glob("memory-*"))
    assert [(parse_name(name).first, parse_name(name).end, parse_name(name).num_lanes) for name in files] == [(0, 6, 12), (6, 12, 12)]
    # Five ranks do not divide the lanes: some have one more, and the others a micro batch without any.
    for num_ranks, bin_residues in ((1, 150), (5, 48)):
        folder = tmp_path / f"on-{num_ranks}"
        shutil.copytree(half, folder)
        make_lanes(folder, f"loading.bin_residues={bin_residues}", "loading.uneven_lanes=true", num_ranks=num_ranks)
        start_ranks(folder, num_ranks).end(0)
        found = outcome(folder)
        exact = ("step", "phase", "epoch", "samples", "order", "lr", "num_sequences", "num_residues", "num_targets")
        assert [[line[key] for key in exact] for line in found["metrics"]] == [[line[key] for key in exact] for line in expected["metrics"]]
        assert [line["loss"] for line in found["metrics"]] == pytest.approx([line["loss"] for line in expected["metrics"]], rel=3e-5)
        assert [line["loss"] for line in found["validation"]] == pytest.approx([line["loss"] for line in expected["validation"]], rel=3e-5)
        assert np.abs(remembered(folder) - memory).max() < 1e-3


@pytest.mark.slow
def test_the_memory_matters(tmp_path, make_lanes, start_ranks, straight):
    """A resume without it is another run, and says so."""
    expected, _ = straight(start_ranks, 2)
    folder = make_lanes(tmp_path / "run", "checkpoint.lane_memory=dropped", num_ranks=2, stop_after_step=7)
    start_ranks(folder, 2).end(0)
    assert not list(folder.glob("checkpoints/*/memory-*"))
    make_lanes(folder, num_ranks=2)
    start_ranks(folder, 2).end(0)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses, before = ([line["loss"] for line in some] for some in (lines, expected["metrics"]))
    assert losses[:7] == before[:7] and losses[7] != before[7]
    assert "holds no memory of the lanes" in "".join(path.read_text() for path in (folder / "logs").glob("*.log"))
