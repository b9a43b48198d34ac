"""ELECTRA's corruption: BERT's targets, most of them masked and none replaced, and a number for each that belongs to the sample alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prottrans_hpc import architecture
from prottrans_hpc.corpus.index import read_index
from prottrans_hpc.corpus.reader import Corpus
from prottrans_hpc.corpus.samples import Samples, whole_sequences
from prottrans_hpc.objectives.layout import lay_out
from prottrans_hpc.objectives.masked import draw_targets
from prottrans_hpc.objectives.replaced_token import corrupt
from prottrans_hpc.recipe_objectives import ReplacedToken

VOCABULARY = architecture.get("prot_electra").vocabulary
MASK = VOCABULARY.index("[MASK]")
SIGMAS = 5


@pytest.fixture(scope="module")
def corpus(small_corpus):
    return Corpus(read_index(small_corpus), "train")


def all_of(corpus, *, epoch=0):
    return whole_sequences(np.arange(corpus.num_sequences), corpus.lengths, epoch=epoch)


def within(count, num, share):
    """Whether a count is within five standard deviations of a binomial's mean."""
    return abs(count - num * share) < SIGMAS * np.sqrt(num * share * (1 - share))


def test_shares_are_those_of_the_recipe_and_nothing_is_replaced(corpus):
    layout = lay_out(corpus, all_of(corpus), VOCABULARY)
    original = layout.tokens.copy()
    batch = corrupt(layout, ReplacedToken(fraction=0.25, mask_share=0.85), 3)
    assert np.array_equal(layout.tokens, original), "the layout itself must stay as it is"
    assert within(len(batch.targets), batch.num_residues, 0.25)
    assert np.array_equal(batch.targets, original[batch.target_positions])
    now = batch.tokens[batch.target_positions]
    assert within(np.count_nonzero(now == MASK), len(now), 0.85)
    assert np.array_equal(now[now != MASK], batch.targets[now != MASK])
    others = np.ones(len(original), bool)
    others[batch.target_positions] = False
    assert np.array_equal(batch.tokens[others], original[others])
    special = np.concatenate([batch.cu_seqlens[:-1], batch.cu_seqlens[1:] - 1])
    assert not np.isin(batch.target_positions, special).any()


def test_the_targets_are_those_of_masking_with_the_same_seed(corpus):
    samples = all_of(corpus)
    layout = lay_out(corpus, samples, VOCABULARY)
    which, residues = draw_targets(samples, share=0.25, seed=3)
    assert np.array_equal(corrupt(layout, ReplacedToken(), 3).target_positions, layout.residue_starts[which] + residues)


def test_the_draws_are_uniform_and_independent_of_what_is_masked(corpus):
    batch = corrupt(lay_out(corpus, all_of(corpus), VOCABULARY), ReplacedToken(fraction=0.5), 1)
    assert batch.draws.dtype == np.float64 and batch.draws.shape == batch.targets.shape
    assert batch.draws.min() > 0.0 and batch.draws.max() < 1.0
    counts = np.bincount((batch.draws * 20).astype(int), minlength=20)
    expected = len(batch.draws) / 20
    assert ((counts - expected) ** 2 / expected).sum() < 50  # chi-squared, 19 degrees of freedom: p = 1e-4 at 50.8
    is_masked = batch.tokens[batch.target_positions] == MASK
    assert abs(np.corrcoef(batch.draws, is_masked)[0, 1]) < SIGMAS / np.sqrt(len(is_masked))
    assert abs(np.corrcoef(batch.draws[:-1], batch.draws[1:])[0, 1]) < SIGMAS / np.sqrt(len(is_masked))


def test_the_weight_of_the_discriminator_travels_with_the_batch(corpus):
    layout = lay_out(corpus, all_of(corpus).take(slice(0, 2)), VOCABULARY)
    assert corrupt(layout, ReplacedToken(), 1).loss_weights == (1.0, 50.0)
    assert corrupt(layout, ReplacedToken(discriminator_weight=7.5), 1).loss_weights == (1.0, 7.5)


def fates_of(batch):
    """For each sample what the generator sees of it, and each target's place and number."""
    views = {}
    for i, (start, end) in enumerate(zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)):
        inside = (batch.target_positions >= start) & (batch.target_positions < end)
        views[int(batch.sample_ids[i])] = (batch.tokens[start:end].tolist(), (batch.target_positions[inside] - start).tolist(), batch.draws[inside].tolist())
    return views


@settings(max_examples=30)
@given(order=st.permutations(range(12)), cuts=st.sets(st.integers(1, 11)))
def test_a_sample_has_the_same_fate_in_any_batch(corpus, order, cuts):
    samples = all_of(corpus).take(np.arange(12))
    together = fates_of(corrupt(lay_out(corpus, samples, VOCABULARY), ReplacedToken(), 5))
    apart = {}
    for part in np.split(np.array(order), sorted(cuts)):
        apart |= fates_of(corrupt(lay_out(corpus, samples.take(part), VOCABULARY), ReplacedToken(), 5))
    assert apart == together


def test_a_residue_has_the_same_fate_in_any_crop(corpus):
    number = int(np.argmax(corpus.lengths))
    length = int(corpus.lengths[number])
    at = {}
    for start, crop in ((0, length), (102, 51)):
        samples = Samples(np.zeros(1, np.int64), np.array([number]), np.array([start]), np.array([crop]))
        batch = corrupt(lay_out(corpus, samples, VOCABULARY), ReplacedToken(), 5)
        at[start] = set(zip((batch.target_positions - 1 + start).tolist(), batch.tokens[batch.target_positions].tolist(), batch.draws.tolist(), strict=True))
    assert at[102] == {fate for fate in at[0] if 102 <= fate[0] < 153}
    assert at[102]


@pytest.mark.parametrize("other", [{"epoch": 1}, {"seed": 6}])
def test_epochs_and_seeds_draw_anew(corpus, other):
    def draws(epoch=0, seed=5):
        return corrupt(lay_out(corpus, all_of(corpus, epoch=epoch), VOCABULARY), ReplacedToken(), seed).draws

    base, changed = draws(), draws(**other)
    assert not np.isin(base, changed).mean() > 0.01


def test_an_empty_bin_is_an_empty_batch(corpus):
    batch = corrupt(lay_out(corpus, all_of(corpus).take(slice(0, 0)), VOCABULARY), ReplacedToken(), 5)
    assert len(batch.tokens) == len(batch.targets) == len(batch.draws) == batch.max_length == 0
