"""T5's corruption: published shares, nothing lost between what is read and what is written, and a fate that is the sample's own."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prottrans_hpc import objectives
from prottrans_hpc.architectures.prot_t5 import ARCHITECTURE
from prottrans_hpc.corpus.index import read_index
from prottrans_hpc.corpus.reader import Corpus
from prottrans_hpc.corpus.samples import Samples, whole_sequences
from prottrans_hpc.objectives.denoising import NOISES, corrupt
from prottrans_hpc.objectives.layout import Layout, lay_out
from prottrans_hpc.recipe_objectives import Denoising

VOCABULARY = ARCHITECTURE.vocabulary
END, SENTINEL = VOCABULARY.index("</s>"), VOCABULARY.index("<extra_id_0>")
KINDS = {
    "iid_15_m_f": Denoising(),
    "iid_15_m_r10s90_f": Denoising(random_share=0.1),
    "sentinels": Denoising(target="sentinels"),
    "spans": Denoising(noise="spans", target="sentinels"),
    "whole from spans": Denoising(noise="spans"),
}


@pytest.fixture(scope="module")
def corpus(small_corpus):
    return Corpus(read_index(small_corpus))


def all_of(corpus, *, epoch=0):
    return whole_sequences(np.arange(corpus.num_sequences), corpus.lengths, epoch=epoch)


def made_layout(lengths, *, epoch=0, starts=0):
    """Samples of random residues."""
    lengths = np.asarray(lengths, np.int64)
    num = len(lengths)
    samples = Samples(np.full(num, epoch), np.arange(num), np.full(num, starts), lengths)
    ends = np.cumsum(lengths + 1)
    total = int(ends[-1]) if num else 0
    tokens = np.random.default_rng(int(lengths.sum())).integers(3, 23, total)
    tokens[ends - 1] = END
    begins = ends - lengths - 1
    return Layout(VOCABULARY, samples, tokens, np.arange(total) - np.repeat(begins, lengths + 1), np.array([0, *ends], np.int32), begins)


def sequences(tokens, cu_seqlens):
    return [tokens[start:end].tolist() for start, end in itertools.pairwise(cu_seqlens)]


def restored(read, written):
    """What a reader of both texts knows of the sequence: each sentinel in `read` replaced by what follows it in `written`."""
    spans: dict[int, list[int]] = {}
    for token in written[:-1]:
        if token > END + 26:
            spans[token] = []
        else:
            spans[max(spans, key=list(spans).index)].append(token)
    return [residue for token in read for residue in (spans.pop(token) if token in spans else [token])], spans


def within(count, num, share):
    return abs(count - num * share) < 5 * np.sqrt(num * share * (1 - share))


def test_the_published_objective_replaces_15_percent_by_one_sentinel_and_wants_the_whole_sequence(corpus):
    layout = lay_out(corpus, all_of(corpus), VOCABULARY)
    batch = corrupt(layout, KINDS["iid_15_m_f"], 3)
    changed = batch.tokens != layout.tokens
    assert within(np.count_nonzero(changed), batch.num_residues, 0.15)
    assert set(batch.tokens[changed].tolist()) == {SENTINEL}
    assert np.array_equal(batch.targets, layout.tokens) and np.array_equal(batch.decoder_cu_seqlens, layout.cu_seqlens)
    assert SENTINEL == 127 == len(VOCABULARY.tokens) - 1


def test_r10s90_replaces_a_tenth_of_them_by_random_residues(corpus):
    layout = lay_out(corpus, all_of(corpus), VOCABULARY)
    plain, batch = corrupt(layout, KINDS["iid_15_m_f"], 3), corrupt(layout, KINDS["iid_15_m_r10s90_f"], 3)
    was_masked = plain.tokens == SENTINEL
    now = batch.tokens[was_masked]
    assert np.array_equal(batch.tokens[~was_masked], layout.tokens[~was_masked]), "the same residues are corrupted"
    assert within(np.count_nonzero(now != SENTINEL), len(now), 0.1)
    assert set(now[now != SENTINEL].tolist()) == set(VOCABULARY.residue_ids())


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_reads_what_it_has_written_so_far(corpus, kind):
    batch = corrupt(lay_out(corpus, all_of(corpus).take(np.arange(20)), VOCABULARY), KINDS[kind], 3)
    read, written = sequences(batch.decoder_tokens, batch.decoder_cu_seqlens), sequences(batch.targets, batch.decoder_cu_seqlens)
    for before, after in zip(read, written, strict=True):
        assert before == [0, *after[:-1]] and after[-1] == END
    assert batch.target_positions.tolist() == list(range(len(batch.targets)))
    assert batch.decoder_max_length == max(map(len, written)) and batch.max_length == int(np.diff(batch.cu_seqlens).max())
    for positions, borders in ((batch.positions, batch.cu_seqlens), (batch.decoder_positions, batch.decoder_cu_seqlens)):
        assert all(part == list(range(len(part))) for part in sequences(positions, borders))


@pytest.mark.parametrize("kind", ["sentinels", "spans"])
@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 90), max_size=6), fraction=st.floats(0.05, 0.9), seed=st.integers(0, 2**40))
def test_both_texts_together_are_the_sequence(kind, lengths, fraction, seed):
    layout = made_layout(lengths)
    chosen = Denoising(noise=KINDS[kind].noise, target="sentinels", fraction=fraction)
    batch = corrupt(layout, chosen, seed)
    read, written = sequences(batch.tokens, batch.cu_seqlens), sequences(batch.targets, batch.decoder_cu_seqlens)
    for original, seen, asked in zip(sequences(layout.tokens, layout.cu_seqlens), read, written, strict=True):
        found, left = restored(seen, asked)
        assert found == original
        assert list(left.values()) == [[]], "one sentinel stands for the end"
        sentinels = [token for token in asked if token > END + 26]
        assert sentinels == list(range(SENTINEL, SENTINEL - len(sentinels), -1))


def test_sentinels_never_run_out():
    layout = made_layout([3_000])
    batch = corrupt(layout, KINDS["sentinels"], 1)
    found, left = restored(batch.tokens.tolist(), batch.targets.tolist())
    assert found == layout.tokens.tolist() and list(left) == [28]
    assert len(set(batch.tokens[batch.tokens > 27].tolist())) == 99


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 300), min_size=1, max_size=6), fraction=st.floats(0.01, 0.99), mean=st.floats(1.0, 12.0), seed=st.integers(0, 2**40))
def test_spans_have_the_exact_share_and_number(lengths, fraction, mean, seed):
    layout = made_layout(lengths)
    is_noise = NOISES["spans"](layout, Denoising(noise="spans", fraction=fraction, mean_span=mean), seed)
    for length, flags in zip(lengths, sequences(is_noise, layout.cu_seqlens), strict=True):
        assert not flags[-1], "the special token stays"
        if length < 2:
            assert not any(flags)
            continue
        wanted = min(max(round(length * fraction), 1), length - 1)
        assert sum(flags) == wanted
        num_spans = min(max(round(wanted / mean), 1), wanted, length - wanted)
        starts = sum(flag and not before for flag, before in zip(flags[:-1], [flags[length - 1], *flags[: length - 1]], strict=True))
        assert starts == num_spans, "counted round the corner, where the roll may have cut one in two"


def test_spans_fall_alike_everywhere():
    layout = made_layout([100] * 4_000)
    is_noise = NOISES["spans"](layout, Denoising(noise="spans"), 3).reshape(4_000, 101)[:, :100]
    counts = is_noise.sum(axis=0)
    assert counts.sum() == 15 * 4_000
    assert ((counts - 600) ** 2 / (600 * 0.85)).sum() < 200, "roughly chi-squared with 99 degrees of freedom, neighbours correlated"
    assert abs(counts - 600).max() < 6 * np.sqrt(600 * 0.85)


@settings(deadline=None, max_examples=30)
@given(kind=st.sampled_from(list(KINDS)), order=st.permutations(range(12)), cuts=st.sets(st.integers(1, 11)))
def test_a_sample_is_corrupted_alike_in_any_batch(corpus, kind, order, cuts):
    def texts(samples):
        batch = corrupt(lay_out(corpus, samples, VOCABULARY), KINDS[kind], 5)
        both = zip(sequences(batch.tokens, batch.cu_seqlens), sequences(batch.targets, batch.decoder_cu_seqlens), strict=True)
        return dict(zip(batch.sample_ids.tolist(), both, strict=True))

    samples = all_of(corpus).take(np.arange(12))
    apart: dict = {}
    for part in np.split(np.array(order), sorted(cuts)):
        apart |= texts(samples.take(part))
    assert apart == texts(samples)


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_and_seeds_differ(kind):
    first = corrupt(made_layout([400]), KINDS[kind], 1).tokens.tolist()
    assert corrupt(made_layout([400], epoch=1), KINDS[kind], 1).tokens.tolist() != first
    assert corrupt(made_layout([400]), KINDS[kind], 2).tokens.tolist() != first
    assert corrupt(made_layout([400], starts=400), KINDS[kind], 1).tokens.tolist() != first
    assert corrupt(made_layout([400]), KINDS[kind], 1).tokens.tolist() == first


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_bin_is_an_empty_batch(kind):
    batch = corrupt(made_layout([]), KINDS[kind], 5)
    assert len(batch.tokens) == len(batch.targets) == len(batch.decoder_tokens) == batch.max_length == batch.decoder_max_length == 0
    assert batch.cu_seqlens.tolist() == batch.decoder_cu_seqlens.tolist() == [0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_stays_as_it_is(kind):
    layout = made_layout([50, 1, 0, 30])
    before = layout.tokens.copy()
    batch = corrupt(layout, KINDS[kind], 5)
    assert np.array_equal(layout.tokens, before) and batch.num_residues == 81
    assert objectives.get("denoising") is corrupt
