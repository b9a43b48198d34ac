"""Records that occur more than once, over all input: the same sequence, or the same name.

Digests of 128 bits lie sorted beside each piece. A task takes one range of the digests' first word from every
piece, so that memory is bounded by the number of ranges, not by the corpus, and tasks need nothing of each other.
Of several equal records the first in the order of the input is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import terminal
from .index import SPLITS
from .pieces import Piece, count_rows, totals_of, write_array
from .pool import Pool
from .statistics import Tally, summed

KEYS_PER_RANGE = 1 << 22
"""About 200 MiB of work space a task."""
_ROW_BITS = 32

Numbers = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class DuplicatesTask:
    """One range of digests of one kind."""

    kind: str
    """ "sequence" or "name"."""
    number: int
    num_ranges: int
    pieces: Sequence[Piece]
    dropped: tuple[str, ...]
    """Files of record numbers that are gone already, and so are nobody's duplicates."""
    out: Path


@dataclass(frozen=True)
class Duplicates:
    """What a task found."""

    num: int
    first: tuple[int, int] | None
    """Record number of the earliest duplicate, and of the record that it repeats."""


def number_of(piece: int, row: int) -> int:
    """A record's number: grows in the order of the input."""
    return piece << _ROW_BITS | row


def place_of(number: int) -> tuple[int, int]:
    """Piece and row of a record number."""
    return number >> _ROW_BITS, number & ((1 << _ROW_BITS) - 1)


def num_ranges(num_records: int) -> int:
    """Ranges of digests to work in."""
    return max(1, -(-num_records // KEYS_PER_RANGE))


def find_duplicates(task: DuplicatesTask) -> Duplicates:
    """Write the numbers of the records to drop, ascending."""
    width = 2**64 // task.num_ranges
    first = task.number * width
    last = 2**64 - 1 if task.number + 1 == task.num_ranges else first + width - 1
    parts = [(piece.keys(task.kind, first, last), k) for k, piece in enumerate(task.pieces)]
    high = np.concatenate([keys[0] for keys, _ in parts])
    low = np.concatenate([keys[1] for keys, _ in parts])
    numbers = np.concatenate([keys[2].astype("<u8") | np.uint64(number_of(k, 0)) for keys, k in parts])
    high, low, numbers = _candidates(high, low, numbers)
    alive = ~_is_in(numbers, task.dropped)
    high, low, numbers = high[alive], low[alive], numbers[alive]
    order = np.lexsort((numbers, low, high))
    high, low, numbers = high[order], low[order], numbers[order]
    repeats = np.concatenate(([False], (high[1:] == high[:-1]) & (low[1:] == low[:-1]))) if len(high) else np.zeros(0, bool)
    dropped = np.sort(numbers[repeats])
    write_array(str(task.out), dropped)
    return Duplicates(len(dropped), _first_pair(numbers, repeats))


def _candidates(high: Numbers, low: Numbers, numbers: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Only records that share their first word with another: few, so that the rest of the work is cheap."""
    order = np.argsort(high)
    same = high[order[1:]] == high[order[:-1]]
    shared = np.zeros(len(high), bool)
    shared[order[1:]] |= same
    shared[order[:-1]] |= same
    return high[shared], low[shared], numbers[shared]


def _first_pair(numbers: Numbers, repeats: npt.NDArray[np.bool_]) -> tuple[int, int] | None:
    if not repeats.any():
        return None
    where = np.flatnonzero(repeats)
    at = int(where[np.argmin(numbers[where])])
    # The earliest duplicate directly follows the record that it repeats, because a group is in order.
    return int(numbers[at]), int(numbers[at - 1])


def _is_in(numbers: Numbers, files: Sequence[str]) -> npt.NDArray[np.bool_]:
    found = np.zeros(len(numbers), bool)
    for file in files:
        dropped = read_numbers(file)
        if len(dropped):
            at = np.minimum(np.searchsorted(dropped, numbers), len(dropped) - 1)
            found |= dropped[at] == numbers
    return found


def read_numbers(path: str) -> Any:
    """Mapped record numbers."""
    return np.memmap(path, "<u8", "r") if Path(path).stat().st_size else np.empty(0, "<u8")


@dataclass(frozen=True)
class DropTask:
    """Take the duplicates out of one piece."""

    number: int
    piece: Piece
    dropped: tuple[str, ...]
    """Files of record numbers."""


def drop(task: DropTask) -> tuple[Piece, Tally]:
    """Rewrite the table of the piece without the dropped rows; the tally is what to subtract."""
    first, last = np.uint64(number_of(task.number, 0)), np.uint64(number_of(task.number + 1, 0))
    gone: list[npt.NDArray[np.int64]] = []
    for file in task.dropped:
        numbers = read_numbers(file)
        a, b = np.searchsorted(numbers, [first, last])
        gone.append((np.asarray(numbers[a:b]) - first).astype(np.int64))
    where = np.concatenate(gone) if gone else np.empty(0, np.int64)
    tally = Tally()
    if not len(where):
        return task.piece, tally
    rows = task.piece.rows()
    lost = rows[np.sort(where)]
    tally.letters -= count_rows(task.piece.residues(), lost)
    tally.add_lengths(lost["length"], -1)
    rows = np.delete(rows, where)
    write_array(task.piece.stem + ".table", rows)
    return replace(task.piece, totals=totals_of(rows, len(SPLITS))), tally


def find_all(kind: str, pieces: Sequence[Piece], pool: Pool, folder: Path, *, dropped: Sequence[str] = ()) -> tuple[list[str], Duplicates]:
    """Files with the record numbers of all duplicates of a kind, and what was found."""
    num_records = sum(totals.sequences for piece in pieces for totals in piece.totals)
    num = num_ranges(num_records)
    tasks = [DuplicatesTask(kind, k, num, tuple(pieces), tuple(dropped), folder / f"dropped-{kind}-{k:05d}") for k in range(num)]
    with terminal.progress(f"looking for equal {kind}s", total=num_records, unit="records") as advance:
        found = pool.run(find_duplicates, tasks, costs=[num_records / num] * num, advance=advance)
    pairs = sorted(duplicates.first for duplicates in found if duplicates.first is not None)
    return [str(task.out) for task in tasks], Duplicates(sum(duplicates.num for duplicates in found), pairs[0] if pairs else None)


def drop_all(pieces: Sequence[Piece], pool: Pool, dropped: Sequence[str]) -> tuple[list[Piece], Tally]:
    """The pieces without the records of some files, and the tally to add (its counts are negative)."""
    tasks = [DropTask(k, piece, tuple(dropped)) for k, piece in enumerate(pieces)]
    results = pool.run(drop, tasks, costs=[1.0] * len(tasks), advance=lambda amount: None)
    return [piece for piece, _ in results], summed(tally for _, tally in results)
