"""Files that grow by one JSON object a line, several processes of which may die while they write.

A line is one write, as a rule. A full disk or a kill may leave half of one: the next writer begins on a new line, so
that nothing but the half is lost, and readers pass over it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]


def encode(record: Record) -> bytes:
    """One line of JSON; a number that JSON does not have (NaN, infinity) becomes null."""
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
    return (json.dumps(finite, allow_nan=False) + "\n").encode()


def parse(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """The JSON objects among some lines. Half of one is none: the object ends with its line."""
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, the oldest first; a missing file has none."""
    try:
        return parse(path.read_bytes().split(b"\n"))
    except (FileNotFoundError, NotADirectoryError):
        return []


def open_file(path: Path) -> int:
    """A descriptor for `append_to`; the file is made when it is missing, readable as the umask says."""
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)


def append_to(descriptor: int, path: Path, *records: Record) -> None:
    """Add lines behind what is there, whole or torn. An OSError names `path`."""
    content = b"".join(map(encode, records))
    try:
        if not _ends_a_line(descriptor):
            content = b"\n" + content
        while content:
            content = content[os.write(descriptor, content) :]
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error


def append(path: Path, *records: Record) -> None:
    """Add lines to a file."""
    descriptor = open_file(path)
    try:
        append_to(descriptor, path, *records)
    finally:
        os.close(descriptor)


def append_durably(path: Path, *records: Record) -> None:
    """Add lines to a file and force them to storage."""
    descriptor = open_file(path)
    try:
        append_to(descriptor, path, *records)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _ends_a_line(descriptor: int) -> bool:
    """Whether the file is empty or ends with a line end."""
    size = os.fstat(descriptor).st_size
    return size == 0 or os.pread(descriptor, 1, size - 1) == b"\n"
