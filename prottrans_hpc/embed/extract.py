"""One batch of proteins through the model, with a back-off when memory runs out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from .. import errors
from .batches import Int64s
from .options import STORED
from .parts import Extract, joined

_PIECE = 256
"""Rows that are summed in one go; pieces are then summed again, which keeps the rounding error of a long mean small."""


class Embedder(Protocol):
    """A model, or several side by side."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    @property
    def width(self) -> int:
        """Numbers in an embedding."""

    def hidden(self, proteins: list[bytes]) -> torch.Tensor:
        """The vectors of the proteins' residues, [sum of lengths, width], fp32."""


@dataclass
class Extractor:
    """Runs batches; remembers how large a batch the memory held."""

    model: Embedder
    precision: str
    per_residue: bool
    mean: bool
    max_residues: int | None = None
    """Residues of the largest batch worth trying, once memory has run out; None: it has not."""

    def run(self, proteins: Sequence[bytes], rows: Int64s) -> Extract:
        """Embed the proteins of one batch; `rows` are their places in the window.

        Out of memory halves the batch, down to a single protein, which then fails with its reason.
        """
        total = sum(map(len, proteins))
        if self.max_residues is not None and total > self.max_residues and len(proteins) > 1:
            return self._halves(proteins, rows)
        extract = self._try(proteins, rows)
        if extract is not None:
            return extract
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(proteins) == 1:
            return self._nothing({int(rows[0]): f"out of memory on {self.model.device.type}, even alone ({total} residues)"})
        self.max_residues = min(total // 2, self.max_residues or total)
        return self._halves(proteins, rows)

    def _halves(self, proteins: Sequence[bytes], rows: Int64s) -> Extract:
        middle = len(proteins) // 2
        return joined([self.run(proteins[:middle], rows[:middle]), self.run(proteins[middle:], rows[middle:])])

    def _try(self, proteins: Sequence[bytes], rows: Int64s) -> Extract | None:
        """The result, or None when memory ran out; a function of its own so that its tensors are gone by then."""
        try:
            return self._results(proteins, rows)
        except (RuntimeError, MemoryError) as error:
            if not errors.is_out_of_memory(error):
                raise
            return None

    def _results(self, proteins: Sequence[bytes], rows: Int64s) -> Extract:
        hidden = self.model.hidden(list(proteins))
        lengths = np.array([len(residues) for residues in proteins])
        stored = getattr(torch, STORED[self.precision])
        means = segment_means(hidden, lengths).to(stored).cpu().numpy()
        residues = hidden.to(stored).cpu().numpy() if self.per_residue else None
        finite = _finite(means, residues, lengths)
        failed = {int(row): f"the model gives non-finite values in {STORED[self.precision]}" for row in rows[~finite]}
        if failed and residues is not None:
            residues = residues[np.repeat(finite, lengths)]
        return Extract(rows[finite], means[finite] if self.mean else None, residues, failed)

    def _nothing(self, failed: dict[int, str]) -> Extract:
        empty = np.empty((0, self.model.width), STORED[self.precision])
        return Extract(np.empty(0, np.int64), empty if self.mean else None, empty if self.per_residue else None, failed)


def segment_means(hidden: torch.Tensor, lengths: Int64s) -> torch.Tensor:
    """The mean of each run of rows: [sum of lengths, H] and S positive lengths -> [S, H], fp32."""
    num_pieces = -(-lengths // _PIECE)
    pieces = np.full(num_pieces.sum(), _PIECE)
    pieces[np.cumsum(num_pieces) - 1] = lengths - (num_pieces - 1) * _PIECE
    sums = torch.segment_reduce(hidden, "sum", lengths=torch.from_numpy(pieces).to(hidden.device), axis=0)
    if len(pieces) > len(lengths):
        sums = torch.segment_reduce(sums, "sum", lengths=torch.from_numpy(num_pieces).to(hidden.device), axis=0)
    return sums / torch.from_numpy(lengths).to(hidden)[:, None]


def _finite(means: npt.NDArray[np.floating], residues: npt.NDArray[np.floating] | None, lengths: Int64s) -> npt.NDArray[np.bool_]:
    """For each protein whether all of its numbers are finite; the means alone show it unless only storing overflows."""
    finite: npt.NDArray[np.bool_] = np.isfinite(means).all(axis=1)
    if residues is not None and not np.isfinite(residues).all():
        starts = np.cumsum(lengths) - lengths
        finite &= np.logical_and.reduceat(np.isfinite(residues).all(axis=1), starts)
    return finite
