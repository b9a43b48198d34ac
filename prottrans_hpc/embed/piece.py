"""Pieces of the input of an extraction: consecutive windows, as a file that one node reads.

A piece begins and ends where a window does, so that the node packs the same proteins into the same batches as a
single process would, and the numbers come out the same. It holds proteins, not FASTA: what was wrong with a record
was judged once, in the input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from .. import durable
from ..errors import DataError
from .proteins import Census, Protein, Window

_LONGEST_LINE = 64


@dataclass(frozen=True)
class Piece:
    """A piece, and where it stands in the input."""

    path: Path
    first_window: int
    num_windows: int
    num_proteins: int
    sha256: str
    """Of the file."""


def write_pieces(windows: Iterable[Window], census: Census, folder: Path, num_pieces: int) -> list[Piece]:
    """Cut the input into at most `num_pieces` pieces of about equal residues, none of them empty."""
    pieces: list[Piece] = []
    held: list[Window] = []
    done = 0
    for window in windows:
        held.append(window)
        residues = sum(len(residues) for place, residues in enumerate(window.residues) if place not in window.problems)
        done += residues
        # A piece ends at the border nearest to its share, taking the next window to be like this one.
        if (done + residues / 2) * num_pieces >= census.num_residues * (len(pieces) + 1) and len(pieces) + 1 < num_pieces:
            pieces.append(_write(held, folder / f"piece-{len(pieces):05d}"))
            held = []
    if held:
        pieces.append(_write(held, folder / f"piece-{len(pieces):05d}"))
    return pieces


def _write(windows: list[Window], path: Path) -> Piece:
    digest, num_proteins = hashlib.sha256(), 0
    with durable.new_file(path) as temporary, temporary.open("wb") as file:
        for window in windows:
            for place, (name, residues) in enumerate(zip(window.names, window.residues, strict=True)):
                problem = window.problems.get(place)
                text = b"" if problem is None else problem.encode()
                record = b"%d %d %d\n%b%b%b" % (len(name), len(residues), -1 if problem is None else len(text), name, residues, text)
                digest.update(record)
                file.write(record)
                num_proteins += 1
    return Piece(path, windows[0].index, len(windows), num_proteins, digest.hexdigest())


def read_piece(path: Path) -> Iterator[Protein]:
    """The proteins of a piece. Raises DataError when the file is damaged."""
    with path.open("rb") as file:
        while line := file.readline(_LONGEST_LINE):
            try:
                name_length, length, problem_length = map(int, line.split(b" "))
            except ValueError as error:
                raise DataError(f"{path} is damaged: {line!r} does not begin a protein") from error
            name, residues = _exactly(file, name_length, path), _exactly(file, length, path)
            yield Protein(name, residues, None if problem_length < 0 else _exactly(file, problem_length, path).decode())


def _exactly(file: IO[bytes], num_bytes: int, path: Path) -> bytes:
    content = file.read(num_bytes)
    if len(content) != num_bytes:
        raise DataError(f"{path} is damaged: it ends within a protein")
    return content


def as_json(piece: Piece) -> dict[str, Any]:
    """For the list of pieces."""
    return asdict(piece) | {"path": piece.path.name}


def from_json(values: dict[str, Any], folder: Path) -> Piece:
    """Back from the list of pieces."""
    return Piece(**(values | {"path": folder / values["path"]}))
