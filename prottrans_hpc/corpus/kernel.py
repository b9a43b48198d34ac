"""The hot loops of the corpus: in C when the extension was built, else in Python with identical results.

`parse_block` cleans the records of one block of text, `digest` and `count` describe them, `gather` copies many
sequences of a mapped shard through a table into a batch. What the residue table means stands in `alphabet`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from . import kernel_python

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]

PERSON = b"prottrans_hpc v1"
"""Personalisation of every BLAKE2b digest, so that no other use of the hash gives the same value."""
_SLACK = 64  # what the vector stores of the extension may write behind the last residue
_MAX_RECORDS = 1 << 16

_c: ModuleType | None
try:
    from . import _kernel as _c  # type: ignore[no-redef, attr-defined, unused-ignore]
except ImportError:
    _c = None


def implementation() -> str:
    """Which loops are in use: "C (avx512)", "C (portable)" or "Python"."""
    return "Python" if _c is None else f"C ({_c.path_in_use()})"


@dataclass(frozen=True)
class Parsed:
    """The records of one block. The arrays are views that the next block overwrites."""

    residues: U8
    """Cleaned residues of all records, end to end."""
    offsets: I64
    """[N + 1]: where each record starts in `residues`."""
    names: U8
    """First word of each header, end to end."""
    name_offsets: I64
    """[N + 1]."""
    starts: I64
    """[N]: where each record starts in the block."""
    invalid: I64
    """[N]: invalid bytes of each record, written as X; -1 for a header with a carriage return inside."""

    def __len__(self) -> int:
        return len(self.starts)


class BlockParser:
    """Parses blocks of FASTA, or of one sequence a line, into buffers that it owns and uses again."""

    def __init__(self, table: bytes, *, lines: bool) -> None:
        self.table = table
        self.lines = lines
        self.counted: I64 = np.zeros(256, np.int64)
        """How often each input byte was replaced, dropped or found invalid so far."""
        self._bytes = np.empty((2, 0), np.uint8)
        self._longs = np.empty((4, _MAX_RECORDS + 1), np.int64)

    def parse(self, block: memoryview) -> tuple[Parsed, int]:
        """The first records of `block`, which begins and ends with whole records, and the bytes that they took."""
        if _c is None:
            return kernel_python.parse_block(block, self.table, self.lines, self.counted, Parsed), len(block)
        if self._bytes.shape[1] < len(block) + _SLACK:
            self._bytes = np.empty((2, len(block) + len(block) // 8 + _SLACK), np.uint8)
        residues, names = self._bytes
        offsets, name_offsets, starts, invalid = self._longs
        starts, invalid = starts[:_MAX_RECORDS], invalid[:_MAX_RECORDS]
        num, used = _c.parse_block(block, self.table, self.lines, residues, offsets, names, name_offsets, starts, invalid, self.counted)
        parsed = Parsed(residues[: offsets[num]], offsets[: num + 1], names[: name_offsets[num]], name_offsets[: num + 1], starts[:num], invalid[:num])
        return parsed, used


def digest(data: U8, offsets: I64) -> npt.NDArray[np.uint64]:
    """BLAKE2b-128 of each data[offsets[i]:offsets[i + 1]], as [N, 2] little-endian words."""
    out = np.empty((len(offsets) - 1, 2), "<u8")
    if _c is not None:
        _c.digest(data, np.ascontiguousarray(offsets, np.int64), PERSON, out)
    else:
        kernel_python.digest(data, offsets, PERSON, out)
    return out


def count(data: U8) -> I64:
    """How often each of the 256 bytes occurs."""
    if _c is None:
        return np.bincount(data, minlength=256).astype(np.int64)
    counts = np.zeros(256, np.int64)
    _c.count(data, counts)
    return counts


def collect(data: U8, firsts: I64, lasts: I64, out: U8) -> None:
    """Copy the spans data[firsts[i]:lasts[i]] end to end into `out`. Raises ValueError when one lies outside, or `out` is too small."""
    (_c or kernel_python).collect(data, firsts, lasts, out)


def gather(residues: npt.NDArray[Any], starts: I64, lengths: I64, table: bytes, out: I64, out_starts: I64) -> None:
    """out[out_starts[i] + j] = table[residues[starts[i] + j]] for j < lengths[i]; releases the GIL.

    `residues` is uint8, contiguous, mapped or not; all other arrays are contiguous int64. Raises ValueError when a
    span lies outside its array.
    """
    for array in (starts, lengths, out, out_starts):
        if array.dtype != np.int64:
            raise ValueError(f"gather: arrays must be int64, one is {array.dtype}")
    (_c or kernel_python).gather(residues, starts, lengths, table, out, out_starts)
