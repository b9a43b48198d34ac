"""The loops of the C extension in Python: the same bytes, for machines without a compiler.

A block is split at its headers, the bodies are joined with a separator, and one `bytes.translate` cleans them
all; NumPy then finds the separators. Bytes that need more than the table (replaced, dropped or invalid ones) are
rare, and only blocks that hold some pay for them.
"""

from __future__ import annotations

import hashlib
import re
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

_NAME = re.compile(rb"[ \t]*([^\x00-\x20]*)")
_SEPARATOR = b"\x00"
_INVALID = 0xA0  # both bits are set in the table's value of an invalid byte


def parse_block(block: memoryview, table: bytes, lines: bool, counted: npt.NDArray[np.int64], make: Any) -> Any:
    """All records of the block, as the dataclass `make`; adds to `counted`."""
    text = bytes(block)
    if not lines and text[:1] not in (b">", b""):
        raise ValueError("a block of FASTA must begin with '>'")
    dropped = bytes(b for b in range(256) if table[b] == 0)
    starts, names, bodies, bad = _lines(text, dropped) if lines else _fasta(text)
    name_offsets = _offsets(np.fromiter(map(len, names), np.int64, len(names)))
    residues, lengths, invalid = _clean(bodies, table, dropped, counted)
    invalid[bad] = -1
    all_names = np.frombuffer(b"".join(names), np.uint8)
    return make(residues, _offsets(lengths), all_names, name_offsets, starts, invalid)


def _offsets(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _fasta(text: bytes) -> tuple[npt.NDArray[np.int64], list[bytes], list[bytes], list[int]]:
    if not text:
        return np.empty(0, np.int64), [], [], []
    parts = text[1:].split(b"\n>")
    # Each record is '>', its part, and the newline before the next '>'.
    starts = _offsets(np.fromiter(map(len, parts), np.int64, len(parts)) + 2)[:-1]
    split = [part.partition(b"\n") for part in parts]
    bad = [i for i, (header, _, _) in enumerate(split) if b"\r" in header[:-1]] if b"\r" in text else []
    match = _NAME.match
    return starts, [match(header)[1] for header, _, _ in split], [body for _, _, body in split], bad  # type: ignore[index]


def _lines(text: bytes, dropped: bytes) -> tuple[npt.NDArray[np.int64], list[bytes], list[bytes], list[int]]:
    parts = text.split(b"\n")
    starts = _offsets(np.fromiter(map(len, parts), np.int64, len(parts)) + 1)[:-1]
    used = [i for i, part in enumerate(parts) if part.lstrip(dropped)]
    return starts[used], [b""] * len(used), [parts[i] for i in used], []


def _clean(bodies: list[bytes], table: bytes, dropped: bytes, counted: npt.NDArray[np.int64]) -> tuple[Any, Any, Any]:
    """Residues, lengths and invalid bytes of each body."""
    if not bodies:
        return np.empty(0, np.uint8), np.empty(0, np.int64), np.empty(0, np.int64)
    joined = _SEPARATOR.join(bodies)
    nul = joined.count(_SEPARATOR) - len(bodies) + 1
    if nul:
        # Another invalid byte stands in for NUL, which is the separator here.
        joined = _SEPARATOR.join(body.replace(_SEPARATOR, b"\x01") for body in bodies)
        counted[0] += nul
        counted[1] -= nul
    with_separator = b"\x00" + table[1:]
    cleaned = np.frombuffer(joined.translate(with_separator, dropped), np.uint8)
    if int(cleaned.max(initial=0)) < 0x80:
        borders = np.flatnonzero(cleaned == 0)
        return cleaned[cleaned != 0], _between(borders, len(cleaned)), np.zeros(len(bodies), np.int64)
    return _clean_marked(cleaned, joined, table, counted)


def _between(borders: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    return np.diff(borders, prepend=-1, append=size) - 1


def _clean_marked(cleaned: npt.NDArray[np.uint8], joined: bytes, table: bytes, counted: npt.NDArray[np.int64]) -> tuple[Any, Any, Any]:
    values = np.frombuffer(table, np.uint8)
    seen = np.bincount(np.frombuffer(joined, np.uint8), minlength=256)
    seen[0] = 0
    counted += np.where(values >= 0x80, seen, 0)
    borders = np.flatnonzero(cleaned == 0)
    invalid = np.bincount(np.searchsorted(borders, np.flatnonzero((cleaned & _INVALID) == _INVALID)), minlength=len(borders) + 1)
    gone = np.bincount(np.searchsorted(borders, np.flatnonzero(cleaned == 0x80)), minlength=len(borders) + 1)
    letters = np.where(cleaned >= 0x80, cleaned & 0x5F, cleaned)
    return letters[letters != 0], _between(borders, len(cleaned)) - gone, invalid.astype(np.int64)


def digest(data: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], person: bytes, out: npt.NDArray[np.uint64]) -> None:
    """BLAKE2b-128 of each record into `out`, [N, 2]."""
    view, borders, blake2b = data.data, offsets.tolist(), hashlib.blake2b
    digests = b"".join(blake2b(view[a:b], digest_size=16, person=person).digest() for a, b in pairwise(borders))
    out[:] = np.frombuffer(digests, "<u8").reshape(-1, 2)


def gather(residues: Any, starts: Any, lengths: Any, table: bytes, out: Any, out_starts: Any) -> None:
    """See kernel.gather."""
    fits = len(starts) == len(lengths) == len(out_starts) and len(table) == 256
    if fits and len(starts):
        inside = (lengths >= 0) & (starts >= 0) & (out_starts >= 0) & (lengths <= len(residues) - starts) & (lengths <= len(out) - out_starts)
        fits = bool(inside.all())
    if not fits:
        raise ValueError("gather: a span lies outside its array, or the arrays differ in length")
    values = np.frombuffer(table, np.uint8).astype(np.int64)
    flat = np.asarray(residues)
    for start, length, to in zip(starts.tolist(), lengths.tolist(), out_starts.tolist(), strict=True):
        # mode="clip" writes straight into `out`; indices are bytes, so nothing is ever clipped.
        np.take(values, flat[start : start + length], out=out[to : to + length], mode="clip")
