"""Which rank writes which pieces of sharded tensors into which file: pure arithmetic, the same on every rank, and again by every reader.

Every rank knows how each tensor is divided, hence who holds what; so nobody has to be asked, and the plan grows with the
tensors and the files, not with ranks times tensors. Of the ranks that hold the same piece one writes it; tensors are dealt
out over such copies by bytes, and the copies are spread evenly over the ranks, hence over the nodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .division import Box, Cut, Division, first_holders, holder, num_holders
from .tensor_file import file_name

MAX_WRITERS = 64
MIN_BYTES_A_WRITER = 256 << 10


@dataclass(frozen=True)
class Group:
    """Tensors that are cut the same way and written by the same holders of their pieces."""

    cuts: tuple[Cut, ...]
    copy: int
    """Which of the holders of a piece writes it."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of the whole tensors, by name."""

    def writer_of(self, first: int, world_size: int) -> int:
        """The rank that writes the pieces whose lowest holder is `first`."""
        return holder(self.cuts, world_size, first, self.copy)

    def writers(self, world_size: int) -> Iterator[int]:
        """Every rank that writes pieces of this group."""
        return (self.writer_of(first, world_size) for first in first_holders(self.cuts))


@dataclass(frozen=True)
class PiecePlan:
    """Of all tensors of a checkpoint, by kind ("model", "optimizer")."""

    world_size: int
    groups: Mapping[str, tuple[Group, ...]]
    _numbers: dict[str, dict[int, int]] = field(default_factory=dict, repr=False, compare=False)

    def divisions(self, kind: str) -> dict[str, Division]:
        """How each tensor is divided."""
        return {name: Division(shape, group.cuts) for group in self.groups[kind] for name, shape in group.shapes.items()}

    def names_by_writer(self, kind: str) -> dict[int, tuple[str, ...]]:
        """The tensors that each writer has pieces of, by rank."""
        held: dict[int, list[Group]] = {}
        for group in self.groups[kind]:
            for rank in group.writers(self.world_size):
                held.setdefault(rank, []).append(group)
        known: dict[tuple[int, ...], tuple[str, ...]] = {}  # so that thousands of ranks share a few tuples
        for groups in held.values():
            known.setdefault(tuple(map(id, groups)), tuple(sorted(name for group in groups for name in group.shapes)))
        return {rank: known[tuple(map(id, held[rank]))] for rank in sorted(held)}

    def file_of(self, kind: str, rank: int) -> str:
        """The file of this kind that a rank writes."""
        if kind not in self._numbers:
            writers = {rank for group in self.groups[kind] for rank in group.writers(self.world_size)}
            self._numbers[kind] = {writer: number for number, writer in enumerate(sorted(writers))}
        return file_name(kind, self._numbers[kind][rank], len(self._numbers[kind]))

    def files_with(self, kind: str, wanted: Mapping[str, Box]) -> list[str]:
        """The files that hold anything of these boxes, sorted."""
        ranks: set[int] = set()
        for group in self.groups[kind]:
            for name in group.shapes.keys() & wanted.keys():
                found = Division(group.shapes[name], group.cuts).holders_of(wanted[name])
                ranks.update(group.writer_of(first, self.world_size) for first, _ in found)
        return sorted(self.file_of(kind, rank) for rank in ranks)

    def to_json(self) -> dict[str, Any]:
        """What state.json says of it."""
        described = {
            kind: [{"cuts": [dataclasses.astuple(cut) for cut in group.cuts], "copy": group.copy, "tensors": group.shapes} for group in groups]
            for kind, groups in self.groups.items()
        }
        return {"world_size": self.world_size, **described}


def from_json(values: Mapping[str, Any]) -> PiecePlan:
    """The plan that `to_json` described. Raises KeyError, TypeError or ValueError for anything else."""
    groups = {
        kind: tuple(
            Group(tuple(Cut(*cut) for cut in group["cuts"]), int(group["copy"]), {name: tuple(shape) for name, shape in group["tensors"].items()})
            for group in described
        )
        for kind, described in values.items()
        if kind != "world_size"
    }
    return PiecePlan(int(values["world_size"]), groups)


def plan_pieces(tensors: Mapping[str, Mapping[str, tuple[Division, int]]], world_size: int) -> PiecePlan:
    """Share pieces out; `tensors` has by kind and name how a tensor is divided, and the bytes of all of it.

    Raises ValueError where a division does not fit the ranks.
    """
    total: dict[tuple[Cut, ...], int] = {}
    for named in tensors.values():
        for division, num_bytes in named.values():
            total[division.cuts] = total.get(division.cuts, 0) + num_bytes
    load = {cuts: [0] * _num_copies(cuts, num_bytes, world_size) for cuts, num_bytes in total.items()}
    groups: dict[str, tuple[Group, ...]] = {}
    for kind, named in tensors.items():
        shares: dict[tuple[tuple[Cut, ...], int], dict[str, tuple[int, ...]]] = {}
        for name in sorted(named, key=lambda name: (-named[name][1], name)):
            division, num_bytes = named[name]
            copies = load[division.cuts]
            lightest = copies.index(min(copies))
            copies[lightest] += num_bytes
            copy = lightest * num_holders(division.cuts, world_size) // len(copies)
            shares.setdefault((division.cuts, copy), {})[name] = division.shape
        groups[kind] = tuple(Group(cuts, copy, dict(sorted(shapes.items()))) for (cuts, copy), shapes in shares.items())
    return PiecePlan(world_size, groups)


def _num_copies(cuts: tuple[Cut, ...], num_bytes: int, world_size: int) -> int:
    """Over how many holders of the same pieces tensors are dealt out: as many as give no rank too little, and no folder too many files."""
    copies = num_holders(cuts, world_size)
    pieces = world_size // copies
    return max(1, min(copies, MAX_WRITERS // pieces, num_bytes // pieces // MIN_BYTES_A_WRITER))
