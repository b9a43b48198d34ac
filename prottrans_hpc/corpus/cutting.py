"""What becomes of a sequence over the limit of a phase: one random window of it, or all its fragments.

A crop is drawn anew in every epoch and is a pure function of seed, epoch and sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .counter_rng import Purpose, below, draw
from .samples import Samples

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Cut:
    """Under which limit sequences are cut, and what addresses the random numbers for it."""

    seed: int
    epoch: int
    max_residues: int


def num_fragments(lengths: Int64, max_residues: int) -> Int64:
    """Into how many samples each sequence is split; an empty one stays a sample."""
    return np.maximum(-(-lengths // max_residues), 1)


def _crop(ids: Int64, lengths: Int64, cut: Cut) -> Samples:
    starts = np.zeros(len(ids), np.int64)
    long = np.flatnonzero(lengths > cut.max_residues)
    words = draw(cut.seed, Purpose.CROP, epochs=cut.epoch, sample_ids=ids[long], counters=0)
    starts[long] = below(words[0], lengths[long] - cut.max_residues + 1)
    return Samples(np.full(len(ids), cut.epoch, np.int64), ids, starts, np.minimum(lengths, cut.max_residues))


def _split(ids: Int64, lengths: Int64, cut: Cut) -> Samples:
    """Fragments that differ by one residue at most: a short remainder would be a poor sample."""
    counts = num_fragments(lengths, cut.max_residues)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    of_sequence, whole = np.repeat(counts, counts), np.repeat(lengths, counts)
    starts, ends = number * whole // of_sequence, (number + 1) * whole // of_sequence
    return Samples(np.full(len(starts), cut.epoch, np.int64), np.repeat(ids, counts), starts, ends - starts)


LONG_SEQUENCES: dict[str, Callable[[Int64, Int64, Cut], Samples]] = {"crop": _crop, "split": _split}
