"""The noun that order, packing, reading and objectives exchange: which stretch of which sequence, in which epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Samples:
    """S samples in order; each is a stretch of one sequence of a split."""

    epochs: Int64
    """[S]: in which pass over the corpus; part of the address of every random number of the sample."""
    ids: Int64
    """[S]: number of the sequence within the split."""
    starts: Int64
    """[S]: first residue within the sequence."""
    lengths: Int64
    """[S]: residues."""

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, which: Int64 | slice) -> Samples:
        """Some of the samples, by index or slice."""
        return Samples(self.epochs[which], self.ids[which], self.starts[which], self.lengths[which])


def concatenate(parts: Sequence[Samples]) -> Samples:
    """The samples of several parts, one after the other."""
    if len(parts) == 1:
        return parts[0]
    return Samples(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Samples)))


def whole_sequences(ids: Int64, lengths: Int64, *, epoch: int) -> Samples:
    """Samples that are entire sequences."""
    return Samples(np.full(len(ids), epoch, np.int64), ids, np.zeros(len(ids), np.int64), lengths)
