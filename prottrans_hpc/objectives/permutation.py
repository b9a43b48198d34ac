"""XLNet's objective: predict spans of residues, each from what comes before it in a random order (Yang et al. 2019, section 2).

No token is replaced. The Batch says which tokens are to be predicted, and gives the place in the order of those tokens
and of the special ones (as in the authors' data_utils.py); all others are at -1, where everything sees them. A token may
be seen from every place after its own.

A text is cut into stretches, each with one span of n tokens somewhere in its n / fraction. Spans and order are drawn by
(seed, epoch, sequence, place in the whole sequence), or lane instead of sequence: the same in any batch and on any rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..architecture import Batch, Vocabulary
from ..corpus.counter_rng import WORD, Purpose, below, draw
from ..recipe_objectives import Permutation
from .lane_layout import LaneLayout
from .layout import Layout

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Texts:
    """S packed texts of any kind, and what addresses their random numbers."""

    tokens: Int64
    """[T]."""
    begins: Int64
    """[S]: where each starts in `tokens`."""
    lengths: Int64
    """[S]."""
    epochs: Int64
    """[S]."""
    ids: Int64
    """[S]: number of the sequence or lane."""
    starts: Int64
    """[S]: where the text begins in its whole sequence or lane."""

    def of_token(self) -> tuple[Int64, Int64]:
        """The text that each token belongs to, and its place there, [T] each."""
        text = np.repeat(np.arange(len(self.lengths)), self.lengths)
        return text, np.arange(len(self.tokens)) - self.begins[text]


def permute(layout: Layout | LaneLayout, settings: Permutation, seed: int) -> Batch:
    """One micro batch (numpy arrays) with about `settings.fraction` of the tokens as targets."""
    texts = _texts(layout)
    is_special = _special(layout.tokens, layout.vocabulary)
    is_target = draw_spans(texts, settings, seed) & ~is_special
    target_positions = np.flatnonzero(is_target)
    return Batch(
        tokens=layout.tokens,
        positions=layout.positions,
        cu_seqlens=layout.cu_seqlens,
        target_positions=target_positions,
        targets=layout.tokens[target_positions],
        max_length=layout.max_length,
        num_residues=layout.num_residues,
        permutation=draw_order(texts, is_target | is_special, within=settings.permute_within, seed=seed),
        **_whereabouts(layout, settings),
    )


def _texts(layout: Layout | LaneLayout) -> _Texts:
    begins = layout.cu_seqlens[:-1].astype(np.int64)
    lengths = np.diff(layout.cu_seqlens).astype(np.int64)
    if isinstance(layout, LaneLayout):
        return _Texts(layout.tokens, begins, lengths, np.full(len(begins), layout.epoch), layout.lanes, layout.starts)
    samples = layout.samples
    return _Texts(layout.tokens, begins, lengths, samples.epochs, samples.ids, samples.starts)


def _whereabouts(layout: Layout | LaneLayout, settings: Permutation) -> dict[str, Any]:
    """Which samples these are, and of which lanes what may be seen."""
    if not isinstance(layout, LaneLayout):
        return {"sample_ids": layout.samples.ids}
    resets = settings.protein_end == "reset"
    sight = {"documents": layout.documents, "carried": layout.carried} if resets else {"carried": layout.starts}
    return {"sample_ids": layout.sample_ids, "lanes": layout.lanes, **sight}


def _special(tokens: Int64, vocabulary: Vocabulary) -> Bool:
    is_special = np.zeros(len(vocabulary.tokens), np.bool_)
    is_special[[vocabulary.index(token) for token in (*vocabulary.prefix, *vocabulary.suffix)]] = True
    return is_special[tokens]


def draw_spans(texts: _Texts, settings: Permutation, seed: int) -> Bool:
    """Which tokens lie in a span, [T], special ones among them; what of a last span reaches past its text is left out."""
    sizes = np.arange(1, settings.max_span + 1)
    weights = 1 / sizes if settings.span_lengths == "inverse" else np.ones(len(sizes))
    edges = np.round(np.cumsum(weights / weights.sum())[:-1] * WORD).astype(np.uint64)
    stretches = np.maximum(np.round(sizes / settings.fraction).astype(np.int64), sizes)
    num = -(-texts.lengths // stretches[0])  # as many as could be needed: of the shortest kind
    text = np.repeat(np.arange(len(num)), num)
    number = np.arange(len(text)) - (np.cumsum(num) - num)[text]
    words = draw(seed, Purpose.PREDICTED_SPANS, epochs=texts.epochs[text], sample_ids=texts.ids[text], counters=texts.starts[text] + number)
    kind = np.searchsorted(edges, words[0], side="right")
    size, stretch = sizes[kind], stretches[kind]
    ends = np.cumsum(stretch)
    before = np.concatenate([[0], ends])[np.cumsum(num) - num]  # of the texts in front of each text
    first = ends - stretch - before[text] + below(words[1], stretch - size + 1)
    place = np.repeat(first, size) + np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
    owner = np.repeat(text, size)
    inside = place < texts.lengths[owner]
    is_target = np.zeros(len(texts.tokens), np.bool_)
    is_target[texts.begins[owner[inside]] + place[inside]] = True
    return is_target


def draw_order(texts: _Texts, is_ordered: Bool, *, within: int, seed: int) -> Int64:
    """The place of each token in its text's order, [T]; -1 where `is_ordered` is not."""
    text, place = texts.of_token()
    ordered = np.flatnonzero(is_ordered)
    text, place = text[ordered], place[ordered]
    words = draw(seed, Purpose.FACTORISATION, epochs=texts.epochs[text], sample_ids=texts.ids[text], counters=texts.starts[text] + place)
    # 64 random bits each: two tokens of a text never tie.
    ranked = np.lexsort((words[1], words[0], place // within if within else np.zeros_like(place), text))
    num = np.bincount(text, minlength=len(texts.lengths))
    order = np.full(len(texts.tokens), -1, np.int64)
    order[ordered[ranked]] = np.arange(len(ranked)) - np.repeat(np.cumsum(num) - num, num)
    return order
