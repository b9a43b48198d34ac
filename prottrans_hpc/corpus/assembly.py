"""Writing: which records go into which shard, and the shards themselves.

Shards are balanced by residues: their borders are the record borders nearest to equal shares of a split. A shard is
hashed while it is written, and appears under its name only when every byte is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import durable
from ..errors import ConfigError, DataError
from . import kernel
from .index import ShardEntry, shard_name
from .pieces import Piece, Rows, Totals, runs, write_all
from .shard import ShardSizes, create_shard

TARGET_RESIDUES = 1 << 27
"""Of a shard, unless the user gives the number of shards: 128 MiB, large enough for streaming, small enough to deal out."""
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Stretch:
    """Records of one split in one piece."""

    piece: Piece
    first: int
    last: int
    """Numbers within the split's rows of the piece; `last` is not included."""


@dataclass(frozen=True)
class ShardPlan:
    """One shard to write."""

    path: Path
    split: int
    stretches: tuple[Stretch, ...]
    totals: Totals
    names: bool
    record: Path
    """Where its entry is kept once it is complete, for a rerun."""
    identity: str
    """SHA-256 of everything that decides what the corpus holds."""


@dataclass(frozen=True)
class _Border:
    """A place between two records of a split."""

    piece: int
    row: int
    before: Totals
    """What lies before it in the split."""


def num_shards(residues: int, wanted: int | None) -> int:
    """Shards for a split."""
    return wanted or max(1, round(residues / TARGET_RESIDUES))


def plan_borders(pieces: Sequence[Piece], split: int, num: int) -> list[_Border]:
    """num + 1 borders, every shard between them with at least one record. Raises ConfigError for fewer records than shards."""
    starts = list(accumulate((piece.totals[split] for piece in pieces), initial=Totals()))
    total = starts[-1]
    if total.sequences < num:
        raise ConfigError(f"{num} shards were asked for, but there are only {total.sequences} sequences for them")
    borders = [_Border(0, 0, Totals())]
    for k in range(1, num):
        nearest = _nearest(pieces, split, starts, total.residues * k / num)
        low, high = borders[-1].before.sequences + 1, total.sequences - (num - k)
        ordinal = min(max(nearest.before.sequences, low), high)
        borders.append(nearest if ordinal == nearest.before.sequences else _at(pieces, split, starts, ordinal))
    return [*borders, _Border(len(pieces), 0, total)]


def _nearest(pieces: Sequence[Piece], split: int, starts: list[Totals], residues: float) -> _Border:
    """The border whose residues before it are closest."""
    k = int(np.searchsorted([start.residues for start in starts], residues, "right")) - 1
    if k >= len(pieces):
        return _Border(len(pieces), 0, starts[-1])
    ends = np.cumsum(_split_rows(pieces[k], split)["length"], dtype=np.int64)
    wanted = residues - starts[k].residues
    row = int(np.searchsorted(ends, wanted))
    before, after = (int(ends[row - 1]) if row else 0), int(ends[row])
    return _border(pieces, split, starts, k, row + (after - wanted < wanted - before))


def _at(pieces: Sequence[Piece], split: int, starts: list[Totals], ordinal: int) -> _Border:
    """The border behind so many sequences."""
    k = int(np.searchsorted([start.sequences for start in starts], ordinal, "right")) - 1
    return _border(pieces, split, starts, k, ordinal - starts[k].sequences)


def _border(pieces: Sequence[Piece], split: int, starts: list[Totals], k: int, row: int) -> _Border:
    rows = _split_rows(pieces[k], split)[:row]
    inside = Totals(row, int(rows["length"].sum(dtype=np.int64)), int(rows["name_length"].sum(dtype=np.int64)))
    return _Border(k, row, starts[k] + inside)


def _split_rows(piece: Piece, split: int) -> Rows:
    rows = piece.rows()
    selected: Rows = rows[rows["split"] == split]
    return selected


def plan_shards(pieces: Sequence[Piece], split: int, name: str, num: int, *, out: Path, work: Path, names: bool, identity: str) -> list[ShardPlan]:
    """All shards of one split."""
    plans = []
    for k, (begin, end) in enumerate(pairwise(plan_borders(pieces, split, num))):
        stretches = tuple(_stretches(pieces, split, begin, end))
        file = shard_name(name, k)
        plans.append(ShardPlan(out / file, split, stretches, end.before - begin.before, names, work / f"{file}.json", identity))
    return plans


def _stretches(pieces: Sequence[Piece], split: int, begin: _Border, end: _Border) -> Iterator[Stretch]:
    for k in range(begin.piece, min(end.piece + 1, len(pieces))):
        first = begin.row if k == begin.piece else 0
        last = end.row if k == end.piece else pieces[k].totals[split].sequences
        if first < last:
            yield Stretch(pieces[k], first, last)


def write_shard(plan: ShardPlan) -> ShardEntry:
    """Write a shard durably, or verify the one that an earlier run of the same plan completed."""
    if (entry := _complete(plan)) is not None:
        return entry
    with durable.new_file(plan.path) as temporary:
        sizes = ShardSizes(plan.totals.sequences, plan.totals.residues, plan.totals.name_bytes if plan.names else None)
        places = create_shard(temporary, sizes)
        with temporary.open("r+b", buffering=0) as file:
            sha256 = _fill(file, plan, places)
            num_bytes = os.fstat(file.fileno()).st_size
    entry = ShardEntry(plan.path.name, sizes.num_sequences, sizes.num_residues, num_bytes, sha256)
    # Not forced to the disk: a rerun trusts a record only after hashing the shard, and does without a lost one.
    plan.record.write_text(json.dumps({"identity": plan.identity, "entry": asdict(entry)}), encoding="utf-8")
    return entry


def _complete(plan: ShardPlan) -> ShardEntry | None:
    try:
        record = durable.read_json(plan.record)
        entry = ShardEntry(**record["entry"])
        same = record["identity"] == plan.identity and plan.path.stat().st_size == entry.num_bytes
    except (FileNotFoundError, DataError, KeyError, TypeError):
        return None
    return entry if same and durable.sha256_of(plan.path) == entry.sha256 else None


def _fill(file: Any, plan: ShardPlan, places: dict[str, int]) -> str:
    """Write residues in a stream that is hashed on the way, the small datasets beside it; then hash those too."""
    sha256 = hashlib.sha256(os.pread(file.fileno(), places["residues"], 0))
    file.seek(places["residues"])
    offsets = _Offsets(file, places["offsets"])
    name_offsets = _Offsets(file, places["name_offsets"]) if plan.names else None
    name_place = places.get("names", 0)
    for stretch in plan.stretches:
        rows = _split_rows(stretch.piece, plan.split)[stretch.first : stretch.last]
        for block in _joined(stretch.piece.residues(), rows["start"], rows["length"]):
            sha256.update(block)
            write_all(file.fileno(), block)
        offsets.add(rows["length"])
        if name_offsets is not None:
            for block in _joined(stretch.piece.names(), rows["name_start"], rows["name_length"]):
                name_place = _write_at(file, block, name_place)
            name_offsets.add(rows["name_length"])
    _hash_rest(file, sha256, places["residues"] + plan.totals.residues)
    return sha256.hexdigest()


class _Offsets:
    """Writes running sums, from 0, to their place in the file."""

    def __init__(self, file: Any, place: int) -> None:
        self._file = file
        self._sum = 0
        self._place = _write_at(file, memoryview(bytes(8)), place)

    def add(self, lengths: npt.NDArray[Any]) -> None:
        """Append a border for each length."""
        sums = np.cumsum(lengths, dtype="<u8") + np.uint64(self._sum)
        self._place = _write_at(self._file, sums.data.cast("B"), self._place)
        self._sum = int(sums[-1])


def _write_at(file: Any, data: memoryview, place: int) -> int:
    while data:
        done = os.pwrite(file.fileno(), data, place)
        data, place = data[done:], place + done
    return place


def _joined(data: npt.NDArray[np.uint8], starts: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> Iterator[memoryview]:
    """The bytes of some spans end to end, in blocks that the next one overwrites."""
    firsts, lasts = runs(starts, lengths)
    sums = np.cumsum(lasts - firsts)
    buffer = np.empty(0, np.uint8)
    done = 0
    while done < len(firsts):
        before = int(sums[done - 1]) if done else 0
        # As many spans as fit into a block, and at least one.
        stop = max(done + 1, int(np.searchsorted(sums, before + _BLOCK, "right")))
        size = int(sums[stop - 1]) - before
        if stop == done + 1:
            yield from (data.data[a : min(a + _BLOCK, int(lasts[done]))] for a in range(int(firsts[done]), int(lasts[done]), _BLOCK))
        else:
            buffer = buffer if len(buffer) >= size else np.empty(_BLOCK, np.uint8)
            kernel.collect(data, firsts[done:stop], lasts[done:stop], buffer)
            yield buffer.data[:size]
        done = stop


def _hash_rest(file: Any, sha256: Any, place: int) -> None:
    while data := os.pread(file.fileno(), _BLOCK, place):
        sha256.update(data)
        place += len(data)
