"""What is wrong with a record, and what the user's rule makes of it: an error, an X, or a record left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..terminal import printable
from .alphabet import Rules
from .kernel import BlockParser, Parsed
from .sources import Source

MAX_NAME_BYTES = 10_000
"""A longer name is a sequence that ran into its header because a newline is missing."""
_NUL, _GREATER = 0, ord(">")
_FORGIVEN = "--invalid x keeps such records, --invalid skip leaves them out"


@dataclass(frozen=True)
class Problem:
    """Something wrong with one record."""

    kind: str
    """ "empty", "nameless" or "invalid": how the report counts it."""
    reason: str
    left_out: bool


class Screen:
    """Judges the records of one source; owns the parser and the counts."""

    def __init__(self, source: Source, rules: Rules) -> None:
        self.source = source
        self.rules = rules
        self.parser = BlockParser(rules.table(), lines=source.lines)
        self.num_problems: dict[str, int] = {}
        """How many records had each kind of problem."""
        self.num_left_out = 0

    def problems(self, parsed: Parsed, raw: memoryview, offset: int) -> Iterator[tuple[int, Problem]]:
        """The records with problems, in order. Raises DataError under the rule "error", and always for NUL, a '>' within a
        sequence, and headers that end in a carriage return alone: guessing on would make records of garbage."""
        suspects = self._suspects(parsed)
        for i in suspects.tolist():
            record = bytes(raw[int(parsed.starts[i]) : int(parsed.starts[i + 1]) if i + 1 < len(parsed) else len(raw)])
            self._refuse_garbage(parsed, i, record, offset)
            problem = self._judge(parsed, i, record, offset)
            self.num_problems[problem.kind] = self.num_problems.get(problem.kind, 0) + 1
            self.num_left_out += problem.left_out
            yield i, problem

    def _suspects(self, parsed: Parsed) -> npt.NDArray[np.int64]:
        name_lengths = np.diff(parsed.name_offsets)
        suspect = (parsed.invalid != 0) | (np.diff(parsed.offsets) == 0) | (name_lengths > MAX_NAME_BYTES)
        if not self.source.lines:
            suspect |= name_lengths == 0
        return np.flatnonzero(suspect)

    def _judge(self, parsed: Parsed, i: int, record: bytes, offset: int) -> Problem:
        skip = self.rules.invalid == "skip"
        if parsed.invalid[i]:
            at = self._first_invalid(record)
            return self._problem(parsed, i, "invalid", f"{_character(record[at])} is no residue", skip, offset + at)
        if parsed.offsets[i] == parsed.offsets[i + 1]:
            return self._problem(parsed, i, "empty", "the record has no residues", True, offset)
        return self._problem(parsed, i, "nameless", "the record has no name", skip, offset)

    def _problem(self, parsed: Parsed, i: int, kind: str, reason: str, left_out: bool, position: int) -> Problem:
        if self.rules.invalid == "error":
            advice = "--invalid x or skip leaves such records out" if kind == "empty" else _FORGIVEN
            if kind == "invalid":
                advice = "--invalid x replaces such characters by X, --invalid skip leaves the record out"
            self._refuse(parsed, i, f"{reason} ({advice})", position)
        return Problem(kind, reason, left_out)

    def _refuse_garbage(self, parsed: Parsed, i: int, record: bytes, offset: int) -> None:
        if parsed.invalid[i] < 0:
            self._refuse(parsed, i, "a carriage return stands inside its header; lines must end in LF or CR LF (convert with: tr '\\r' '\\n')", offset)
        if int(parsed.name_offsets[i + 1] - parsed.name_offsets[i]) > MAX_NAME_BYTES:
            self._refuse(parsed, i, f"its name is longer than {MAX_NAME_BYTES} bytes: is the newline behind the header missing?", offset)
        if parsed.invalid[i]:
            body = self._body(record)
            if (at := record.find(b"\x00", body)) >= 0:
                self._refuse(parsed, i, "a NUL byte stands in the sequence: the file is damaged, or UTF-16 text", offset + at)
            if (at := record.find(b">", body)) >= 0:
                self._refuse(parsed, i, "a '>' stands within the sequence: is the newline before it missing?", offset + at)

    def _refuse(self, parsed: Parsed, i: int, what: str, position: int) -> NoReturn:
        start = int(parsed.starts[i])
        name = parsed.names[int(parsed.name_offsets[i]) : int(parsed.name_offsets[i + 1])].tobytes()
        line = line_at(self.source, position + start)
        raise DataError(f"{self.source.path}, line {line}, record {printable(name, 60)!r}: {what}")

    def _body(self, record: bytes) -> int:
        """Where the sequence begins in a raw record."""
        return 0 if self.source.lines else (record + b"\n").index(b"\n") + 1

    def _first_invalid(self, record: bytes) -> int:
        values = np.frombuffer(self.parser.table, np.uint8)[np.frombuffer(record, np.uint8)]
        body = self._body(record)
        return body + int(np.flatnonzero((values[body:] & 0xA0) == 0xA0)[0])


def refuse_start(source: Source, position: int, found: bytes) -> NoReturn:
    """Raise the DataError for a file whose first text is no header."""
    line = line_at(source, position)
    raise DataError(f"{source.path}, line {line}, byte {position}: FASTA begins with '>' at the start of a line; found {printable(found, 40)!r}")


def line_at(source: Source, position: int) -> int:
    """Line number, from 1, of a byte of the plain text; reads up to it, so for messages only."""
    line, buffer = 1, bytearray(1 << 20)
    with source.open() as stream, memoryview(buffer) as view:
        while position > 0 and (num := stream.read_into(view[: min(position, len(buffer))])):
            line += buffer.count(b"\n", 0, num)
            position -= num
    return line


def _character(byte: int) -> str:
    return f"the character {chr(byte)!r}" if 0x20 < byte < 0x7F else f"the byte 0x{byte:02X}"
