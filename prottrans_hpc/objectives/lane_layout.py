"""One micro batch of lanes laid out end to end: from each lane the next piece of its text, nothing corrupted yet.

A lane's text is prefix, residues and suffix of one protein after the other, whole proteins of any length. A piece begins
and ends anywhere in it. Which piece is where is decided in `corpus.lanes`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..architecture import Vocabulary

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class LaneLayout:
    """S pieces of equal length packed into T tokens; random numbers of a piece are addressed by seed, epoch, lane and offset."""

    vocabulary: Vocabulary
    epoch: int
    lanes: Int64
    """[S]: which lane of the global batch each piece is of."""
    starts: Int64
    """[S]: where each piece begins in its lane's text of this epoch, tokens."""
    tokens: Int64
    """[T]: special tokens included."""
    documents: Int64
    """[T]: the number of each token's protein in the order of the epoch: it grows along a lane."""
    carried: Int64
    """[S]: tokens right before each piece, since the epoch began, that are of the protein which the piece begins in."""
    following: Int64
    """[S]: the token behind each piece in its lane's text; -1 where the epoch ends."""
    following_documents: Int64
    """[S]: the number of its protein; -1 where there is none."""
    cu_seqlens: Int32
    """[S + 1]: where each piece begins, then T."""
    num_residues: int
    """Tokens that are not special."""
    sample_ids: Int64
    """[S]: which sequence of the corpus each piece begins in."""

    @property
    def max_length(self) -> int:
        """Tokens of a piece; 0 when there is none."""
        return int(np.diff(self.cu_seqlens).max(initial=0))

    @property
    def positions(self) -> Int64:
        """[T]: position of each token within its piece."""
        lengths = np.diff(self.cu_seqlens)
        return np.arange(len(self.tokens)) - np.repeat(self.cu_seqlens[:-1].astype(np.int64), lengths)
