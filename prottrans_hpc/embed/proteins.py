"""The proteins of an extraction, read from FASTA in windows of bounded size; read again whenever they are needed.

The input is read three times (count, compute, assemble), which costs microseconds a protein and bounded memory: the
hashes of names, by which equal ones are found, are put aside beyond a few millions, 16 bytes a protein. Its digest is
taken each time, over names and residues, so that a file that changes in between is found; the same proteins compressed
or split otherwise are the same input.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import terminal
from ..corpus.sorted_runs import SortedRuns
from ..errors import DataError

WINDOW_RESIDUES = 1 << 18
WINDOW_PROTEINS = 1 << 13
_NAME = np.dtype([("key", "<u8"), ("number", "<u8")])
"""Hash of a protein's name, and which of the input it is."""


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


def take_census(read: Reader, folder: Path) -> Census:
    """Read the input once, and warn of names that occur more than once. Hashes of many names are put aside in `folder`, where space for the output is."""
    hashes, counter = SortedRuns(folder, _NAME), _Counter()
    proteins = counter.watch(read())
    with terminal.progress("reading", total=None, unit="proteins") as advance:
        while keys := [hash(protein.name) for protein in itertools.islice(proteins, WINDOW_PROTEINS)]:
            rows = np.empty(len(keys), _NAME)
            rows["key"] = np.array(keys, np.int64).view(np.uint64)
            rows["number"] = np.arange(counter.num_proteins - len(keys), counter.num_proteins)
            hashes.add(rows)
            advance(len(keys))
    _warn_of_duplicates(hashes, read)
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


def _warn_of_duplicates(hashes: SortedRuns, read: Reader) -> None:
    """Name the first of the names that occur more than once; each stays a row of its own."""
    num, earliest = 0, []
    for rows in hashes.ranges():
        rows = rows[np.argsort(rows["key"], kind="stable")]
        same = rows["key"][1:] == rows["key"][:-1]
        numbers = rows["number"][:-1][same & ~np.concatenate(([False], same))[:-1]]
        num += len(numbers)
        earliest += [int(numbers.min())] if len(numbers) else []
    if num:
        first = next(itertools.islice(read(), min(earliest), None)).name
        terminal.warn(
            f"{num:,} name{'s occur' if num > 1 else ' occurs'} more than once, the first is {terminal.printable(first)}; "
            "each protein keeps a row of its own, in the order of the input"
        )
