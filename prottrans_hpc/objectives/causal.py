"""Transformer-XL's objective: predict each token from those before it (Dai et al. 2019). Nothing is drawn at random.

Within a protein the first token is context only. A lane that carries on over the ends of proteins predicts their first
tokens too, and the last token of a piece predicts the one that the next piece begins with.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..architecture import Batch
from ..recipe_objectives import Causal
from .lane_layout import LaneLayout, flip
from .layout import Layout

Int64 = npt.NDArray[np.int64]


def predict(layout: Layout | LaneLayout, settings: Causal, seed: int) -> Batch:
    """One micro batch (numpy arrays) in which every token is a target whose predecessor is at hand."""
    return _of_lanes(layout, settings) if isinstance(layout, LaneLayout) else _of_samples(layout, settings)


def _of_lanes(layout: LaneLayout, settings: Causal) -> Batch:
    ends = layout.cu_seqlens[1:].astype(np.int64) - 1
    following, documents = np.roll(layout.tokens, -1), np.roll(layout.documents, -1)
    following[ends], documents[ends] = layout.following, layout.following_documents
    resets = settings.protein_end == "reset"
    target_positions = np.flatnonzero((documents == layout.documents) if resets else (documents >= 0))
    return Batch(
        tokens=layout.tokens,
        positions=layout.positions,
        cu_seqlens=layout.cu_seqlens,
        target_positions=target_positions,
        targets=following[target_positions],
        sample_ids=layout.sample_ids,
        max_length=layout.max_length,
        num_residues=layout.num_residues,
        lanes=layout.lanes,
        documents=layout.documents if resets else None,
        carried=layout.carried if resets else layout.starts,
    )


def _of_samples(layout: Layout, settings: Causal) -> Batch:
    tokens = layout.tokens
    if settings.direction == "reverse":
        tokens = tokens.copy()
        flip(tokens, layout.residue_starts, layout.samples.lengths)
    last = np.zeros(len(tokens), bool)
    last[layout.cu_seqlens[1:] - 1] = True
    target_positions = np.flatnonzero(~last)
    return Batch(
        tokens=tokens,
        positions=layout.positions,
        cu_seqlens=layout.cu_seqlens,
        target_positions=target_positions,
        targets=tokens[target_positions + 1],
        sample_ids=layout.samples.ids,
        max_length=layout.max_length,
        num_residues=layout.num_residues,
    )
