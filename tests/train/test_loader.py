"""Loading: the same samples and masks for every world size, exactly once, from any resume point, without ever hanging."""

import dataclasses
import itertools
import shutil
import threading
import tomllib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prottrans_hpc import architecture, config
from prottrans_hpc.corpus.index import read_index
from prottrans_hpc.corpus.order import SamplePosition, position_from_json
from prottrans_hpc.corpus.reader import Corpus
from prottrans_hpc.errors import DataError
from prottrans_hpc.recipe import Recipe
from prottrans_hpc.train import loader as loading
from prottrans_hpc.train.loader import Loader, Share, load_steps, validation_batches

pytestmark = pytest.mark.timeout(300)
VOCABULARY = architecture.get("prot_bert").vocabulary
WORLD_SIZES = (1, 2, 3, 4, 8)
START = SamplePosition()

RECIPE = """
description = "for tests"
seed = 5
order = {block_sequences = 8, window_blocks = 10}
loading = {bin_residues = 4096}
architecture = {name = "prot_bert", size = "tiny"}
optimizer = {name = "lamb", learning_rate = 1e-3}
checkpoint = {every_steps = 10}
validation = {every_steps = 1, max_sequences = 25}
phases = [{steps = 14, max_residues = 128, global_batch_size = 90}, {steps = 8, max_residues = 400, global_batch_residues = 30000}]
"""


def make_recipe(*changes):
    return config.parse(Recipe, config.with_settings(tomllib.loads(RECIPE), changes), source="the test")


@pytest.fixture(scope="module")
def corpus(small_corpus):
    return Corpus(read_index(small_corpus))


def steps_of(corpus, recipe, *, rank=0, world_size=1, position=START, step=0):
    return load_steps(corpus, recipe, VOCABULARY, share=Share(rank, world_size), position=position, step=step)


def samples_of(loaded):
    samples = loaded.samples
    return sorted(zip(samples.epochs.tolist(), samples.ids.tolist(), samples.starts.tolist(), samples.lengths.tolist(), strict=True))


def seen_in(loaded_by_rank):
    """What the model of any rank sees in a step: for each sequence its id, corrupted tokens, targets and where they are."""
    seen = []
    for batch in (batch for loaded in loaded_by_rank for batch in loaded.micro_batches):
        borders = batch.cu_seqlens.tolist()
        for i, (start, end) in enumerate(itertools.pairwise(borders)):
            inside = (batch.target_positions >= start) & (batch.target_positions < end)
            positions = (batch.target_positions[inside] - start).tolist()
            assert batch.positions[start:end].tolist() == list(range(end - start))
            seen.append((int(batch.sample_ids[i]), batch.tokens[start:end].tolist(), positions, batch.targets[inside].tolist()))
    return sorted(seen)


@pytest.fixture(scope="module")
def reference(corpus):
    """Every step of the recipe on one rank: samples, what the model sees, and the position behind it."""
    return [(samples_of(loaded), seen_in([loaded]), loaded.position_after) for loaded in steps_of(corpus, make_recipe())]


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
@pytest.mark.parametrize("bin_residues", [400, 4096, 100_000])
def test_world_size_and_bins_change_nothing_that_the_models_see(corpus, reference, world_size, bin_residues):
    recipe = make_recipe(f"loading.bin_residues={bin_residues}")
    ranks = [list(steps_of(corpus, recipe, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for step, (samples, seen, position) in enumerate(reference):
        at_step = [rank[step] for rank in ranks]
        assert {len(loaded.micro_batches) for loaded in at_step} == {len(at_step[0].micro_batches)}
        assert all(samples_of(loaded) == samples and loaded.position_after == position for loaded in at_step)
        assert seen_in(at_step) == seen
        assert sum(loaded.num_residues for loaded in at_step) == sum(length for *_, length in samples)
        assert sum(loaded.num_targets for loaded in at_step) == sum(len(targets) for *_, targets in seen)


@settings(max_examples=8)
@given(stops=st.sets(st.integers(1, 21), max_size=4), data=st.data())
def test_stopped_anywhere_and_resumed_at_another_world_size_nothing_is_lost_or_repeated(corpus, reference, stops, data):
    position, found = SamplePosition(), []
    for begin, end in zip([0, *sorted(stops)], [*sorted(stops), 22], strict=True):
        world_size = data.draw(st.sampled_from(WORLD_SIZES))
        recipe = make_recipe(f"loading.bin_residues={data.draw(st.sampled_from([400, 2000, 16384]))}", f"loading.prefetch_steps={data.draw(st.integers(1, 3))}")
        loaders = [Loader(corpus, recipe, VOCABULARY, rank=rank, world_size=world_size, position=position, step=begin) for rank in range(world_size)]
        for step in range(begin, end):
            at_step = [next(loader) for loader in loaders]
            assert {loaded.step for loaded in at_step} == {step}
            found.append((samples_of(at_step[0]), seen_in(at_step), at_step[0].position_after))
        for loader in loaders:
            loader.close()
        # What was prefetched and dropped must not count as seen.
        position = position_from_json(found[-1][2].to_json())
    assert found == reference


def test_every_offset_of_the_run_is_a_resume_point(corpus, reference):
    for step in range(1, len(reference)):
        resumed = next(steps_of(corpus, make_recipe(), rank=step % 3, world_size=3, position=reference[step - 1][2], step=step))
        assert samples_of(resumed) == reference[step][0] and resumed.position_after == reference[step][2]


def test_the_ledger_holds_every_sequence_once_an_epoch_across_phases(corpus, reference):
    ledger = [(epoch, i) for samples, _, _ in reference for epoch, i, _, _ in samples]
    assert len(set(ledger)) == len(ledger)
    last = max(epoch for epoch, _ in ledger)
    assert last >= 2
    for epoch in range(last):
        assert sorted(i for e, i in ledger if e == epoch) == list(range(corpus.num_sequences))


def test_what_a_loaded_step_says_about_itself(corpus):
    recipe = make_recipe()
    position = SamplePosition()
    for number, loaded in enumerate(steps_of(corpus, recipe, rank=1, world_size=2)):
        phase = recipe.phases[loaded.phase]
        assert (loaded.step, loaded.phase) == (number, int(number >= 14))
        assert loaded.position_before == position
        position = loaded.position_after
        batches = loaded.micro_batches
        assert loaded.num_tokens == sum(len(batch.tokens) for batch in batches) == loaded.lengths.sum()
        assert loaded.num_residues == loaded.num_tokens - 2 * len(loaded.lengths)
        assert loaded.num_targets == sum(len(batch.targets) for batch in batches)
        assert loaded.lengths.max() <= phase.max_residues + 2
        assert len(loaded.sample_ids) == len(loaded.samples) >= len(loaded.lengths)
        for batch in batches:
            assert batch.num_residues <= max(recipe.loading.bin_residues, phase.max_residues)
            assert batch.max_length == int(torch.diff(batch.cu_seqlens).max())
            assert {name: getattr(batch, name).dtype for name in ("tokens", "positions", "target_positions", "targets", "sample_ids")} == dict.fromkeys(
                ("tokens", "positions", "target_positions", "targets", "sample_ids"), torch.int64
            )
            assert batch.cu_seqlens.dtype == torch.int32
    assert number == 21


def test_more_ranks_than_sequences_get_empty_batches(corpus):
    recipe = make_recipe("phases=[{steps = 1, max_residues = 128, global_batch_size = 3}]")
    loaded = [next(steps_of(corpus, recipe, rank=rank, world_size=5)) for rank in range(5)]
    assert sorted(len(rank.lengths) for rank in loaded) == [0, 0, 1, 1, 1]
    empty = next(rank for rank in loaded if len(rank.lengths) == 0)
    assert empty.num_tokens == empty.num_targets == empty.num_residues == 0
    assert [batch.cu_seqlens.tolist() for batch in empty.micro_batches] == [[0]]


def test_split_sequences_resume_across_a_change_of_limit(corpus):
    recipe = make_recipe('order.long_sequences="split"')
    straight = [samples_of(loaded) for loaded in steps_of(corpus, recipe)]
    for step in (13, 14, 15):
        position = [loaded.position_after for loaded in steps_of(corpus, recipe)][step - 1]
        assert [samples_of(loaded) for loaded in steps_of(corpus, recipe, rank=2, world_size=4, position=position, step=step)] == straight[step:]
    ledger = [sample for samples in straight for sample in samples]
    assert len(set(ledger)) == len(ledger)


def test_the_loader_ends_with_the_recipe_and_leaves_no_thread(corpus):
    with Loader(corpus, make_recipe(), VOCABULARY, rank=0, world_size=1, position=START, step=20) as loader:
        assert [loaded.step for loaded in loader] == [20, 21]
        assert loader.wait_s >= 0
    assert not [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_a_shard_that_is_damaged_under_way_ends_the_run_with_its_name(small_corpus, tmp_path):
    folder = shutil.copytree(small_corpus, tmp_path / "copy")
    corpus = Corpus(read_index(folder))
    shard = folder / "train-00001.h5"
    shard.write_bytes(b"\0" * shard.stat().st_size)
    with (
        Loader(corpus, make_recipe(), VOCABULARY, rank=0, world_size=1, position=START, step=0) as loader,
        pytest.raises(DataError, match=r"train-00001\.h5"),
    ):
        list(loader)


def test_an_error_in_the_background_reaches_the_training_loop(corpus, monkeypatch):
    calls = []

    def failing(*arguments, **keywords):
        calls.append(1)
        if len(calls) > 2:
            raise MemoryError("no room for step 2")
        return next_step(*arguments, **keywords)

    next_step = loading.next_step
    monkeypatch.setattr(loading, "next_step", failing)
    with Loader(corpus, make_recipe(), VOCABULARY, rank=0, world_size=1, position=START, step=0) as loader:
        assert [next(loader).step, next(loader).step] == [0, 1]
        with pytest.raises(MemoryError, match="step 2"):
            next(loader)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_validation_is_the_same_every_time_and_for_every_world_size(small_corpus, world_size):
    validation = Corpus(read_index(small_corpus), "validation")
    recipe = make_recipe()

    def seen(recipe, world_size):
        ranks = [validation_batches(validation, recipe, VOCABULARY, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1
        step = next(steps_of(validation, recipe))
        return seen_in([dataclasses.replace(step, micro_batches=tuple(batches)) for batches in ranks])

    expected = seen(recipe, 1)
    assert seen(recipe, world_size) == expected
    assert [number for number, *_ in expected] == list(range(25)) and validation.num_sequences > 25
    assert max(len(tokens) for _, tokens, *_ in expected) <= 402
    assert seen(make_recipe("seed=6"), 1) != expected


def test_validation_uses_no_mask_of_training(small_corpus):
    """The same sequences under the same numbers in the first epochs of training are masked otherwise."""
    validation = Corpus(read_index(small_corpus), "validation")
    recipe = make_recipe(f"phases=[{{steps = 3, max_residues = 40000, global_batch_size = {validation.num_sequences}}}]")
    batches = validation_batches(validation, recipe, VOCABULARY, rank=0, world_size=1)
    for step in steps_of(validation, recipe):
        training = {number: tokens for number, tokens, *_ in seen_in([step])}
        for number, tokens, *_ in seen_in([dataclasses.replace(step, micro_batches=tuple(batches))]):
            assert len(tokens) == len(training[number]) and tokens != training[number]


def test_validation_can_be_cut_and_can_be_empty(small_corpus):
    validation = Corpus(read_index(small_corpus), "validation")
    batches = validation_batches(validation, make_recipe(), VOCABULARY, rank=0, world_size=1, max_residues=50)
    assert max(batch.max_length for batch in batches) == 52
    nothing = make_recipe("validation.max_sequences=1")
    ranks = [validation_batches(validation, nothing, VOCABULARY, rank=rank, world_size=2) for rank in range(2)]
    assert sorted(sum(len(batch.sample_ids) for batch in batches) for batches in ranks) == [0, 1]


def test_batches_do_not_share_memory(corpus):
    """A model that writes into its batch must not change the next one."""
    first, second = (next(steps_of(corpus, make_recipe())) for _ in range(2))
    for batch in first.micro_batches:
        batch.tokens.fill_(0)
        batch.targets.fill_(0)
    assert seen_in([second]) == seen_in([next(steps_of(corpus, make_recipe()))])
    assert np.all([batch.tokens.numpy().flags.writeable for batch in second.micro_batches])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA GPU")
def test_page_locked_batches_are_the_same(corpus, reference):
    with Loader(corpus, make_recipe(), VOCABULARY, rank=0, world_size=1, position=START, step=0, pin_memory=True) as loader:
        for loaded, (samples, seen, _) in zip(loader, reference, strict=True):
            assert samples_of(loaded) == samples and seen_in([loaded]) == seen
            assert all(batch.tokens.is_pinned() and batch.cu_seqlens.is_pinned() for batch in loaded.micro_batches)
