"""Rows with a key, more of them than memory holds: put aside on disk in runs, given back in ranges of the key.

A run is sorted when it is written, and its borders between equal parts of the key's range are kept; so a range is one
short read from each run. The keys are hashes, hence spread evenly: memory is bounded by the size of a run.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from .pieces import write_all

ROWS_PER_RUN = 1 << 22
"""About 300 MiB of work space for rows of 17 bytes."""
_NUM_PARTS = 1 << 12
_STARTS = np.arange(_NUM_PARTS, dtype=np.uint64) * np.uint64(2**64 // _NUM_PARTS)

Rows = npt.NDArray[Any]


class SortedRuns:
    """Owns a file without a name in `folder`, made when the first run is full. Rows are of the structured `dtype`, with a field `key`, uint64."""

    def __init__(self, folder: Path, dtype: npt.DTypeLike) -> None:
        self._folder, self._dtype = folder, np.dtype(dtype)
        self._file: IO[bytes] | None = None
        self._waiting: list[Rows] = []
        self._borders: list[npt.NDArray[np.int64]] = []
        """Where the parts of each run begin and end, in rows of the file."""

    def add(self, rows: Rows) -> None:
        """Take rows over. An OSError names the folder, where the disk may be full."""
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= ROWS_PER_RUN:
            self._put_aside()

    def ranges(self) -> Iterator[Rows]:
        """All rows, a range of the key after the other; rows of equal key are in the order in which they came."""
        if self._file is None:
            yield self._take()
            return
        self._put_aside()
        ends = np.cumsum(np.sum([np.diff(borders) for borders in self._borders], axis=0))
        first = 0
        while first < _NUM_PARTS:
            before = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(ends, before + ROWS_PER_RUN, "right")))
            yield np.concatenate([self._read(int(borders[first]), int(borders[last])) for borders in self._borders])
            first = last

    def _take(self) -> Rows:
        rows = np.concatenate([np.empty(0, self._dtype), *self._waiting])
        self._waiting = []
        return rows

    def _put_aside(self) -> None:
        rows = self._take()
        rows = rows[np.argsort(rows["key"], kind="stable")]
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 - it lives as long as this
            write_all(self._file.fileno(), rows.view(np.uint8).data)
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self._folder)) from error
        begin = int(self._borders[-1][-1]) if self._borders else 0
        self._borders.append(begin + np.append(np.searchsorted(rows["key"], _STARTS), len(rows)))

    def _read(self, begin: int, end: int) -> Rows:
        assert self._file is not None, "only what was put aside is read"
        self._file.seek(begin * self._dtype.itemsize)
        return np.fromfile(self._file, self._dtype, end - begin)
