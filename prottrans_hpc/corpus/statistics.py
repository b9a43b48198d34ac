"""Counts of what a corpus holds: lengths, residues, and what was changed or left out on the way in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .alphabet import Rules

_SHORT = 4096
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


@dataclass
class Tally:
    """Sums that workers make and the main process adds up; the order of adding does not matter."""

    counted: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    """[256]: input bytes that were replaced, removed or invalid, in all records read."""
    letters: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    """[256]: residues of the records kept."""
    short: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(_SHORT, np.int64))
    """[_SHORT]: sequences of each length below _SHORT, of the records kept."""
    long: Counter[int] = field(default_factory=Counter)
    """{length: sequences} of the others, which are few."""
    problems: Counter[str] = field(default_factory=Counter)
    """{kind: records}: empty, nameless, invalid, left_out, not_in_clusters."""

    def add_lengths(self, lengths: npt.NDArray[Any], sign: int = 1) -> None:
        """Count sequences by length."""
        self.short += sign * np.bincount(lengths[lengths < _SHORT], minlength=_SHORT)
        for value in lengths[lengths >= _SHORT].tolist():
            self.long[value] += sign

    def add(self, other: Tally) -> None:
        """Add another worker's sums."""
        self.counted += other.counted
        self.letters += other.letters
        self.short += other.short
        for length, num in other.long.items():
            self.long[length] += num
        for kind, num in other.problems.items():
            self.problems[kind] += num

    def lengths(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The lengths that occur, ascending, and the sequences of each."""
        found = {length: num for length, num in enumerate(self.short.tolist()) if num} | {length: num for length, num in self.long.items() if num}
        values = np.array(sorted(found), np.int64)
        return values, np.array([found[length] for length in values.tolist()], np.int64)


def summed(tallies: Iterable[Tally]) -> Tally:
    """The sum of all."""
    total = Tally()
    for tally in tallies:
        total.add(tally)
    return total


def describe(tally: Tally, rules: Rules) -> dict[str, Any]:
    """The part of index.json that counts: lengths, residues, changes."""
    values, counts = tally.lengths()
    left_out = {key: num for key, num in sorted(tally.problems.items()) if num and key != "not_in_clusters"}
    return {
        "residue_counts": {chr(byte): int(num) for byte, num in enumerate(tally.letters) if num},
        "lengths": describe_lengths(values, counts),
        "length_histogram": histogram(values, counts),
        **rules.counts(tally.counted.tolist()),
        "records_with_problems": left_out,
    }


def describe_lengths(values: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> dict[str, float]:
    """Shortest, mean, percentiles (nearest rank) and longest; empty for no sequence."""
    if not len(values):
        return {}
    cumulative = np.cumsum(counts)
    total = int(cumulative[-1])
    ranks = {f"p{p}": -(-total * p // 100) for p in PERCENTILES}
    percentiles = {name: int(values[np.searchsorted(cumulative, rank)]) for name, rank in ranks.items()}
    return {"shortest": int(values[0]), "mean": round(int((values * counts).sum()) / total, 3), **percentiles, "longest": int(values[-1])}


def histogram(values: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> list[dict[str, int]]:
    """Sequences by length in bins that widen by a quarter octave: [{from, to (exclusive), sequences}], without empty ends."""
    if not len(values):
        return []
    edges = sorted({round(2 ** (k / 4)) for k in range(4 * int(values[-1]).bit_length() + 1)})
    # A bin takes lengths from one edge up to the next.
    which = np.searchsorted(np.array(edges), values, "right") - 1
    sums = np.bincount(which, weights=counts).astype(np.int64)
    first = int(which[0])
    return [{"from": edges[k], "to": edges[k + 1], "sequences": int(sums[k])} for k in range(first, len(sums))]


def unigram_entropy(residue_counts: Mapping[str, int]) -> float:
    """Nats a residue when each is drawn by its frequency: the loss of a model that learnt nothing else."""
    counts = np.array(list(residue_counts.values()), float)
    shares = counts[counts > 0] / max(counts.sum(), 1.0)
    return float(-(shares * np.log(shares)).sum())
