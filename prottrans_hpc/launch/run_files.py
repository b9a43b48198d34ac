"""Reading the files of a run from a login shell while its ranks may still write them: from the end, and forgiving.

Only what a reader needs is here: the last lines of a large file, lines of JSON of which the last may be unfinished,
and a file that is followed as it grows. Nothing here writes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

from .. import json_lines

_BLOCK = 1 << 16
_LONGEST_READ = 1 << 20

Record = dict[str, Any]


def read_code(path: Path) -> int | None:
    """The exit code in a file; None when it was not written, or the disk was full."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def read_records(path: Path) -> list[Record]:
    """The JSON objects of a file with one a line; a missing file has none, a line that is no object is passed over."""
    return json_lines.read(path)


def last_records(path: Path, count: int) -> list[Record]:
    """The last `count` or fewer JSON objects of a file with one a line, oldest first."""
    return json_lines.parse(last_lines(path, count))


def last_lines(path: Path, count: int) -> list[bytes]:
    """The last `count` lines of a file without their line ends; a missing file has none. Reads from the end."""
    lines, unfinished, _ = tail(path, count)
    return [*lines, unfinished][-count:] if unfinished and count else lines


def tail(path: Path, count: int) -> tuple[list[bytes], bytes, int]:
    """The last `count` finished lines of a file, what stands behind the last line end, and the byte where that begins."""
    try:
        with path.open("rb") as file:
            return _tail(file, count)
    except (FileNotFoundError, NotADirectoryError):
        return [], b"", 0


def _tail(file: IO[bytes], count: int) -> tuple[list[bytes], bytes, int]:
    end = start = file.seek(0, os.SEEK_END)
    content, block = b"", _BLOCK
    while start and content.count(b"\n") <= count:
        start = max(0, end - block)
        file.seek(start)
        content = file.read(end - start)
        block *= 2
    *lines, unfinished = content.split(b"\n")
    return lines[-count:] if count else [], unfinished, start + len(content) - len(unfinished)


class GrowingFile:
    """A file that other processes append to; it may be missing yet, be truncated, or be replaced by another of its name."""

    def __init__(self, path: Path, *, start: int | None = None) -> None:
        """`start` is the byte to begin with; None: the end that the file has now."""
        self.path = path
        self._unfinished = b""
        self._file = self._open()
        if self._file is not None:
            self._file.seek(0, os.SEEK_END) if start is None else self._file.seek(start)

    def new_lines(self) -> list[bytes]:
        """The lines that were finished since the last call."""
        lines = self._read()
        if self._was_replaced():
            lines += self.unfinished_line()
            self.close()
            self._file = self._open()
            lines += self._read()
        return lines

    def unfinished_line(self) -> list[bytes]:
        """What stands behind the last line end, once nothing more will come."""
        rest, self._unfinished = self._unfinished, b""
        return [rest] if rest else []

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> IO[bytes] | None:
        try:
            return self.path.open("rb", buffering=0)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _read(self) -> list[bytes]:
        if self._file is None:
            return []
        if os.fstat(self._file.fileno()).st_size < self._file.tell():  # truncated: what is in it now is new
            self._file.seek(0)
            self._unfinished = b""
        content = self._unfinished
        while chunk := self._file.read(_LONGEST_READ):
            content += chunk
        *lines, self._unfinished = content.split(b"\n")
        return lines

    def _was_replaced(self) -> bool:
        try:
            now = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False  # being replaced, or not there yet
        if self._file is None:
            return True
        old = os.fstat(self._file.fileno())
        return (now.st_dev, now.st_ino) != (old.st_dev, old.st_ino)
