"""XLNet's objective: spans of the right share and lengths, a uniform order within blocks, and nothing that depends on the company."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prottrans_hpc import architecture
from prottrans_hpc.corpus.index import read_index
from prottrans_hpc.corpus.lanes import LaneOrder
from prottrans_hpc.corpus.order import SamplePosition
from prottrans_hpc.corpus.reader import Corpus
from prottrans_hpc.corpus.samples import Samples, whole_sequences
from prottrans_hpc.objectives.lane_layout import lay_out_lanes
from prottrans_hpc.objectives.layout import Layout, lay_out
from prottrans_hpc.objectives.permutation import permute
from prottrans_hpc.recipe import Order
from prottrans_hpc.recipe_objectives import Permutation

VOCABULARY = architecture.get("prot_xlnet").vocabulary
SEP, CLS = VOCABULARY.index("<sep>"), VOCABULARY.index("<cls>")
SIGMAS = 5
LANES, TOKENS = 6, 128


@pytest.fixture(scope="module")
def corpus(small_corpus):
    return Corpus(read_index(small_corpus))


def all_of(corpus, *, epoch=0):
    return whole_sequences(np.arange(corpus.num_sequences), corpus.lengths, epoch=epoch)


def long_text(length, *, number=0, epoch=0, start=0):
    """One sequence of alanine, without special tokens."""
    samples = Samples(np.array([epoch]), np.array([number]), np.array([start]), np.array([length]))
    return Layout(VOCABULARY, samples, np.full(length, VOCABULARY.index("A")), np.arange(length), np.array([0, length], np.int32), np.zeros(1, np.int64))


def spans_of(batch):
    """Lengths of the runs of consecutive targets."""
    breaks = np.flatnonzero(np.diff(batch.target_positions) > 1) + 1
    return np.diff(np.concatenate([[0], breaks, [len(batch.target_positions)]]))


@pytest.mark.parametrize("fraction", [1 / 6, 0.3])
@pytest.mark.parametrize("max_span", [1, 5])
def test_the_share_of_targets_is_that_of_the_recipe(fraction, max_span):
    length = 300_000
    batch = permute(long_text(length), Permutation(fraction=fraction, max_span=max_span), 3)
    # A stretch is a whole number of tokens, which at 0.3 makes 1 of 3, 2 of 7, 3 of 10, 4 of 13 and 5 of 17.
    sizes = np.arange(1, max_span + 1)
    weights = 1 / sizes / (1 / sizes).sum()
    wanted = (sizes * weights).sum() / (np.round(sizes / fraction) * weights).sum()
    assert abs(wanted - fraction) < 0.04
    assert len(batch.targets) == pytest.approx(wanted * length, rel=0.01)


@pytest.mark.parametrize("lengths", ["inverse", "uniform"])
def test_spans_are_as_long_as_the_recipe_says(lengths):
    # With rare spans few touch one another.
    spans = spans_of(permute(long_text(2_000_000), Permutation(fraction=0.02, span_lengths=lengths), 3))
    weights = 1 / np.arange(1, 6) if lengths == "inverse" else np.ones(5)
    weights /= weights.sum()
    counts = np.bincount(spans, minlength=11)
    assert counts[6:].sum() < 0.01 * len(spans)
    assert np.abs(counts[1:6] / len(spans) - weights).max() < 0.015


def test_tokens_stay_as_they_are_and_special_ones_are_never_predicted(corpus):
    layout = lay_out(corpus, all_of(corpus), VOCABULARY)
    batch = permute(layout, Permutation(), 3)
    assert np.array_equal(batch.tokens, layout.tokens)
    assert np.array_equal(batch.targets, batch.tokens[batch.target_positions])
    assert not np.isin(batch.targets, [SEP, CLS]).any()
    assert np.all(np.diff(batch.target_positions) > 0)
    assert batch.tokens.dtype == batch.permutation.dtype == batch.targets.dtype == np.int64
    assert len(batch.targets) == pytest.approx(len(batch.tokens) / 6, rel=0.05)


def test_targets_and_special_tokens_have_a_place_in_the_order_and_all_may_see_the_rest(corpus):
    batch = permute(lay_out(corpus, all_of(corpus), VOCABULARY), Permutation(), 3)
    ordered = np.zeros(len(batch.tokens), bool)
    ordered[batch.target_positions] = True
    ordered |= np.isin(batch.tokens, [SEP, CLS])
    assert np.array_equal(batch.permutation >= 0, ordered)
    for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        places = batch.permutation[start:end]
        assert sorted(places[places >= 0]) == list(range(np.count_nonzero(places >= 0)))


@pytest.mark.parametrize("within", [0, 64, 100])
def test_the_order_is_random_within_blocks_and_block_comes_after_block(within):
    length = 60_000
    batch = permute(long_text(length), Permutation(permute_within=within), 3)
    places = batch.permutation[batch.target_positions]
    if within:
        assert np.all(np.diff((batch.target_positions // within)[np.argsort(places)]) >= 0)
    rises = np.count_nonzero(np.diff(places) > 0)
    inside = np.diff(batch.target_positions // within) == 0 if within else np.ones(len(places) - 1, bool)
    rises_inside = np.count_nonzero((np.diff(places) > 0)[inside])
    # Neighbours are as often in one order as in the other; successive comparisons correlate, so the variance is a third of a coin's.
    assert abs(rises_inside - inside.sum() / 2) < SIGMAS * np.sqrt(inside.sum() / 4)
    assert rises - rises_inside == np.count_nonzero(~inside)


def views_of(batch):
    """For each sample its tokens, targets and order."""
    views = {}
    for i, (start, end) in enumerate(zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)):
        inside = batch.target_positions[(batch.target_positions >= start) & (batch.target_positions < end)] - start
        views[int(batch.sample_ids[i])] = (batch.tokens[start:end].tolist(), inside.tolist(), batch.permutation[start:end].tolist())
    return views


@given(order=st.permutations(range(12)), cuts=st.sets(st.integers(1, 11)))
def test_a_sample_has_the_same_targets_and_order_in_any_batch(corpus, order, cuts):
    samples = all_of(corpus).take(np.arange(12))
    together = views_of(permute(lay_out(corpus, samples, VOCABULARY), Permutation(), 5))
    apart = {}
    for part in np.split(np.array(order), sorted(cuts)):
        apart |= views_of(permute(lay_out(corpus, samples.take(part), VOCABULARY), Permutation(), 5))
    assert apart == together


def test_epochs_seeds_sequences_and_fragments_are_independent():
    def indicator(seed=1, **address):
        hit = np.zeros(60_000)
        hit[permute(long_text(60_000, **address), Permutation(max_span=1), seed).target_positions] = 1
        return hit

    base = indicator()
    for other in (indicator(seed=2), indicator(epoch=1), indicator(number=1), indicator(start=60_000)):
        assert abs(np.corrcoef(base, other)[0, 1]) < SIGMAS / np.sqrt(base.size)
    assert np.array_equal(base, indicator())


@pytest.mark.parametrize("lengths", [[], [0, 0], [1], [0, 3, 0, 700, 1]])
def test_texts_of_any_length_are_taken(corpus, lengths):
    samples = Samples(*(np.array(row, np.int64) for row in ([0] * len(lengths), range(len(lengths)), [0] * len(lengths), np.minimum(lengths, 50))))
    batch = permute(lay_out(corpus, samples, VOCABULARY), Permutation(), 5)
    assert len(batch.tokens) == len(batch.permutation) == sum(min(length, 50) + 2 for length in lengths)
    assert np.all(batch.target_positions < len(batch.tokens))


@pytest.fixture(scope="module")
def lane_order(corpus):
    return LaneOrder(corpus, seed=4, order=Order(), num_lanes=LANES, piece_tokens=TOKENS, num_specials=2)


def pieces(corpus, lane_order, step, lanes):
    return lay_out_lanes(corpus, lane_order.pieces(SamplePosition(0, step), np.array(lanes)), VOCABULARY, is_reversed=False)


def test_a_lane_has_the_same_targets_and_order_on_any_rank(corpus, lane_order):
    def views(lanes):
        batch = permute(pieces(corpus, lane_order, 3, lanes), Permutation(permute_within=64), 5)
        found = {}
        for row, lane in enumerate(lanes):
            here = slice(row * TOKENS, (row + 1) * TOKENS)
            inside = (batch.target_positions >= here.start) & (batch.target_positions < here.stop)
            found[lane] = (batch.tokens[here].tolist(), (batch.target_positions[inside] - here.start).tolist(), batch.permutation[here].tolist())
        return found

    whole = views(list(range(LANES)))
    assert views([0, 1]) | views([2, 3, 4]) | views([5]) == whole
    assert len({tuple(targets) for _, targets, _ in whole.values()}) == LANES


def test_a_lane_carries_or_resets_as_the_recipe_says(corpus, lane_order):
    layout = pieces(corpus, lane_order, 2, range(LANES))
    carry, reset = (permute(layout, Permutation(protein_end=end), 5) for end in ("carry", "reset"))
    assert carry.documents is None and carry.carried.tolist() == [2 * TOKENS] * LANES
    assert np.array_equal(reset.documents, layout.documents) and np.array_equal(reset.carried, layout.carried)
    assert np.array_equal(carry.lanes, np.arange(LANES)) and np.array_equal(carry.sample_ids, layout.sample_ids)
    assert np.array_equal(carry.permutation, reset.permutation)
    whole = permute(lay_out(corpus, all_of(corpus).take(np.arange(3)), VOCABULARY), Permutation(protein_end="reset"), 5)
    assert whole.lanes is None and whole.documents is None and whole.carried is None
