"""Random numbers that are a pure function of what they are for: Philox4x32-10, vectorised.

Nothing here has a state. A number is addressed by (seed, purpose, epoch, sample, counter), so that a sample
gets the same crop and the same mask on any rank, in any packing, and after any resume (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3", section 3.3).
"""

from __future__ import annotations

import enum

import numpy as np
import numpy.typing as npt

UInt64 = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]

WORD = 1 << 32
"""Every draw is an integer below this, so that shares become exact integer thresholds on every machine."""

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(WORD - 1)
_SHIFT = np.uint64(32)
_CHUNK = 8192
"""Counters worked on at once: their eight buffers stay in a core's second-level cache."""


class Purpose(enum.IntEnum):
    """What a number is drawn for; one list, so that no two uses share a stream. Values are part of a run's identity."""

    BLOCK_ORDER = 1
    WINDOW_ORDER = 2
    CROP = 3
    TARGETS = 4
    REPLACEMENT = 5
    PREDICTED_SPANS = 21
    FACTORISATION = 22
    SPAN_LENGTHS = 31
    SPAN_GAPS = 32


def draw(seed: int, purpose: Purpose, *, epochs: Int64 | int, sample_ids: Int64, counters: Int64 | int) -> UInt64:
    """Four words for each address: uint64 [4, n], every value below 2**32.

    `epochs` and `counters` (below 2**32) are broadcast to `sample_ids` (int64 [n]). Of the seed, 56 bits count.
    """
    num = len(sample_ids)
    words = np.empty((4, num), np.uint64)
    ids = sample_ids.astype(np.uint64)
    words[0] = np.asarray(counters, dtype=np.uint64)
    np.bitwise_and(ids, _LOW, out=words[1])
    np.right_shift(ids, _SHIFT, out=words[2])
    words[3] = np.asarray(epochs, dtype=np.uint64)
    key = (seed % WORD, (seed >> 32) % (1 << 24) << 8 | int(purpose))
    for start in range(0, num, _CHUNK):
        philox4x32(words[:, start : start + _CHUNK], key)
    return words


def philox4x32(words: UInt64, key: tuple[int, int]) -> None:
    """Replace the counters `words` (uint64 [4, n], each below 2**32) by the output of Philox4x32-10 under `key`."""
    x0, x1, x2, x3 = words.copy()
    high0, high1 = np.empty_like(x0), np.empty_like(x0)
    k0, k1 = key
    for _ in range(_ROUNDS):
        np.multiply(x0, _MULTIPLIERS[0], out=x0)
        np.multiply(x2, _MULTIPLIERS[1], out=x2)
        np.right_shift(x0, _SHIFT, out=high0)
        np.right_shift(x2, _SHIFT, out=high1)
        np.bitwise_xor(x1, high1, out=x1)
        np.bitwise_xor(x3, high0, out=x3)
        np.bitwise_xor(x1, np.uint64(k0), out=x1)
        np.bitwise_xor(x3, np.uint64(k1), out=x3)
        np.bitwise_and(x0, _LOW, out=x0)
        np.bitwise_and(x2, _LOW, out=x2)
        x0, x1, x2, x3 = x1, x2, x3, x0
        k0, k1 = (k0 + _WEYL[0]) % WORD, (k1 + _WEYL[1]) % WORD
    for row, value in enumerate((x0, x1, x2, x3)):
        words[row] = value


def below(words: UInt64, bounds: Int64 | int) -> Int64:
    """Integers from 0 to `bounds` - 1 (bounds at most 2**31), one a word; the bias is below 2**-32 * bounds."""
    return ((words * np.asarray(bounds, dtype=np.uint64)) >> _SHIFT).astype(np.int64)


def threshold(share: float) -> int:
    """The word below which a share of all words lies."""
    return round(share * WORD)
