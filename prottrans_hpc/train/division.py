"""How a tensor is divided over ranks, as arithmetic on numbers alone: which box of it a rank holds, and who else does.

Ranks lie on a grid in row-major order, so a cut along one axis of the grid is known by its number of parts and by its
stride: `rank // stride % parts` is the part that a rank holds. That is enough for every rank to say of all others what
they hold, without asking them and without a table of ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

Box = tuple[tuple[int, int], ...]
"""Begin and end in each dimension."""


@dataclass(frozen=True)
class Cut:
    """One cut of a dimension into parts, as even as whole rows allow: like torch.chunk, the last parts may be smaller or empty."""

    dimension: int
    parts: int
    stride: int
    """Ranks between one part's holder and the next one's."""

    def part_of(self, rank: int) -> int:
        """Which part a rank holds."""
        return rank // self.stride % self.parts


@dataclass(frozen=True)
class Division:
    """A whole tensor's shape, and its cuts in the order in which they were made."""

    shape: tuple[int, ...]
    cuts: tuple[Cut, ...] = ()

    @property
    def whole(self) -> Box:
        """The box of everything."""
        return tuple((0, size) for size in self.shape)

    def box_of(self, rank: int) -> Box:
        """What a rank holds; in a dimension with fewer rows than parts that can be nothing."""
        box = list(self.whole)
        for cut in self.cuts:
            box[cut.dimension] = _part(box[cut.dimension], cut.parts, cut.part_of(rank))
        return tuple(box)

    def first_holder(self, rank: int) -> int:
        """The lowest rank that holds what this rank holds."""
        return sum(cut.part_of(rank) * cut.stride for cut in self.cuts)

    def holders_of(self, box: Box) -> Iterator[tuple[int, Box]]:
        """The boxes that lie at least partly in `box`, each with its lowest holder."""
        return _meeting(self.whole, self.cuts, box, 0)


def _part(extent: tuple[int, int], parts: int, index: int) -> tuple[int, int]:
    begin, end = extent
    size = -(-(end - begin) // parts)
    return min(end, begin + index * size), min(end, begin + (index + 1) * size)


def _meeting(held: Box, cuts: tuple[Cut, ...], wanted: Box, rank: int) -> Iterator[tuple[int, Box]]:
    if volume(intersection(held, wanted)) == 0:
        return
    if not cuts:
        yield rank, held
        return
    cut, dimension = cuts[0], cuts[0].dimension
    begin, end = held[dimension]
    size = -(-(end - begin) // cut.parts)
    low, high = max(begin, wanted[dimension][0]), min(end, wanted[dimension][1])
    for index in range((low - begin) // size, -(-(high - begin) // size)):
        inner = (*held[:dimension], _part(held[dimension], cut.parts, index), *held[dimension + 1 :])
        yield from _meeting(inner, cuts[1:], wanted, rank + index * cut.stride)


def intersection(one: Box, other: Box) -> Box:
    """What two boxes have in common; empty dimensions end where they begin."""
    begins = [max(a[0], b[0]) for a, b in zip(one, other, strict=True)]
    ends = [min(a[1], b[1]) for a, b in zip(one, other, strict=True)]
    return tuple((begin, max(begin, end)) for begin, end in zip(begins, ends, strict=True))


def volume(box: Box) -> int:
    """Elements of a box; 1 for that of a scalar."""
    return math.prod(end - begin for begin, end in box)


def num_holders(cuts: tuple[Cut, ...], world_size: int) -> int:
    """How many ranks hold each piece. Raises ValueError where the cuts do not fit the ranks."""
    parts = math.prod(cut.parts for cut in cuts)
    if world_size % parts:
        raise ValueError(f"{world_size} ranks cannot hold tensors cut into {parts} pieces equally often")
    return world_size // parts


def holder(cuts: tuple[Cut, ...], world_size: int, first: int, number: int) -> int:
    """The rank that is holder `number` of the piece whose lowest holder is `first`; numbers rise with ranks."""
    rank, below = first, 1
    for cut in sorted(cuts, key=lambda cut: (cut.stride, cut.parts)):
        # Between two cuts lies an axis of the grid along which nothing of this tensor changes.
        free = cut.stride // below
        rank += number % free * below
        number, below = number // free, cut.stride * cut.parts
    return rank + number % (world_size // below) * below


def first_holders(cuts: tuple[Cut, ...]) -> Iterator[int]:
    """The lowest holder of every piece."""
    for indices in itertools.product(*(range(cut.parts) for cut in cuts)):
        yield sum(index * cut.stride for index, cut in zip(indices, cuts, strict=True))
