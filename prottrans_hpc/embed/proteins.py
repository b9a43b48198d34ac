"""The proteins of an extraction, read from FASTA in windows of bounded size; read again whenever they are needed.

The input is read three times (count, compute, assemble), which costs microseconds a protein and no memory. Its
digest is taken each time, over names and residues, so that a file that changes in between is found; the same
proteins compressed or split otherwise are the same input.
"""

from __future__ import annotations

import array
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import terminal
from ..errors import DataError

WINDOW_RESIDUES = 1 << 18
WINDOW_PROTEINS = 1 << 13


@dataclass(frozen=True)
class Protein:
    """One record of the input."""

    name: bytes
    """First word of its header, as it is in the file."""
    residues: bytes
    """Cleaned, upper-case ASCII."""
    problem: str | None
    """Why it cannot be embedded; None: it can."""


Reader = Callable[[], Iterable[Protein]]
"""Starts to read the input from its beginning."""


@dataclass(frozen=True)
class Window:
    """Consecutive proteins that are sorted and packed together."""

    index: int
    names: list[bytes]
    residues: list[bytes]
    problems: Mapping[int, str]
    """Place in the window -> why that protein cannot be embedded."""
    lengths: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Census:
    """What the input holds."""

    num_proteins: int
    num_residues: int
    """Of the proteins without a problem."""
    num_sound: int
    """Proteins without a problem."""
    sha256: str
    """Of all names, residues and problems, in order."""


def take_census(read: Reader) -> Census:
    """Read the input once, and warn of names that occur more than once."""
    hashes, counter = array.array("q"), _Counter()
    with terminal.progress("reading", total=None, unit="proteins") as advance:
        for number, protein in enumerate(counter.watch(read()), 1):
            hashes.append(hash(protein.name))
            if number % WINDOW_PROTEINS == 0:
                advance(WINDOW_PROTEINS)
        advance(counter.num_proteins % WINDOW_PROTEINS)
    _warn_of_duplicates(np.frombuffer(hashes, np.int64), read)
    return counter.census()


def read_windows(read: Reader, census: Census) -> Iterator[Window]:
    """The input in windows. Raises DataError at its end when it is not what the census saw."""
    counter = _Counter()
    proteins: list[Protein] = []
    index = num_residues = 0
    for protein in counter.watch(read()):
        proteins.append(protein)
        num_residues += len(protein.residues)
        if num_residues >= WINDOW_RESIDUES or len(proteins) == WINDOW_PROTEINS:
            yield _window(index, proteins)
            proteins, num_residues, index = [], 0, index + 1
    if proteins:
        yield _window(index, proteins)
    if counter.census() != census:
        raise DataError("the input changed while it was read: run the command again when nothing writes to it")


def _window(index: int, proteins: list[Protein]) -> Window:
    return Window(
        index=index,
        names=[protein.name for protein in proteins],
        residues=[protein.residues for protein in proteins],
        problems={place: protein.problem for place, protein in enumerate(proteins) if protein.problem is not None},
        lengths=np.fromiter((len(protein.residues) for protein in proteins), np.int64, len(proteins)),
    )


class _Counter:
    """Counts and digests proteins on their way through."""

    def __init__(self) -> None:
        self.num_proteins = self.num_sound = self.num_residues = 0
        self._digest: Any = hashlib.sha256()

    def watch(self, proteins: Iterable[Protein]) -> Iterator[Protein]:
        """The same proteins."""
        for protein in proteins:
            problem = protein.problem or ""
            self.num_proteins += 1
            if not problem:
                self.num_sound += 1
                self.num_residues += len(protein.residues)
            self._digest.update(
                b"%d %d %d\n%b%b%b" % (len(protein.name), len(protein.residues), len(problem), protein.name, protein.residues, problem.encode())
            )
            yield protein

    def census(self) -> Census:
        """Of what was seen so far."""
        return Census(self.num_proteins, self.num_residues, self.num_sound, self._digest.hexdigest())


def _warn_of_duplicates(hashes: npt.NDArray[np.int64], read: Reader) -> None:
    """Name the first of the names that occur more than once; each stays a row of its own."""
    values, counts = np.unique(hashes, return_counts=True)
    repeated = set(values[counts > 1].tolist())
    if repeated:
        first = next(protein.name for protein in read() if hash(protein.name) in repeated)
        terminal.warn(
            f"{len(repeated):,} name{'s occur' if len(repeated) > 1 else ' occurs'} more than once, the first is {terminal.printable(first)}; "
            "each protein keeps a row of its own, in the order of the input"
        )
