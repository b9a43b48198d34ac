"""One micro batch laid out end to end: special tokens around every sample, residues between, nothing corrupted yet."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..architecture import Vocabulary
from ..corpus.reader import Corpus
from ..corpus.samples import Samples

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Layout:
    """S samples packed into T tokens."""

    vocabulary: Vocabulary
    samples: Samples
    tokens: Int64
    """[T]: special tokens included."""
    positions: Int64
    """[T]: position of each token within its own sample, special tokens counted."""
    cu_seqlens: Int32
    """[S + 1]: where each sample begins with its special tokens, then T."""
    residue_starts: Int64
    """[S]: where the residues of each sample begin."""

    @property
    def max_length(self) -> int:
        """Tokens of the longest sample; 0 when there is none."""
        return int(np.diff(self.cu_seqlens).max(initial=0))

    @property
    def num_residues(self) -> int:
        """Residues without special tokens."""
        return int(self.samples.lengths.sum())


def lay_out(corpus: Corpus, samples: Samples, vocabulary: Vocabulary) -> Layout:
    """Gather samples from the corpus into one packed array."""
    num_prefix, num_suffix = len(vocabulary.prefix), len(vocabulary.suffix)
    lengths = samples.lengths + (num_prefix + num_suffix)
    ends = np.cumsum(lengths)
    begins = ends - lengths
    total = int(ends[-1]) if len(ends) else 0
    tokens = np.empty(total, np.int64)
    for place, token in enumerate(vocabulary.prefix):
        tokens[begins + place] = vocabulary.index(token)
    for place, token in enumerate(vocabulary.suffix):
        tokens[ends - num_suffix + place] = vocabulary.index(token)
    residue_starts = begins + num_prefix
    corpus.gather(samples, vocabulary.residue_table(), tokens, residue_starts)
    positions = np.arange(total) - np.repeat(begins, lengths)
    cu_seqlens = np.concatenate([begins, [total]]).astype(np.int32)
    return Layout(vocabulary, samples, tokens, positions, cu_seqlens, residue_starts)
