"""Reading: one stretch of input becomes pieces, with the counts and digests that the rest of the work needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from . import kernel
from .alphabet import Rules
from .compression import Stream
from .fasta import BLOCK_BYTES, parse_stream
from .index import SPLITS
from .kernel import Parsed
from .pieces import ROW, Piece, PieceWriter, count_rows
from .screening import Screen
from .sources import Source
from .splitting import Holdout, assign
from .statistics import Tally

MIN_RANGE_BYTES = 1 << 20
_RANGES_PER_WORKER = 8
"""So many that workers end at about the same time, so few that each range is worth its start."""


@dataclass(frozen=True)
class ScanTask:
    """A stretch of one input file."""

    number: int
    """Of the task, in input order; numbers the pieces."""
    source: Source
    source_number: int
    start: int
    end: int | None
    """Bytes of the plain text; None: to the end."""
    parse: bool
    """False: only compute the SHA-256 of a file whose ranges are parsed by others."""
    folder: Path
    """Where pieces go."""
    rules: Rules
    holdout: Holdout
    dedup: bool
    names: bool

    @property
    def cost(self) -> int:
        """Bytes of the file to read."""
        return (self.source.num_bytes if self.end is None else self.end) - self.start

    @property
    def whole(self) -> bool:
        """Whether the task reads the file from end to end, and so learns its SHA-256."""
        return self.start == 0 and self.end is None


@dataclass(frozen=True)
class ScanResult:
    """What a task found."""

    pieces: list[Piece]
    tally: Tally
    sha256: str | None


def ranges(source: Source, num_workers: int, total_bytes: int) -> list[tuple[int, int | None, bool]]:
    """(start, end, parse) of the tasks for one file: a big plain one is shared out by byte range, and hashed as a task of its own."""
    size = max(MIN_RANGE_BYTES, total_bytes // (num_workers * _RANGES_PER_WORKER))
    if source.compression or num_workers == 1 or source.num_bytes <= size:
        return [(0, None, True)]
    starts = range(0, source.num_bytes, size)
    return [(0, None, False)] + [(start, start + size, True) for start in starts]


def scan(task: ScanTask) -> ScanResult:
    """Do a task. Raises DataError for what the rules do not allow, and for a file that changes meanwhile."""
    task.source.check_unchanged()
    with task.source.open(hashing=task.whole) as stream:
        result = _parse(task, stream) if task.parse else ScanResult([], Tally(), None)
        if task.whole:
            result = replace(result, sha256=_finish_hash(stream))
    task.source.check_unchanged()
    return result


def _finish_hash(stream: Stream) -> str:
    buffer = bytearray(BLOCK_BYTES)
    with memoryview(buffer) as view:
        while stream.read_into(view):
            pass
    return stream.sha256.hexdigest()


def _parse(task: ScanTask, stream: Stream) -> ScanResult:
    screen, tally = Screen(task.source, task.rules), Tally()
    writer = PieceWriter(task.folder, task=task.number, source=task.source_number, num_splits=len(SPLITS))
    for parsed, block in parse_stream(stream, task.source, screen.parser, start=task.start, end=task.end):
        left_out = [i for i, problem in screen.problems(parsed, block.data, block.offset) if problem.left_out]
        _take(task, parsed, np.array(left_out, np.int64), writer, tally)
    writer.finish()
    tally.counted += screen.parser.counted
    tally.problems.update(screen.num_problems)
    tally.problems["left_out"] += screen.num_left_out
    return ScanResult(writer.pieces, tally, None)


def _take(task: ScanTask, parsed: Parsed, left_out: npt.NDArray[np.int64], writer: PieceWriter, tally: Tally) -> None:
    """Hand a batch of parsed records to the writer, and count them."""
    digests = kernel.digest(parsed.residues, parsed.offsets) if task.dedup or task.holdout.needs_digests else None
    split, num_in_no_cluster = assign(task.holdout, digests, parsed.names, parsed.name_offsets)
    keys = {"sequence": digests} if task.dedup and digests is not None else {}
    if task.names:
        keys["name"] = kernel.digest(parsed.names, parsed.name_offsets)
    rows = np.empty(len(parsed), ROW)
    rows["start"], rows["length"] = parsed.offsets[:-1], np.diff(parsed.offsets)
    rows["name_start"], rows["name_length"] = (parsed.name_offsets[:-1], np.diff(parsed.name_offsets)) if task.names else (0, 0)
    rows["split"] = split
    tally.letters += kernel.count(parsed.residues)
    tally.problems["not_in_clusters"] += num_in_no_cluster
    if len(left_out):
        tally.letters -= count_rows(parsed.residues, rows[left_out])
        rows, keys = np.delete(rows, left_out), {kind: np.delete(digest, left_out, axis=0) for kind, digest in keys.items()}
    tally.add_lengths(rows["length"])
    writer.add(parsed.residues, parsed.names if task.names else parsed.names[:0], rows, keys)
