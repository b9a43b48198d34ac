"""Masking: the shares of the paper, special tokens untouched, and a mask that belongs to the sample and to nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prottrans_hpc import architecture, objectives
from prottrans_hpc.corpus.counter_rng import Purpose, draw, threshold
from prottrans_hpc.corpus.index import read_index
from prottrans_hpc.corpus.reader import Corpus
from prottrans_hpc.corpus.samples import Samples, whole_sequences
from prottrans_hpc.objectives.layout import lay_out
from prottrans_hpc.objectives.masked import corrupt, draw_targets
from prottrans_hpc.recipe_objectives import Masked

VOCABULARY = architecture.get("prot_bert").vocabulary
SIGMAS = 5


@pytest.fixture(scope="module")
def corpus(small_corpus):
    return Corpus(read_index(small_corpus))


def all_of(corpus, *, epoch=0):
    return whole_sequences(np.arange(corpus.num_sequences), corpus.lengths, epoch=epoch)


def made_samples(lengths, *, starts=0, epoch=0):
    num = len(lengths)
    return Samples(np.full(num, epoch), np.arange(num), np.broadcast_to(np.asarray(starts, np.int64), num), np.asarray(lengths, np.int64))


def within(count, num, share):
    """Whether a count is within five standard deviations of a binomial's mean."""
    return abs(count - num * share) < SIGMAS * np.sqrt(num * share * (1 - share))


def test_a_layout_is_every_sample_between_its_special_tokens(corpus):
    ids = np.array([7, 300, 8])
    samples = Samples(np.zeros(3, np.int64), ids, np.array([0, 5, 0]), np.array([30, 20, 0]))
    layout = lay_out(corpus, samples, VOCABULARY)
    cls, sep = VOCABULARY.index("[CLS]"), VOCABULARY.index("[SEP]")
    assert layout.cu_seqlens.tolist() == [0, 32, 54, 56] and layout.cu_seqlens.dtype == np.int32
    assert layout.tokens[[0, 32, 54]].tolist() == [cls] * 3 and layout.tokens[[31, 53, 55]].tolist() == [sep] * 3
    assert layout.positions.tolist() == [*range(32), *range(22), 0, 1]
    assert (layout.max_length, layout.num_residues) == (32, 50)
    assert layout.tokens.dtype == layout.positions.dtype == np.int64
    letters = np.frombuffer(bytes(corpus._map(0).residues[corpus._map(0).offsets[7] :][:30]), np.uint8)
    assert layout.tokens[1:31].tolist() == [VOCABULARY.index(chr(letter)) for letter in letters]


def test_shares_are_those_of_the_recipe(corpus):
    settings_of = Masked(fraction=0.2, mask_share=0.5, random_share=0.3)
    layout = lay_out(corpus, all_of(corpus), VOCABULARY)
    batch = corrupt(layout, settings_of, 3)
    num_targets = len(batch.targets)
    assert within(num_targets, batch.num_residues, 0.2)
    now = batch.tokens[batch.target_positions]
    is_standard = np.isin(batch.targets, VOCABULARY.residue_ids())
    assert within(np.count_nonzero(now == VOCABULARY.index("[MASK]")), num_targets, 0.5)
    # A random residue is the right one in one case of twenty.
    assert within(np.count_nonzero((now == batch.targets)[is_standard]), is_standard.sum(), 0.2 + 0.3 / 20)
    replaced = now[(now != batch.targets) & (now != VOCABULARY.index("[MASK]"))]
    assert set(replaced.tolist()) == set(VOCABULARY.residue_ids())


def test_random_residues_are_uniform():
    # Of glycine only, so that every other residue can be told apart as a replacement.
    samples = made_samples([200_000])
    tokens = np.full(200_002, VOCABULARY.index("G"))
    layout = objectives.layout.Layout(VOCABULARY, samples, tokens, np.arange(200_002), np.array([0, 200_002], np.int32), np.array([1]))
    batch = corrupt(layout, Masked(fraction=0.5, mask_share=0.0, random_share=1.0), 1)
    counts = np.bincount(batch.tokens[batch.target_positions], minlength=30)[list(VOCABULARY.residue_ids())]
    expected = len(batch.targets) / 20
    assert counts.sum() == len(batch.targets)
    assert ((counts - expected) ** 2 / expected).sum() < 50  # chi-squared, 19 degrees of freedom: p = 1e-4 at 50.8


def test_only_targets_change_and_special_tokens_are_never_among_them(corpus):
    layout = lay_out(corpus, all_of(corpus), VOCABULARY)
    original = layout.tokens.copy()
    batch = corrupt(layout, Masked(fraction=0.9), 3)
    assert np.array_equal(layout.tokens, original), "the layout itself must stay as it is"
    others = np.ones(len(original), bool)
    others[batch.target_positions] = False
    assert np.array_equal(batch.tokens[others], original[others])
    assert np.array_equal(batch.targets, original[batch.target_positions])
    special = np.concatenate([batch.cu_seqlens[:-1], batch.cu_seqlens[1:] - 1])
    assert not np.isin(batch.target_positions, special).any()
    assert np.all(np.diff(batch.target_positions) > 0)
    assert batch.max_length == layout.max_length and np.array_equal(batch.sample_ids, np.arange(corpus.num_sequences))


@settings(max_examples=50)
@given(
    spans=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 60)), min_size=1, max_size=8),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 2**31),
)
def test_targets_are_those_of_one_draw_a_position(spans, share, seed, epoch):
    starts, lengths = zip(*spans, strict=True)
    samples = made_samples(lengths, starts=starts, epoch=epoch)
    which, residues = draw_targets(samples, share=share, seed=seed)
    expected = []
    for number, (start, length) in enumerate(spans):
        for position in range(start, start + length):
            words = draw(seed, Purpose.TARGETS, epochs=epoch, sample_ids=np.array([number]), counters=position // 4)
            if words[position % 4, 0] < threshold(share):
                expected.append((number, position - start))
    assert list(zip(which.tolist(), residues.tolist(), strict=True)) == expected


def masks_of(batch):
    """For each sample what the model sees of it, and where it has to predict."""
    views = {}
    for i, (start, end) in enumerate(zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)):
        inside = batch.target_positions[(batch.target_positions >= start) & (batch.target_positions < end)] - start
        views[int(batch.sample_ids[i])] = (batch.tokens[start:end].tolist(), inside.tolist())
    return views


@given(order=st.permutations(range(12)), cuts=st.sets(st.integers(1, 11)))
def test_a_sample_has_the_same_mask_in_any_batch(corpus, order, cuts):
    samples = all_of(corpus).take(np.arange(12))
    together = masks_of(corrupt(lay_out(corpus, samples, VOCABULARY), Masked(), 5))
    apart = {}
    for part in np.split(np.array(order), sorted(cuts)):
        apart |= masks_of(corrupt(lay_out(corpus, samples.take(part), VOCABULARY), Masked(), 5))
    assert apart == together


def test_a_residue_has_the_same_fate_in_any_crop(corpus):
    number = int(np.argmax(corpus.lengths))
    length = int(corpus.lengths[number])
    at = {}
    for start, crop in ((0, length), (13, length - 30), (102, 51)):
        samples = Samples(np.zeros(1, np.int64), np.array([number]), np.array([start]), np.array([crop]))
        batch = corrupt(lay_out(corpus, samples, VOCABULARY), Masked(), 5)
        at[start] = {
            (position - 1 + start, token)
            for position, token in zip(batch.target_positions.tolist(), batch.tokens[batch.target_positions].tolist(), strict=True)
        }
    for start, crop in ((13, length - 30), (102, 51)):
        assert at[start] == {(position, token) for position, token in at[0] if start <= position < start + crop}
    assert at[102]


def test_epochs_and_seeds_and_neighbours_are_independent():
    samples = [made_samples([50_000] * 2, epoch=epoch) for epoch in (0, 1)]

    def indicator(samples, seed):
        which, residues = draw_targets(samples, share=0.15, seed=seed)
        hit = np.zeros((2, 50_000))
        hit[which, residues] = 1
        return hit

    base = indicator(samples[0], 1)
    pairs = [(base[0], base[1]), (base, indicator(samples[0], 2)), (base, indicator(samples[1], 1))]
    pairs += [(base[0, :-lag], base[0, lag:]) for lag in (1, 2, 3, 4, 8)]
    for one, other in pairs:
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < SIGMAS / np.sqrt(one.size)


def test_an_empty_bin_is_an_empty_batch(corpus):
    nothing = all_of(corpus).take(slice(0, 0))
    batch = corrupt(lay_out(corpus, nothing, VOCABULARY), Masked(), 5)
    assert len(batch.tokens) == len(batch.targets) == len(batch.target_positions) == batch.max_length == batch.num_residues == 0
    assert batch.cu_seqlens.tolist() == [0]


def test_the_table_names_functions_that_exist():
    assert all(callable(objectives.get(name)) for name in objectives.OBJECTIVES)
    assert objectives.get("masked") is corrupt
    assert all(name in objectives.OBJECTIVES for record in architecture.available() for name in record.objectives)
