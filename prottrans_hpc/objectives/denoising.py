"""T5's objectives: a decoder restores what was corrupted for the encoder (Raffel et al. 2020, sections 3.1.4 and 3.3).

Which single residues are corrupted is drawn as for BERT: a residue's fate is addressed by (seed, epoch, sequence,
position in the whole sequence). Spans are drawn for a sample as a whole, by exact shares, from numbers addressed by where
it starts. Either way a sample is corrupted alike in any batch and on any rank. Special tokens are never corrupted;
the decoder writes those behind the residues as well. Sentinels count down from the vocabulary's mask token: in the
published vocabulary <extra_id_0> is the last token, <extra_id_1> the one before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..architecture import Batch, Vocabulary
from ..corpus.counter_rng import Purpose, below, draw, threshold
from ..corpus.samples import Samples
from ..recipe_objectives import Denoising
from .layout import Layout
from .masked import draw_targets

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Text:
    """S sequences packed end to end."""

    tokens: Int64
    lengths: Int64
    """[S]: tokens of each."""

    @property
    def begins(self) -> Int64:
        """[S]: where each sequence begins."""
        return np.cumsum(self.lengths) - self.lengths

    @property
    def positions(self) -> Int64:
        """[T]: of each token within its sequence."""
        return np.arange(len(self.tokens)) - np.repeat(self.begins, self.lengths)

    @property
    def cu_seqlens(self) -> npt.NDArray[np.int32]:
        """[S + 1]."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)


def corrupt(layout: Layout, settings: Denoising, seed: int) -> Batch:
    """One micro batch (numpy arrays); every token that the decoder writes is a target."""
    is_noise = NOISES[settings.noise](layout, settings, seed)
    read, written = _TARGETS[settings.target](layout, is_noise, settings, seed)
    # The decoder reads what it has written so far, behind a token that begins a text: padding, as T5 has no other.
    decoder_tokens = np.concatenate([[0], written.tokens[:-1]])[: len(written.tokens)]
    decoder_tokens[written.begins[written.lengths > 0]] = layout.vocabulary.index(layout.vocabulary.padding)
    return Batch(
        tokens=read.tokens,
        positions=read.positions,
        cu_seqlens=read.cu_seqlens,
        target_positions=np.arange(len(written.tokens)),
        targets=written.tokens,
        sample_ids=layout.samples.ids,
        max_length=int(read.lengths.max(initial=0)),
        num_residues=layout.num_residues,
        decoder_tokens=decoder_tokens,
        decoder_positions=written.positions,
        decoder_cu_seqlens=written.cu_seqlens,
        decoder_max_length=int(written.lengths.max(initial=0)),
    )


def _single(layout: Layout, settings: Denoising, seed: int) -> Bool:
    """Each residue by a draw of its own."""
    which, residues = draw_targets(layout.samples, share=settings.fraction, seed=seed)
    is_noise = np.zeros(len(layout.tokens), bool)
    is_noise[layout.residue_starts[which] + residues] = True
    return is_noise


def _spans(layout: Layout, settings: Denoising, seed: int) -> Bool:
    """As many residues of each sample as the share says, in spans of random lengths around the mean, at random distances.

    The authors' random_spans_noise_mask with random_roll: without the roll the first residue would never be
    corrupted and the last one always.
    """
    is_noise = np.zeros(len(layout.tokens), bool)
    enough = np.flatnonzero(layout.samples.lengths >= 2)
    if not len(enough):
        return is_noise
    samples = layout.samples.take(enough)
    lengths = samples.lengths
    num_noise = np.clip(np.rint(lengths * settings.fraction).astype(np.int64), 1, lengths - 1)
    num_spans = np.clip(np.rint(num_noise / settings.mean_span).astype(np.int64), 1, np.minimum(num_noise, lengths - num_noise))
    noise = _cut(samples, num_noise, num_spans, seed, Purpose.SPAN_LENGTHS)
    rest = _cut(samples, lengths - num_noise, num_spans, seed, Purpose.SPAN_GAPS)
    unrolled = np.repeat(np.tile([False, True], len(noise)), np.stack([rest, noise], axis=1).ravel())
    shifts = below(draw(seed, Purpose.SPAN_LENGTHS, epochs=samples.epochs, sample_ids=samples.ids, counters=samples.starts)[1], lengths)
    begins = np.cumsum(lengths) - lengths
    residues = np.arange(len(unrolled)) - np.repeat(begins, lengths)
    rolled = unrolled[np.repeat(begins, lengths) + (residues + np.repeat(shifts, lengths)) % np.repeat(lengths, lengths)]
    is_noise[np.repeat(layout.residue_starts[enough], lengths) + residues] = rolled
    return is_noise


def _cut(samples: Samples, num_items: Int64, num_parts: Int64, seed: int, purpose: Purpose) -> Int64:
    """Cut each sample's `num_items` items into `num_parts` parts of at least one, all ways alike likely: the lengths, sample after sample."""
    num_gaps = num_items - 1
    of_sample = np.repeat(np.arange(len(samples)), num_gaps)
    first_gaps = np.cumsum(num_gaps) - num_gaps
    gaps = np.arange(len(of_sample)) - first_gaps[of_sample]
    words = draw(seed, purpose, epochs=samples.epochs[of_sample], sample_ids=samples.ids[of_sample], counters=samples.starts[of_sample] + gaps)
    by_word = np.lexsort((words[0], of_sample))
    chosen = by_word[gaps < num_parts[of_sample] - 1]  # `gaps` counts up within each sample, as the ranks do
    begins_part = np.zeros(int(num_items.sum()), bool)
    first_items = np.cumsum(num_items) - num_items
    begins_part[first_items] = True
    begins_part[first_items[of_sample[chosen]] + gaps[chosen] + 1] = True
    return np.diff(np.flatnonzero(begins_part), append=len(begins_part))


NOISES: dict[str, Callable[[Layout, Denoising, int], Bool]] = {"single": _single, "spans": _spans}
"""Which tokens are corrupted, bool [T]."""


def _whole(layout: Layout, is_noise: Bool, settings: Denoising, seed: int) -> tuple[_Text, _Text]:
    """One and the same sentinel in the place of each corrupted residue, or a random residue; the whole sequence is written."""
    vocabulary, samples = layout.vocabulary, layout.samples
    places = np.flatnonzero(is_noise)
    replacements = np.full(len(places), vocabulary.index(vocabulary.mask), np.int64)
    if settings.random_share:
        which = np.searchsorted(layout.cu_seqlens, places, side="right") - 1
        counters = samples.starts[which] + places - layout.residue_starts[which]
        words = draw(seed, Purpose.REPLACEMENT, epochs=samples.epochs[which], sample_ids=samples.ids[which], counters=counters)
        standard = np.array(vocabulary.residue_ids(), np.int64)
        replacements = np.where(words[0] < threshold(settings.random_share), standard[below(words[1], len(standard))], replacements)
    tokens = layout.tokens.copy()
    tokens[places] = replacements
    lengths = np.diff(layout.cu_seqlens).astype(np.int64)
    num_prefix = len(vocabulary.prefix)
    return _Text(tokens, lengths), _Text(layout.tokens[layout.positions >= num_prefix], lengths - num_prefix)


def _sentinels(layout: Layout, is_noise: Bool, settings: Denoising, seed: int) -> tuple[_Text, _Text]:
    """A sentinel of its own in the place of each corrupted span; written are each sentinel and its span, and a last sentinel."""
    first_sentinel, num_sentinels = layout.vocabulary.index(layout.vocabulary.mask), _count_sentinels(layout.vocabulary)
    lengths = np.diff(layout.cu_seqlens).astype(np.int64)
    begins = layout.cu_seqlens[:-1].astype(np.int64)
    begins_span = is_noise & ~np.concatenate([[False], is_noise[:-1]])[: len(is_noise)]
    spans_before = np.cumsum(begins_span) - begins_span
    number = np.cumsum(begins_span) - np.repeat(spans_before[begins], lengths)  # of the span that a token is in or behind, from 1
    # One sentinel is for the end: spans that the vocabulary has none for stay as they are.
    is_noise = is_noise & (number < num_sentinels)
    begins_span &= is_noise
    num_spans = np.minimum(number[begins + lengths - 1], num_sentinels - 1) if len(begins) else number
    sentinel = first_sentinel - (number - 1)
    is_read = ~is_noise | begins_span
    read = _Text(np.where(begins_span, sentinel, layout.tokens)[is_read], _counts(is_read.astype(np.int64), layout))
    is_end = layout.positions >= np.repeat(lengths, lengths) - len(layout.vocabulary.suffix)
    ends = is_end & ~np.concatenate([[False], is_end[:-1]])[: len(is_end)]
    ends[begins[lengths <= len(layout.vocabulary.suffix)]] = True
    sentinel = np.where(ends, first_sentinel - np.repeat(num_spans, lengths), sentinel)
    return read, _written(layout, is_noise | is_end, begins_span | ends, sentinel)


def _written(layout: Layout, is_written: Bool, has_sentinel: Bool, sentinel: Int64) -> _Text:
    """The tokens that are written, each with a sentinel in front of it where it has one."""
    num_tokens = is_written.astype(np.int64) + has_sentinel
    tokens = np.empty(int(num_tokens.sum()), np.int64)
    last = np.cumsum(num_tokens) - 1
    tokens[last[is_written]] = layout.tokens[is_written]
    tokens[last[has_sentinel] - 1] = sentinel[has_sentinel]
    return _Text(tokens, _counts(num_tokens, layout))


def _counts(of_token: Int64, layout: Layout) -> Int64:
    """Sums over the tokens of each sequence, [S]."""
    total = np.concatenate([[0], np.cumsum(of_token)])
    return np.diff(total[layout.cu_seqlens])


def _count_sentinels(vocabulary: Vocabulary) -> int:
    return sum(token.startswith("<extra_id_") for token in vocabulary.tokens)


_TARGETS: dict[str, Callable[[Layout, Bool, Denoising, int], tuple[_Text, _Text]]] = {"whole": _whole, "sentinels": _sentinels}
"""What the encoder reads and what the decoder writes."""
