"""A keyed permutation of 0 .. size - 1 that is evaluated at single points: nothing is stored, any place can be sought.

A balanced Feistel network over the next even number of bits, walked along its cycles until it lands inside
(Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). It shuffles well; it is no cipher.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from .counter_rng import Purpose, draw

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

_ROUNDS = 8
_MIN_HALF_BITS = 3
"""A smaller domain has too few round functions to mix well."""


def round_keys(seed: int, epoch: int, purpose: Purpose = Purpose.BLOCK_ORDER) -> UInt64:
    """The keys of one permutation, uint64 [8]."""
    words = draw(seed, purpose, epochs=epoch, sample_ids=np.arange(_ROUNDS), counters=0)
    keys: UInt64 = words[0] << np.uint64(32) | words[1]
    return keys


def permute(points: Int64, size: int, keys: UInt64) -> Int64:
    """Where each of `points` (int64 [n], all below `size`) goes."""
    return _walk(points, size, keys)


def invert(points: Int64, size: int, keys: UInt64) -> Int64:
    """The points that `permute` takes to `points`."""
    return _walk(points, size, keys, inverse=True)


def _walk(points: Int64, size: int, keys: UInt64, *, inverse: bool = False) -> Int64:
    half_bits = max(_MIN_HALF_BITS, -(-max(size - 1, 1).bit_length() // 2))
    feistel = _backward if inverse else _forward
    result = feistel(points.astype(np.uint64), half_bits, keys)
    while True:
        outside = np.flatnonzero(result >= size)
        if not len(outside):
            return result.astype(np.int64)
        result[outside] = feistel(result[outside], half_bits, keys)


def _forward(points: UInt64, half_bits: int, keys: UInt64) -> UInt64:
    left, right = _halves(points, half_bits)
    for key in keys:
        left, right = right, left ^ _mix(right, key, half_bits)
    return left << np.uint64(half_bits) | right


def _backward(points: UInt64, half_bits: int, keys: UInt64) -> UInt64:
    left, right = _halves(points, half_bits)
    reverse: Iterable[np.uint64] = keys[::-1]
    for key in reverse:
        left, right = right ^ _mix(left, key, half_bits), left
    return left << np.uint64(half_bits) | right


def _halves(points: UInt64, half_bits: int) -> tuple[UInt64, UInt64]:
    return points >> np.uint64(half_bits), points & np.uint64((1 << half_bits) - 1)


def _mix(half: UInt64, key: np.uint64, half_bits: int) -> UInt64:
    # The finaliser of splitmix64 (Steele et al. 2014), of which the upper bits are the best.
    x = half + key
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x >> np.uint64(64 - half_bits)
