"""Pieces: the cleaned records of a stretch of input, between reading and writing shards.

A piece is two flat files, residues and names, and a table with a row a record; sorted digests stand beside it
when duplicates are looked for. Pieces live in the corpus' working folder during one run and are never trusted by
a later one, so they need no fsync and no checksum.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import kernel

PIECE_BYTES = 1 << 26
"""A piece is closed when it holds this much: what a worker keeps in memory stays bounded."""
PIECE_RECORDS = 1 << 20
ROW = np.dtype([("start", "<u4"), ("length", "<u4"), ("name_start", "<u4"), ("name_length", "<u4"), ("split", "u1")])

Rows = npt.NDArray[np.void]
Digests = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Totals:
    """Sums over records."""

    sequences: int = 0
    residues: int = 0
    name_bytes: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(self.sequences + other.sequences, self.residues + other.residues, self.name_bytes + other.name_bytes)

    def __sub__(self, other: Totals) -> Totals:
        return Totals(self.sequences - other.sequences, self.residues - other.residues, self.name_bytes - other.name_bytes)


@dataclass(frozen=True)
class Piece:
    """Where a piece lies and what it holds."""

    stem: str
    """Path without suffix."""
    source: int
    """Number of the input file."""
    totals: tuple[Totals, ...]
    """Of each split, in the order of index.SPLITS."""

    def rows(self) -> Rows:
        """The table."""
        return np.fromfile(self.stem + ".table", ROW)

    def residues(self) -> npt.NDArray[np.uint8]:
        """Mapped."""
        return _mapped(self.stem + ".residues")

    def names(self) -> npt.NDArray[np.uint8]:
        """Mapped."""
        return _mapped(self.stem + ".names")

    def keys(self, kind: str, first: int, last: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], npt.NDArray[np.uint32]]:
        """First and second digest word and row of the keys whose first word lies in [first, last], ascending."""
        path = f"{self.stem}.{kind}"
        num = os.path.getsize(path) // 20
        if num == 0:
            return np.empty(0, "<u8"), np.empty(0, "<u8"), np.empty(0, "<u4")
        high: Any = np.memmap(path, "<u8", "r", 0, (num,))
        a = int(np.searchsorted(high, np.uint64(first), "left"))
        b = int(np.searchsorted(high, np.uint64(last), "right"))
        low: Any = np.memmap(path, "<u8", "r", 8 * num, (num,))
        row: Any = np.memmap(path, "<u4", "r", 16 * num, (num,))
        return np.array(high[a:b]), np.array(low[a:b]), np.array(row[a:b])


def _mapped(path: str) -> npt.NDArray[np.uint8]:
    return np.asarray(np.memmap(path, np.uint8, "r")) if os.path.getsize(path) else np.empty(0, np.uint8)


def totals_of(rows: Rows, num_splits: int) -> tuple[Totals, ...]:
    """Totals of each split."""
    parts = [rows[rows["split"] == split] for split in range(num_splits)]
    return tuple(Totals(len(part), *(int(part[column].sum(dtype=np.int64)) for column in ("length", "name_length"))) for part in parts)


def runs(starts: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Begin and end of the spans [start, start + length), joined where one begins at the end of the one before."""
    starts, ends = starts.astype(np.int64), starts.astype(np.int64) + lengths
    breaks = np.flatnonzero(starts[1:] != ends[:-1]) + 1
    firsts, lasts = np.concatenate(([0], breaks)), np.concatenate((breaks, [len(starts)])) - 1
    return starts[firsts[: len(starts)]], ends[lasts[: len(starts)]]


def count_rows(residues: npt.NDArray[np.uint8], rows: Rows) -> npt.NDArray[np.int64]:
    """How often each byte occurs in the residues of some rows."""
    counts = np.zeros(256, np.int64)
    for start, end in zip(*runs(rows["start"], rows["length"]), strict=True):
        counts += kernel.count(residues[start:end])
    return counts


class PieceWriter:
    """Writes the records of one task into as many pieces as they fill."""

    def __init__(self, folder: Path, *, task: int, source: int, num_splits: int) -> None:
        self._stem = f"{folder}/{task:06d}-"
        self._source = source
        self._num_splits = num_splits
        self._files: list[Any] = []
        self._rows: list[Rows] = []
        self._keys: dict[str, list[Digests]] = {}
        self._num_rows = self._num_residues = self._num_name_bytes = 0
        self.pieces: list[Piece] = []

    def add(self, residues: npt.NDArray[np.uint8], names: npt.NDArray[np.uint8], rows: Rows, keys: dict[str, Digests]) -> None:
        """Append records: `rows` point into `residues` and `names`, `keys` hold a digest a row."""
        if not self._files:
            stem = f"{self._stem}{len(self.pieces):06d}"
            self._files = [open(f"{stem}.{kind}", "wb", buffering=0) for kind in ("residues", "names")]  # noqa: SIM115 - closed by finish
        rows["start"] += self._num_residues
        rows["name_start"] += self._num_name_bytes
        write_all(self._files[0].fileno(), residues.data)
        write_all(self._files[1].fileno(), names.data)
        self._rows.append(rows)
        for kind, digests in keys.items():
            self._keys.setdefault(kind, []).append(digests)
        self._num_rows += len(rows)
        self._num_residues += len(residues)
        self._num_name_bytes += len(names)
        if self._num_residues + self._num_name_bytes >= PIECE_BYTES or self._num_rows >= PIECE_RECORDS:
            self.finish()

    def finish(self) -> None:
        """Close the piece in work, if there is one."""
        if not self._files:
            return
        stem = f"{self._stem}{len(self.pieces):06d}"
        for file in self._files:
            file.close()
        rows = np.concatenate(self._rows)
        write_array(f"{stem}.table", rows)
        for kind, digests in self._keys.items():
            _write_keys(f"{stem}.{kind}", np.concatenate(digests), rows, kind)
        self.pieces.append(Piece(stem, self._source, totals_of(rows, self._num_splits)))
        self._files, self._rows, self._keys = [], [], {}
        self._num_rows = self._num_residues = self._num_name_bytes = 0


def _write_keys(path: str, digests: Digests, rows: Rows, kind: str) -> None:
    # Records without a name (text, or kept in spite of it) are not duplicates of each other.
    numbers = np.flatnonzero(rows["name_length"]) if kind == "name" else np.arange(len(rows))
    order = numbers[np.argsort(digests[numbers, 0])]
    write_array(path, digests[order, 0], digests[order, 1], order.astype("<u4"))


def write_array(path: str, *arrays: npt.NDArray[Any]) -> None:
    """Replace a working file by arrays, one behind the other."""
    with open(path, "wb", buffering=0) as file:
        for array in arrays:
            write_all(file.fileno(), np.ascontiguousarray(array).data)


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all of `data`: the kernel takes at most 2 GiB a call, and less on some file systems."""
    data = data.cast("B") if data.nbytes else memoryview(b"")
    while data:
        data = data[os.write(descriptor, data) :]
