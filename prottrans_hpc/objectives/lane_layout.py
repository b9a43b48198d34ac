"""One micro batch of lanes laid out end to end: from each lane the next piece of its text, nothing corrupted yet.

A lane's text is prefix, residues and suffix of one protein after the other, whole proteins of any length. A piece begins
and ends anywhere in it. Which piece is where is decided in `corpus.lanes`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..architecture import Vocabulary
from ..corpus.lanes import Pieces
from ..corpus.reader import Corpus
from ..corpus.samples import Samples

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


def lay_out_lanes(corpus: Corpus, pieces: Pieces, vocabulary: Vocabulary, *, is_reversed: bool = False) -> LaneLayout:
    """Gather pieces from the corpus into one packed array; reversed, every protein is read from its last residue to the first."""
    of_stretch = np.repeat(np.arange(len(pieces.ids)), pieces.num_tokens)
    ends = np.cumsum(pieces.num_tokens)
    places = np.arange(len(of_stretch)) - (ends - pieces.num_tokens - pieces.offsets)[of_stretch]
    tokens = _special_tokens(places, pieces.lengths[of_stretch], vocabulary)
    _gather(corpus, pieces, vocabulary, tokens, ends - pieces.num_tokens, is_reversed=is_reversed)
    documents, of_piece = pieces.documents[of_stretch], pieces.piece_of[of_stretch]
    length, num_pieces = pieces.piece_tokens, len(pieces.lanes)
    per_piece = len(tokens) // max(num_pieces, 1)  # one token more than the piece has, unless the epoch ends behind it
    inside = np.arange(len(tokens)) - of_piece * per_piece < length
    specials = (places < len(vocabulary.prefix)) | (places >= len(vocabulary.prefix) + pieces.lengths[of_stretch])
    following = np.stack([tokens, documents]).reshape(2, num_pieces, -1)[:, :, length] if per_piece > length else np.full((2, num_pieces), -1, np.int64)
    return LaneLayout(
        vocabulary=vocabulary,
        epoch=pieces.epoch,
        lanes=pieces.lanes,
        starts=pieces.starts,
        tokens=tokens[inside],
        documents=documents[inside],
        carried=pieces.carried,
        following=following[0],
        following_documents=following[1],
        cu_seqlens=(np.arange(num_pieces + 1) * length).astype(np.int32),
        num_residues=int(np.count_nonzero(inside & ~specials)),
        sample_ids=pieces.ids[np.searchsorted(pieces.piece_of, np.arange(num_pieces))],
    )


def _special_tokens(places: Int64, lengths: Int64, vocabulary: Vocabulary) -> Int64:
    """The special tokens by their place in a protein's text, [T]; residues are left at 0."""
    tokens, behind = np.zeros(len(places), np.int64), places - len(vocabulary.prefix) - lengths
    for place, token in enumerate(vocabulary.prefix):
        tokens[places == place] = vocabulary.index(token)
    for place, token in enumerate(vocabulary.suffix):
        tokens[behind == place] = vocabulary.index(token)
    return tokens


def _gather(corpus: Corpus, pieces: Pieces, vocabulary: Vocabulary, out: Int64, begins: Int64, *, is_reversed: bool) -> None:
    num_prefix = len(vocabulary.prefix)
    first = np.clip(pieces.offsets - num_prefix, 0, pieces.lengths)
    last = np.clip(pieces.offsets + pieces.num_tokens - num_prefix, 0, pieces.lengths)
    out_starts = begins + np.maximum(num_prefix - pieces.offsets, 0)
    counts, epochs = last - first, np.full(len(pieces.ids), pieces.epoch, np.int64)
    some = np.flatnonzero(counts)
    starts = pieces.lengths - last if is_reversed else first
    samples = Samples(epochs[some], pieces.ids[some], starts[some], counts[some])
    corpus.gather(samples, vocabulary.residue_table(), out, out_starts[some])
    if is_reversed:
        flip(out, out_starts[some], counts[some])


def flip(tokens: Int64, starts: Int64, counts: Int64) -> None:
    """Turn some stretches of an array round, in place."""
    of_stretch = np.repeat(np.arange(len(starts)), counts)
    forth = np.arange(len(of_stretch)) + (starts - (np.cumsum(counts) - counts))[of_stretch]
    back = (2 * starts + counts - 1)[of_stretch] - forth
    tokens[forth] = tokens[back]
