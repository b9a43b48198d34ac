"""Steps of lanes on any number of ranks, and what is remembered of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from prottrans_hpc import architecture
from prottrans_hpc.architecture import Batch
from prottrans_hpc.corpus.index import read_index
from prottrans_hpc.corpus.order import SamplePosition
from prottrans_hpc.corpus.reader import Corpus
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.recipe import read_recipe
from prottrans_hpc.train.lane_loader import load_lane_steps, split_lanes
from prottrans_hpc.train.lane_memory import LaneMemory, lane_files, parse_name, rows_of
from prottrans_hpc.train.loader import Share

VOCABULARY = architecture.get("prot_txl").vocabulary
SETTINGS = ("objective.protein_end=reset", "phases.0.global_batch_size=12", "phases.0.max_residues=48", "phases.0.steps=8", "phases.0.warmup_steps=1")


@pytest.fixture(scope="module")
def corpus(small_corpus):
    return Corpus(read_index(small_corpus), "train")


def steps_of(corpus, rank, world_size, *settings, position=None, step=0):
    recipe = read_recipe("tiny_prot_txl", (*SETTINGS, *settings))
    return list(load_lane_steps(corpus, recipe, VOCABULARY, share=Share(rank, world_size), position=position or SamplePosition(), step=step))


@pytest.mark.parametrize("world_size", [2, 3, 12])
@pytest.mark.parametrize("bin_residues", [48, 100, 8192])
def test_every_world_size_and_packing_reads_the_same_lanes(corpus, world_size, bin_residues):
    alone = steps_of(corpus, 0, 1)
    ranks = [steps_of(corpus, rank, world_size, f"loading.bin_residues={bin_residues}") for rank in range(world_size)]
    for number, step in enumerate(alone):
        shares = [steps[number] for steps in ranks]
        batches = [batch for share in shares for batch in share.micro_batches]
        for name in ("tokens", "targets", "lanes", "documents", "carried"):
            assert torch.equal(torch.cat([getattr(batch, name) for batch in batches]), torch.cat([getattr(batch, name) for batch in step.micro_batches]))
        assert sum(share.lane_sums.num_samples for share in shares) == step.lane_sums.num_samples
        assert sum(share.lane_sums.fingerprint for share in shares) == step.lane_sums.fingerprint
        assert len({len(share.micro_batches) for share in shares}) == 1, "equally many on every rank"
        assert all(batch.max_length == 48 and len(batch.lanes) <= max(1, bin_residues // 48) for batch in batches)
    assert len({step.lane_sums.fingerprint for step in alone}) == len(alone)
    assert [step.begins_lanes for step in alone] == [True] + [False] * 7


def test_steps_go_on_from_a_position(corpus):
    whole = steps_of(corpus, 1, 3)
    rest = steps_of(corpus, 1, 3, position=whole[4].position_after, step=5)
    assert [step.lane_sums for step in rest] == [step.lane_sums for step in whole[5:]]
    assert all(torch.equal(mine.micro_batches[0].tokens, theirs.micro_batches[0].tokens) for mine, theirs in zip(rest, whole[5:], strict=True))


def test_a_phase_with_other_lanes_begins_with_an_epoch(corpus):
    recipe = read_recipe("tiny_prot_txl", SETTINGS)
    first = replace(recipe.phases[0], steps=3)
    phases = (first, replace(first, learning_rate=1e-3), replace(first, global_batch_size=6))
    steps = list(load_lane_steps(corpus, replace(recipe, phases=phases), VOCABULARY, share=Share(0, 1), position=SamplePosition(), step=0))
    assert [step.position_before for step in steps] == [SamplePosition(0, k) for k in range(6)] + [SamplePosition(1, k) for k in range(3)]
    assert [step.begins_lanes for step in steps] == [True, *[False] * 5, True, False, False]


def test_lanes_that_do_not_divide_are_refused(corpus):
    with pytest.raises(ConfigError, match=r"12 lanes .* over 5 ranks: each lane stays on one rank"):
        steps_of(corpus, 0, 5)
    with pytest.raises(ConfigError, match=r"needs phases\.N.global_batch_size"):
        recipe = read_recipe("tiny_prot_txl", SETTINGS)
        phase = replace(recipe.phases[0], global_batch_size=None, global_batch_residues=600)
        next(load_lane_steps(corpus, replace(recipe, phases=(phase,)), VOCABULARY, share=Share(0, 1), position=SamplePosition(), step=0))


def test_lanes_that_do_not_divide_may_be_shared_out_unevenly(corpus):
    recipe = read_recipe("tiny_prot_txl", (*SETTINGS, "loading.uneven_lanes=true"))
    phase = recipe.phases[0]
    bins = replace(recipe, loading=replace(recipe.loading, bin_residues=2 * phase.max_residues))
    shares = [split_lanes(bins, phase, Share(rank, 5)) for rank in range(5)]
    assert [[len(lanes) for lanes in batches] for batches in shares] == [[1, 1], [1, 1], [2, 1], [1, 1], [2, 1]]
    assert np.concatenate([lanes for batches in shares for lanes in batches]).tolist() == list(range(12))
    one_by_one = replace(recipe, loading=replace(recipe.loading, bin_residues=phase.max_residues))
    shares = [split_lanes(one_by_one, phase, Share(rank, 5)) for rank in range(5)]
    assert [[len(lanes) for lanes in batches] for batches in shares] == [[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1]]


def batch_of(lanes):
    empty = torch.empty(0, dtype=torch.long)
    return Batch(empty, empty, empty, empty, empty, empty, 0, 0, lanes=None if lanes is None else torch.tensor(lanes))


def test_each_micro_batch_gets_back_what_it_returned():
    memory = LaneMemory()
    assert memory.put_into(batch_of([4, 5]), 0).memory is None
    memory.take(0, torch.ones(2, 3))
    memory.take(1, torch.zeros(1, 3))
    assert torch.equal(memory.put_into(batch_of([4, 5]), 0).memory, torch.ones(2, 3))
    assert torch.equal(memory.put_into(batch_of([6]), 1).memory, torch.zeros(1, 3))
    assert list(memory.tensors(4)) == ["lane-00000004", "lane-00000006"]
    memory.forget()
    assert memory.put_into(batch_of([4, 5]), 0).memory is None and memory.tensors(4) == {}


def test_without_lanes_nothing_is_kept():
    memory = LaneMemory()
    memory.take(0, None)
    batch = batch_of(None)
    assert memory.put_into(batch, 0) is batch and memory.tensors(0) == {}


@pytest.mark.parametrize("saved_on", [1, 2, 4])
@pytest.mark.parametrize("loaded_on", [1, 3, 12])
def test_rows_of_a_checkpoint_find_their_lanes_at_any_world_size(saved_on, loaded_on):
    rows, files = torch.arange(12.0)[:, None].expand(12, 2), {}
    for file in lane_files(12, saved_on):
        memory = LaneMemory()
        for index, part in enumerate(rows[file.first : file.end].split(2)):
            memory.take(index, part)
        files[file.name] = memory.tensors(file.first)
    for wanted in lane_files(12, loaded_on):
        lanes = range(wanted.first, wanted.end)
        needed = [tensors for name, tensors in files.items() if parse_name(name).first < lanes.stop and parse_name(name).end > lanes.start]
        found = rows_of(lanes, needed)
        assert np.array_equal(found[:, 0].numpy(), np.arange(lanes.start, lanes.stop))
        restored = LaneMemory()
        restored.restore(lanes.start, found)
        for lane in lanes:
            assert restored.put_into(batch_of([lane]), lane - lanes.start).memory.tolist() == [[lane, lane]]


def test_a_missing_lane_is_told():
    memory = LaneMemory()
    memory.take(0, torch.zeros(3, 1))
    with pytest.raises(ValueError, match="the memory of lane 3 is not there"):
        rows_of(range(5), [memory.tensors(0)])
