"""Packing: every protein once, within the budget; one batch in numbers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prottrans_hpc import architecture
from prottrans_hpc.embed.batches import build_batch, build_encoder, plan_bins

VOCABULARY = architecture.get("prot_bert").vocabulary


@given(st.lists(st.integers(1, 300), max_size=80), st.integers(1, 400))
def test_a_plan_holds_every_protein_once_within_the_budget(lengths, budget):
    array = np.array(lengths, np.int64)
    bins = plan_bins(array, budget)
    assert sorted(np.concatenate([*bins, np.empty(0, np.int64)]).tolist()) == list(range(len(lengths)))
    assert all(len(rows) == 1 or array[rows].sum() <= budget for rows in bins)
    assert all(a.min() >= b.max() for a, b in itertools.pairwise([array[rows] for rows in bins]))


def test_no_batch_could_take_the_first_protein_of_the_next():
    array = np.array([5, 3, 9, 9, 1, 4, 2, 2], np.int64)
    bins = plan_bins(array, 10)
    assert all(array[rows].sum() + array[after[0]] > 10 for rows, after in itertools.pairwise(bins))


def test_equal_lengths_keep_the_order_of_the_input():
    assert [rows.tolist() for rows in plan_bins(np.array([7, 7, 7, 7], np.int64), 14)] == [[0, 1], [2, 3]]


def test_a_batch_in_numbers():
    batch = build_batch([b"MKX", b"A"], build_encoder(VOCABULARY))
    expected = [VOCABULARY.index(token) for token in ("[CLS]", "M", "K", "X", "[SEP]", "[CLS]", "A", "[SEP]")]
    assert batch.tokens.tolist() == expected
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 5, 8]
    assert (batch.max_length, batch.num_residues) == (5, 4)


def test_every_letter_maps_as_the_vocabulary_says():
    encoder = build_encoder(VOCABULARY)
    for letter in "ACDEFGHIKLMNPQRSTVWYXBOUZ":
        assert encoder.table[ord(letter)] == VOCABULARY.index(letter)


@pytest.mark.parametrize(("prefix", "suffix"), [((), ("[SEP]",)), ((), ()), (("[CLS]", "[SEP]"), ())])
def test_other_vocabularies_put_other_tokens_around(prefix, suffix):
    """T5 ends a protein with one token, others use none: nothing may depend on BERT's two."""
    changed = type(VOCABULARY)(VOCABULARY.tokens, prefix, suffix, VOCABULARY.mask, VOCABULARY.padding, VOCABULARY.unknown)
    encoder = build_encoder(changed)
    batch = build_batch([b"MK", b"A"], encoder)
    ids = [VOCABULARY.index(token) for token in (*prefix, "M", "K", *suffix, *prefix, "A", *suffix)]
    assert batch.tokens.tolist() == ids
    assert batch.num_residues == 3
