"""The loops of the C extension in Python: the same bytes, for machines without a compiler.

NumPy finds the borders of a block's records, the bodies are joined, and one `bytes.translate` cleans them all.
Bytes that need more than the table (replaced, dropped or invalid ones) are looked at one by one; they are rare.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]

_COUNTED = 0x80  # set in the table's value of a byte that is counted
_INVALID = 0xA0  # both bits are set in that of an invalid byte
_LETTER = 0x5F  # what is left of a counted value: its letter in upper case, or 0
_SPACE, _TAB, _NEWLINE, _RETURN, _GREATER = (ord(letter) for letter in " \t\n\r>")


def parse_block(block: memoryview, table: bytes, lines: bool, counted: I64, make: Any) -> Any:
    """All records of the block, as the dataclass `make`; adds to `counted`."""
    text = bytes(block)
    if not lines and text[:1] not in (b">", b""):
        raise ValueError("a block of FASTA must begin with '>'")
    return (_parse_lines if lines else _parse_fasta)(text, table, counted, make)


def _offsets(lengths: I64) -> I64:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _parse_fasta(text: bytes, table: bytes, counted: I64, make: Any) -> Any:
    raw = np.frombuffer(text, np.uint8)
    starts = np.flatnonzero(raw == _GREATER)
    starts = starts[(starts == 0) | (raw[starts - 1] == _NEWLINE)]
    ends = np.append(starts[1:], len(raw))[: len(starts)]
    blanks = np.flatnonzero(raw <= _SPACE)
    newlines = blanks[raw[blanks] == _NEWLINE]
    # Where the text ends within a header, the header ends there.
    header_ends = np.append(newlines, len(raw))[np.searchsorted(newlines, starts)]
    names, name_lengths = _names(raw, starts, header_ends, blanks)
    firsts = np.minimum(header_ends + 1, ends)
    bodies = [text[a:b] for a, b in zip(firsts.tolist(), ends.tolist(), strict=True)]
    body_offsets = _offsets(ends - firsts)
    residues, lengths, invalid, _ = _clean(b"".join(bodies), body_offsets, table, counted)
    invalid[_with_return_inside(raw, blanks, starts, header_ends)] = -1
    return make(residues, _offsets(lengths), names, _offsets(name_lengths), starts, invalid)


def _names(raw: U8, starts: I64, header_ends: I64, blanks: I64) -> tuple[U8, I64]:
    """First words of the headers end to end, and their lengths."""
    firsts = starts + 1
    while len(leading := _leading_blanks(raw, firsts, header_ends)):
        firsts[leading] += 1
    lasts = np.append(blanks, len(raw))[np.searchsorted(blanks, firsts)]
    lengths = np.minimum(lasts, header_ends) - np.minimum(firsts, header_ends)
    places = np.arange(lengths.sum()) + np.repeat(firsts - _offsets(lengths)[:-1], lengths)
    return raw[places], lengths


def _leading_blanks(raw: U8, firsts: I64, header_ends: I64) -> I64:
    """Which headers have a space or tab at `firsts`."""
    inside = np.flatnonzero(firsts < header_ends)
    values = raw[firsts[inside]]
    found: I64 = inside[(values == _SPACE) | (values == _TAB)]
    return found


def _with_return_inside(raw: U8, blanks: I64, starts: I64, header_ends: I64) -> I64:
    """Records whose header holds a carriage return that does not end it."""
    returns = blanks[raw[blanks] == _RETURN]
    if not len(returns):
        return np.empty(0, np.int64)
    which = np.searchsorted(starts, returns, "right") - 1
    found: I64 = which[returns < header_ends[which] - 1]
    return found


def _parse_lines(text: bytes, table: bytes, counted: I64, make: Any) -> Any:
    raw = np.frombuffer(text, np.uint8)
    starts = np.append(0, np.flatnonzero(raw == _NEWLINE) + 1)
    residues, lengths, invalid, used = _clean(text, np.append(starts, len(raw)), table, counted)
    lines = np.flatnonzero(used)
    return make(residues, _offsets(lengths[lines]), raw[:0], np.zeros(len(lines) + 1, np.int64), starts[lines], invalid[lines])


def _clean(joined: bytes, offsets: I64, table: bytes, counted: I64) -> tuple[U8, I64, I64, I64]:
    """Residues end to end; of each body its length, its invalid bytes, and its bytes that are not simply dropped."""
    cleaned = joined.translate(table)
    values = np.frombuffer(cleaned, np.uint8)
    num = len(offsets) - 1
    used = np.diff(offsets) - _per_body(np.flatnonzero(values == 0), offsets)
    if int(values.max(initial=0)) < _COUNTED:
        return np.frombuffer(cleaned.replace(b"\x00", b""), np.uint8), used, np.zeros(num, np.int64), used
    marked = np.flatnonzero(values >= _COUNTED)
    counted += np.bincount(np.frombuffer(joined, np.uint8)[marked], minlength=256)
    kinds = values[marked]
    invalid = _per_body(marked[(kinds & _INVALID) == _INVALID], offsets)
    dropped = _per_body(marked[kinds == _COUNTED], offsets)
    letters = values.copy()
    letters[marked] = kinds & _LETTER
    return np.frombuffer(letters.tobytes().replace(b"\x00", b""), np.uint8), used - dropped, invalid, used


def _per_body(places: I64, offsets: I64) -> I64:
    """How many of the ascending places lie in each body."""
    return np.diff(np.searchsorted(places, offsets))


def digest(data: U8, offsets: I64, person: bytes, out: npt.NDArray[np.uint64]) -> None:
    """BLAKE2b-128 of each record into `out`, [N, 2]."""
    view, borders, blake2b = data.data, offsets.tolist(), hashlib.blake2b
    digests = b"".join(blake2b(view[a:b], digest_size=16, person=person).digest() for a, b in pairwise(borders))
    out[:] = np.frombuffer(digests, "<u8").reshape(-1, 2)


def collect(data: U8, firsts: I64, lasts: I64, out: U8) -> None:
    """See kernel.collect."""
    view = data.data
    if len(firsts) != len(lasts) or ((firsts < 0) | (lasts < firsts) | (lasts > len(data))).any() or (lasts - firsts).sum() > len(out):
        raise ValueError("collect: a span lies outside the data, or the spans do not fit into out")
    joined = b"".join([view[first:last] for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)])
    out[: len(joined)] = np.frombuffer(joined, np.uint8)


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
