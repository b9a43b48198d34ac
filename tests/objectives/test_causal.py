"""Predicting the next residue: in pieces of lanes, forwards and backwards, and in whole proteins."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from prottrans_hpc import architecture
from prottrans_hpc.corpus.index import read_index
from prottrans_hpc.corpus.lanes import LaneOrder
from prottrans_hpc.corpus.order import SamplePosition
from prottrans_hpc.corpus.reader import Corpus
from prottrans_hpc.corpus.samples import whole_sequences
from prottrans_hpc.objectives.causal import predict
from prottrans_hpc.objectives.lane_layout import lay_out_lanes
from prottrans_hpc.objectives.layout import lay_out
from prottrans_hpc.recipe import Order
from prottrans_hpc.recipe_objectives import Causal

ONE_END = architecture.get("prot_bert").vocabulary
VOCABULARIES = {
    "suffix": dataclasses.replace(ONE_END, prefix=(), suffix=("[SEP]",)),
    "both": ONE_END,
    "two behind": dataclasses.replace(ONE_END, prefix=(), suffix=("[SEP]", "[CLS]")),
}
LANES, TOKENS = 5, 64


@pytest.fixture(scope="module")
def corpus(small_corpus):
    return Corpus(read_index(small_corpus), "train")


def residues_of(corpus, sequence, table):
    length = int(corpus.lengths_of(np.array([sequence]))[0])
    out = np.empty(length, np.int64)
    corpus.gather(whole_sequences(np.array([sequence]), np.array([length]), epoch=0), table, out, np.zeros(1, np.int64))
    return out.tolist()


@pytest.fixture(params=sorted(VOCABULARIES))
def vocabulary(request):
    return VOCABULARIES[request.param]


def lanes_of(corpus, vocabulary):
    specials = len(vocabulary.prefix) + len(vocabulary.suffix)
    return LaneOrder(corpus, seed=4, order=Order(), num_lanes=LANES, piece_tokens=TOKENS, num_specials=specials)


@pytest.mark.parametrize("is_reversed", [False, True])
def test_a_lane_reads_whole_proteins_with_their_special_tokens(corpus, vocabulary, is_reversed):
    order, table = lanes_of(corpus, vocabulary), vocabulary.residue_table()
    prefix, suffix = ([vocabulary.index(token) for token in tokens] for tokens in (vocabulary.prefix, vocabulary.suffix))
    layouts = [lay_out_lanes(corpus, order.pieces(SamplePosition(0, k), np.arange(LANES)), vocabulary, is_reversed=is_reversed) for k in range(20)]
    for lane in range(LANES):
        rows = slice(lane * TOKENS, (lane + 1) * TOKENS)
        stream = np.concatenate([layout.tokens[rows] for layout in layouts]).tolist()
        documents = np.concatenate([layout.documents[rows] for layout in layouts])
        assert np.all((np.diff(documents) == 0) | (np.diff(documents) == 1))
        assert [layout.following[lane] for layout in layouts[:-1]] == [layout.tokens[rows][0] for layout in layouts[1:]]
        assert [layout.following_documents[lane] for layout in layouts[:-1]] == [layout.documents[rows][0] for layout in layouts[1:]]
        numbers, first = np.unique(documents, return_index=True)
        for number, begin, end in zip(numbers[1:-1].tolist(), first[1:-1].tolist(), first[2:].tolist(), strict=True):
            sequence = id_of(order, number)
            residues = residues_of(corpus, sequence, table)
            assert stream[begin:end] == [*prefix, *(residues[::-1] if is_reversed else residues), *suffix]


def id_of(order, number):
    return int(order._order.window(0, 0).ids[number])


def test_residues_are_counted_without_special_tokens(corpus, vocabulary):
    layout = lay_out_lanes(corpus, lanes_of(corpus, vocabulary).pieces(SamplePosition(0, 3), np.arange(LANES)), vocabulary)
    assert layout.num_residues == np.count_nonzero(layout.tokens > 4)
    assert layout.cu_seqlens.tolist() == list(range(0, LANES * TOKENS + 1, TOKENS)) and layout.max_length == TOKENS


@pytest.mark.parametrize("protein_end", ["reset", "carry"])
def test_every_token_with_a_predecessor_is_predicted(corpus, vocabulary, protein_end):
    order = lanes_of(corpus, vocabulary)
    layout = lay_out_lanes(corpus, order.pieces(SamplePosition(0, 2), np.arange(LANES)), vocabulary)
    batch = predict(layout, Causal(protein_end=protein_end), 0)
    follows = dict(zip(batch.target_positions.tolist(), batch.targets.tolist(), strict=True))
    for row in range(len(layout.tokens)):
        is_last = (row + 1) % TOKENS == 0
        token, document = (
            (layout.following[row // TOKENS], layout.following_documents[row // TOKENS]) if is_last else (layout.tokens[row + 1], layout.documents[row + 1])
        )
        expected = token if protein_end == "carry" or document == layout.documents[row] else None
        assert follows.get(row) == expected
    assert (batch.documents is None) == (protein_end == "carry")
    assert batch.carried.tolist() == (layout.starts if protein_end == "carry" else layout.carried).tolist()


def test_nothing_follows_the_end_of_an_epoch(corpus, vocabulary):
    order = lanes_of(corpus, vocabulary)
    last = SamplePosition(0, order.steps_per_epoch - 1)
    batch = predict(lay_out_lanes(corpus, order.pieces(last, np.arange(LANES)), vocabulary), Causal(protein_end="carry"), 0)
    assert batch.target_positions.tolist() == [row for row in range(LANES * TOKENS) if (row + 1) % TOKENS]


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_whole_proteins_are_read_the_same_way(corpus, vocabulary, direction):
    ids = np.array([5, 3, 9])
    samples = whole_sequences(ids, np.minimum(corpus.lengths_of(ids), 70), epoch=0)
    layout = lay_out(corpus, samples, vocabulary)
    batch = predict(layout, Causal(direction=direction), 0)
    plain = layout.tokens.tolist()
    for start, begin, length, end in zip(layout.cu_seqlens[:-1], layout.residue_starts, samples.lengths, layout.cu_seqlens[1:], strict=True):
        residues = plain[begin : begin + length]
        assert batch.tokens[begin : begin + length].tolist() == (residues[::-1] if direction == "reverse" else residues)
        inside = (batch.target_positions >= start) & (batch.target_positions < end)
        assert batch.target_positions[inside].tolist() == list(range(start, end - 1))
        assert batch.targets[inside].tolist() == batch.tokens[start + 1 : end].tolist()


def test_nothing_is_fine_too(corpus, vocabulary):
    nothing = whole_sequences(np.zeros(0, np.int64), np.zeros(0, np.int64), epoch=0)
    batch = predict(lay_out(corpus, nothing, vocabulary), Causal(), 0)
    assert len(batch.tokens) == len(batch.targets) == batch.max_length == 0
