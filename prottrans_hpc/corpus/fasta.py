"""Sequence files as blocks of whole records, and as single records.

A file is read through one buffer; what is left of it behind the last whole record moves to the front for the next
block. A byte range owns the records that begin in it, so that ranges of one big file can be read by several
workers: together they see every record exactly once, whatever the ranges are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..errors import DataError
from .alphabet import WHITESPACE, Rules
from .compression import Stream
from .kernel import BlockParser, Parsed
from .screening import Problem, Screen, line_at, refuse_start
from .sources import Source, find_sources

BLOCK_BYTES = 1 << 19
"""Read and parsed at once: input and output stay in the second-level cache."""
MAX_RECORD_BYTES = 1 << 28
"""The longest protein known has 46 thousand residues; a longer record than this is no protein, and would not fit the memory."""


@dataclass(frozen=True)
class Block:
    """Whole records of a file. The memory is used again for the next block."""

    data: memoryview
    offset: int
    """Of `data` in the plain text."""


@dataclass(frozen=True)
class Record:
    """One sequence of an input file."""

    name: bytes
    """First word of the header; "FILE:LINE" in text with one sequence a line."""
    residues: bytes
    """Cleaned, upper-case ASCII."""
    source: str
    """The file."""
    line: int
    """Where its record begins, from 1."""


def read_records(paths: Sequence[str | Path], *, rules: Rules, on_skip: Callable[[Record, str], None] | None = None) -> Iterator[Record]:
    """The records of files and folders in order, cleaned by the same rules, with the same errors, as a corpus.

    `on_skip(record, reason)` is told of every record that the rules leave out; its residues are as far as they were
    cleaned. Raises DataError, or CheckpointError when a path does not exist.
    """
    for source in find_sources(paths):
        screen = Screen(source, rules)
        line = 0
        for parsed, block in parse_source(source, screen.parser):
            line = line or line_at(source, block.offset)
            newlines = np.flatnonzero(np.frombuffer(block.data, np.uint8) == 10)
            lines = line + np.searchsorted(newlines, parsed.starts)
            problems = dict(screen.problems(parsed, block.data, block.offset))
            yield from _kept(parsed, lines.tolist(), source, problems, on_skip)
            line += len(newlines)
        source.check_unchanged()


def _kept(parsed: Parsed, lines: list[int], source: Source, problems: dict[int, Problem], on_skip: Callable[[Record, str], None] | None) -> Iterator[Record]:
    residues, names = parsed.residues.tobytes(), parsed.names.tobytes()
    spans = zip(pairwise(parsed.offsets.tolist()), pairwise(parsed.name_offsets.tolist()), lines, strict=True)
    for i, ((start, end), (name_start, name_end), line) in enumerate(spans):
        name = names[name_start:name_end] or f"{source.path.name}:{line}".encode()
        record = Record(name, residues[start:end], str(source.path), line)
        problem = problems.get(i)
        if problem is None or not problem.left_out:
            yield record
        elif on_skip is not None:
            on_skip(record, problem.reason)


def parse_source(source: Source, parser: BlockParser, *, start: int = 0, end: int | None = None) -> Iterator[tuple[Parsed, Block]]:
    """The parsed records that begin in [start, end) of the plain text, and the raw block that each batch came from."""
    with source.open() as stream:
        yield from parse_stream(stream, source, parser, start=start, end=end)


def parse_stream(stream: Stream, source: Source, parser: BlockParser, *, start: int = 0, end: int | None = None) -> Iterator[tuple[Parsed, Block]]:
    """As `parse_source`, from a stream at its first byte; a range needs a plain file."""
    for block in read_blocks(stream, source, start=start, end=end):
        position = 0
        while position < len(block.data):
            parsed, used = parser.parse(block.data[position:])
            yield parsed, Block(block.data[position : position + used], block.offset + position)
            position += used


def lines_of_name(source: Source, name: bytes) -> list[int]:
    """The lines on which records of this name begin; reads the whole file, so for messages only."""
    lines, line = [], 0
    for parsed, block in parse_source(source, BlockParser(Rules().table(), lines=source.lines)):
        line = line or line_at(source, block.offset)
        names, borders = parsed.names.tobytes(), parsed.name_offsets.tolist()
        newlines = np.flatnonzero(np.frombuffer(block.data, np.uint8) == 10)
        hits = [i for i, (start, end) in enumerate(pairwise(borders)) if end - start == len(name) and names[start:end] == name]
        lines += [line + int(np.searchsorted(newlines, parsed.starts[i])) for i in hits]
        line += len(newlines)
    return lines


def read_blocks(stream: Stream, source: Source, *, start: int, end: int | None, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Blocks of whole records. Raises DataError for text before the first header and for a record of absurd length."""
    # One byte before the range shows whether a line begins at its start.
    window = _Window(stream, source, offset=max(start - 1, 0), block_bytes=block_bytes)
    if start > 0:
        stream.file.seek(start - 1)
        found = window.skip_to_record(0)
    else:
        found = window.skip_to_first(source)
    if not found or (end is not None and window.offset >= end and window.offset > source.skip):
        return
    while True:
        cut, last = window.cut(end)
        if cut:
            yield Block(window.view(cut), window.offset)
        if last:
            return
        if cut:
            window.advance(cut)
        else:
            window.grow()


class _Window:
    """The stretch of a file that is in memory; it always begins with a record once one was found."""

    def __init__(self, stream: Stream, source: Source, *, offset: int, block_bytes: int) -> None:
        self.offset = offset
        self._stream = stream
        self._source = source
        self._marker = b"\n" if source.lines else b"\n>"
        self._buffer = bytearray(block_bytes)
        self._filled = 0
        self._at_end = False

    def view(self, length: int) -> memoryview:
        """The first bytes."""
        return memoryview(self._buffer)[:length]

    def advance(self, length: int) -> None:
        """Let go of the first bytes."""
        kept = self._filled - length
        self._buffer[:kept] = self._buffer[length : self._filled]
        self._filled = kept
        self.offset += length

    def grow(self) -> None:
        """Make room for a record that is longer than the buffer. Raises DataError past MAX_RECORD_BYTES."""
        if self._filled >= MAX_RECORD_BYTES:
            raise DataError(f"{self._source.path}: the record at byte {self.offset} is longer than {MAX_RECORD_BYTES} bytes; is this a file of proteins?")
        grown = bytearray(2 * len(self._buffer))
        grown[: self._filled] = memoryview(self._buffer)[: self._filled]
        self._buffer = grown

    def fill(self) -> None:
        """Read until the buffer is full or the file ends."""
        with memoryview(self._buffer) as view:
            while not self._at_end and self._filled < len(view):
                num = self._stream.read_into(view[self._filled :])
                self._filled += num
                self._at_end = num == 0

    def skip_to_record(self, position: int) -> bool:
        """Advance to the first record that begins behind `position`; False when there is none."""
        while True:
            self.fill()
            if (found := self._buffer.find(self._marker, position, self._filled)) >= 0:
                self.advance(found + 1)
                return self._filled > 0 or not self._at_end
            if self._at_end:
                return False
            self.advance(self._filled - 1)
            position = 0

    def skip_to_first(self, source: Source) -> bool:
        """Advance over a byte-order mark, and in FASTA over blank lines, to the first record."""
        self.fill()
        self.advance(source.skip)
        if source.lines:
            return self._filled > 0
        while True:
            blank = self._filled - len(self._buffer[: self._filled].lstrip(WHITESPACE))
            if blank < self._filled:
                break
            if self._at_end:
                return False
            # Keep one byte, which shows whether a line begins behind it.
            self.advance(self._filled - 1)
            self.fill()
        at_line_start = blank == 0 or self._buffer[blank - 1 : blank] == b"\n"
        if self._buffer[blank : blank + 1] != b">" or not at_line_start:
            refuse_start(source, self.offset + blank, bytes(self._buffer[blank : blank + 60]))
        self.advance(blank)
        return True

    def cut(self, end: int | None) -> tuple[int, bool]:
        """Where the whole records in memory end, and whether they are the last of the range."""
        self.fill()
        if end is not None and self.offset + self._filled >= end:
            found = self._buffer.find(self._marker, max(end - 1 - self.offset, 0), self._filled)
            if found >= 0:
                return found + 1, True
        if self._at_end:
            return self._filled, True
        return self._buffer.rfind(self._marker, 0, self._filled) + 1, False
