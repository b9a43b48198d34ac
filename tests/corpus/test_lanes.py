"""Lanes: whatever the world size, every lane reads its part of the epoch's text, piece after piece, and no rank needs another's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from prottrans_hpc.corpus import lanes as lane_module
from prottrans_hpc.corpus.lanes import LaneOrder, enter_phase, own_lanes
from prottrans_hpc.corpus.order import ArrayLengths, SampleOrder, SamplePosition
from prottrans_hpc.errors import DataError
from prottrans_hpc.recipe import Order

SPECIALS = 1
LENGTHS = np.random.default_rng(3).integers(1, 60, 997, dtype=np.int64)
LENGTHS[17] = 5_000  # one that is longer than several pieces
SMALL_WINDOWS = Order(block_sequences=8, window_blocks=4)


def lane_order(num_lanes=6, piece_tokens=16, order=SMALL_WINDOWS, lengths=LENGTHS):
    return LaneOrder(ArrayLengths(lengths), seed=11, order=order, num_lanes=num_lanes, piece_tokens=piece_tokens, num_specials=SPECIALS)


def text_of(epoch, order=SMALL_WINDOWS, lengths=LENGTHS):
    """The definition: (document, sequence, place in its text) of every token of an epoch, int64 [3, tokens]."""
    samples = next(iter_epoch(epoch, order, lengths))
    tokens = samples.lengths + SPECIALS
    document = np.repeat(np.arange(len(samples)), tokens)
    place = np.arange(tokens.sum()) - np.repeat(np.cumsum(tokens) - tokens, tokens)
    return np.stack([document, samples.ids[document], place])


def iter_epoch(epoch, order, lengths):
    from prottrans_hpc.corpus.samples import concatenate

    whole = SampleOrder(ArrayLengths(lengths), seed=11, order=order, max_residues=1 << 40)
    yield concatenate([whole.window(epoch, window) for window in range(whole.num_windows)])


def tokens_of(pieces):
    """The same three rows of every token of some pieces, by piece."""
    which = np.repeat(np.arange(len(pieces.ids)), pieces.num_tokens)
    place = np.arange(len(which)) - np.repeat(np.cumsum(pieces.num_tokens) - pieces.num_tokens, pieces.num_tokens) + pieces.offsets[which]
    rows = np.stack([pieces.documents[which], pieces.ids[which], place])
    return [rows[:, pieces.piece_of[which] == piece] for piece in range(len(pieces.lanes))]


@pytest.mark.parametrize("order", [SMALL_WINDOWS, Order()], ids=["many windows", "one window"])
@pytest.mark.parametrize("epoch", [0, 3])
def test_lanes_are_equal_parts_of_the_epochs_text(order, epoch):
    lanes = lane_order(order=order)
    text = text_of(epoch, order)
    length = lanes.steps_per_epoch * 16
    assert 6 * length <= text.shape[1] < 6 * (length + 16)
    for step in range(lanes.steps_per_epoch):
        pieces = lanes.pieces(SamplePosition(epoch, step), np.arange(6))
        is_last = step + 1 == lanes.steps_per_epoch
        for lane, tokens in enumerate(tokens_of(pieces)):
            begin = lane * length + step * 16
            assert np.array_equal(tokens, text[:, begin : begin + 16 + (not is_last)]), "a piece, and the token behind it"
            before = text[0, lane * length : begin]
            assert pieces.carried[lane] == np.count_nonzero(before == tokens[0, 0]), "what lies before it of its protein"
        assert pieces.starts.tolist() == [step * 16] * 6


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 6])
def test_the_world_size_does_not_matter(world_size):
    reference = lane_order()
    ranks = [lane_order() for _ in range(world_size)]
    assert sorted(itertools.chain(*(own_lanes(6, rank, world_size) for rank in range(world_size)))) == list(range(6))
    position = SamplePosition(1, 2)
    for _ in range(reference.steps_per_epoch + 3):
        expected = tokens_of(reference.pieces(position, np.arange(6)))
        found = [tokens for rank, order in enumerate(ranks) for tokens in tokens_of(order.pieces(position, np.array(own_lanes(6, rank, world_size))))]
        assert all(np.array_equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
        position = reference.behind(position)
    assert position.epoch == 2, "over the end of an epoch"


def test_any_place_is_found_without_its_past():
    walked = lane_order()
    position = SamplePosition()
    for _ in range(walked.steps_per_epoch - 2):
        walked.pieces(position, np.arange(6))
        position = walked.behind(position)
    there = walked.pieces(position, np.arange(6))
    fresh = lane_order().pieces(position, np.arange(6))
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(tokens_of(there), tokens_of(fresh), strict=True))


def test_few_proteins_are_kept_and_windows_are_shuffled_seldom(monkeypatch):
    monkeypatch.setattr(lane_module, "_AHEAD", 10)
    lanes, calls = lane_order(), []
    window = lanes._order.window
    monkeypatch.setattr(lanes._order, "window", lambda *place: calls.append(place) or window(*place))
    text, position = text_of(0), SamplePosition()
    for step in range(lanes.steps_per_epoch):
        for lane, tokens in enumerate(tokens_of(lanes.pieces(position, np.arange(6)))):
            begin = (lane * lanes.steps_per_epoch + step) * 16
            assert np.array_equal(tokens[:, :16], text[:, begin : begin + 16])
        assert max(len(ahead.ids) for ahead in lanes._ahead.values()) < 40
        position = lanes.behind(position)
    assert len(calls) < 2 * len(LENGTHS) / 10 + 12


def test_a_corpus_without_a_piece_for_every_lane_is_refused():
    with pytest.raises(DataError, match=r"100 lanes .* need 51,200 tokens.*can be \d+ at most"):
        lane_order(num_lanes=100, piece_tokens=512)


def test_other_lanes_begin_with_an_epoch():
    first = lane_order()
    assert enter_phase(lane_order(), SamplePosition(1, 5), previous=first) == SamplePosition(1, 5)
    assert enter_phase(lane_order(num_lanes=3), SamplePosition(1, 5), previous=first) == SamplePosition(2, 0)
    assert enter_phase(lane_order(piece_tokens=8), SamplePosition(1, 0), previous=first) == SamplePosition(1, 0)
