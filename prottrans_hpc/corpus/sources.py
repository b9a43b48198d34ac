"""The input files: which they are, how each is read, and whether one changed while it was read."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import CheckpointError, DataError
from ..terminal import note, printable
from .alphabet import REMOVED, WHITESPACE
from .compression import Stream, detect

SUFFIXES = (".fasta", ".fa", ".faa", ".fas", ".fsa", ".aa", ".pep", ".seq", ".txt")
"""What is taken from a folder, with or without a compression suffix; a file that is named itself may be called anything."""
COMPRESSION_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
_HEAD = 1 << 16
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Source:
    """One input file as it was when the work began."""

    path: Path
    num_bytes: int
    modified_ns: int
    inode: int
    compression: str | None
    lines: bool
    """One sequence a line instead of FASTA."""
    skip: int
    """Plain bytes of a byte-order mark in front."""

    def check_unchanged(self) -> None:
        """Raises DataError when the file is no longer what it was."""
        status = self.path.stat()
        if (status.st_size, status.st_mtime_ns, status.st_ino) != (self.num_bytes, self.modified_ns, self.inode):
            raise DataError(f"{self.path} changed while it was read; start again when nothing writes to it")

    @contextlib.contextmanager
    def open(self, *, hashing: bool = False) -> Iterator[Stream]:
        """The plain text as a stream from its first byte."""
        with open_regular(self.path) as descriptor, os.fdopen(descriptor, "rb", buffering=0, closefd=False) as file:
            yield Stream(self.path, self.compression, file, hashing=hashing)


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """A file descriptor; a pipe or device that took the file's place is refused instead of waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _require_regular(path, os.fstat(descriptor))
        yield descriptor
    finally:
        os.close(descriptor)


def find_sources(inputs: Sequence[str | Path]) -> list[Source]:
    """All input files in the order given, those of a folder in order of their names.

    Raises CheckpointError (no input) for a missing path, DataError for one that cannot be a sequence file.
    """
    paths = [path for given in inputs for path in _expand(Path(given))]
    seen: dict[tuple[int, int], Path] = {}
    for path in paths:
        status = path.stat()
        _require_regular(path, status)
        if (first := seen.setdefault((status.st_dev, status.st_ino), path)) is not path:
            raise DataError(f"{path} is given twice (also as {first})")
    return [inspect(path) for path in paths]


def _expand(path: Path) -> list[Path]:
    if not path.exists():
        raise CheckpointError(f"there is no input {path}")
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    chosen = [file for file in files if _plain_suffix(file) in SUFFIXES]
    if not chosen:
        raise CheckpointError(
            f"the folder {path} holds no sequence file: names end in {', '.join(SUFFIXES)}, with or without {', '.join(COMPRESSION_SUFFIXES)}"
        )
    if len(chosen) < len(files):
        others = [file.name for file in files if file not in set(chosen)]
        note(f"{path}: {len(chosen)} sequence files taken, {len(others)} others left ({printable(', '.join(others), 80)})")
    return chosen


def _plain_suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSION_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _require_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise DataError(f"{path} is {kind}: input must be regular files, because their size and content are recorded")


def inspect(path: Path) -> Source:
    """Look at the first bytes of a file. Raises DataError when they are neither FASTA nor one sequence a line."""
    source, head = _look(path)
    text = head[source.skip :].lstrip(WHITESPACE)
    lines = text[:1] not in (b">", b"")
    if lines:
        _require_sequence(path, head, text)
    return replace(source, lines=lines)


def inspect_text(path: Path) -> Source:
    """Another text file that is input, such as a cluster file, compressed or not."""
    return _look(path)[0]


def _look(path: Path) -> tuple[Source, bytes]:
    with open_regular(path) as descriptor:
        status = os.fstat(descriptor)
        head = os.pread(descriptor, _HEAD, 0)
        compression = detect(head, path)
        if compression:
            with os.fdopen(descriptor, "rb", buffering=0, closefd=False) as file:
                head = _first_bytes(Stream(path, compression, file))
    _refuse_wide_characters(path, head)
    skip = len(_BOM) if head.startswith(_BOM) else 0
    if len(head) < _HEAD and not head[skip:].strip(WHITESPACE):
        raise DataError(f"{path} is empty")
    return Source(path, status.st_size, status.st_mtime_ns, status.st_ino, compression, True, skip), head


def _first_bytes(stream: Stream) -> bytes:
    buffer = bytearray(_HEAD)
    num = 0
    with memoryview(buffer) as view:
        while num < _HEAD and (got := stream.read_into(view[num:])):
            num += got
    return bytes(buffer[:num])


def _refuse_wide_characters(path: Path, head: bytes) -> None:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (head[:1] == b"\x00" and head[1:2] == b">") or head[:2] == b">\x00":
        raise DataError(f"{path} is UTF-16 text; convert it first: iconv -f UTF-16 -t ASCII")


def _require_sequence(path: Path, head: bytes, text: bytes) -> None:
    """One sequence a line must begin with a line of letters; anything else was meant to be FASTA."""
    line = text.splitlines()[0]
    if not line.translate(None, WHITESPACE + REMOVED).isalpha():
        number = head[: len(head) - len(text)].count(b"\n") + 1
        raise DataError(
            f"{path}, line {number}, is neither FASTA nor a sequence: FASTA begins with '>', text has one sequence of letters a line; "
            f"found {printable(line, 60)!r}"
        )
