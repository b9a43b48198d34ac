"""Reading a split: its shards are mapped into memory, and records leave them by the thousand, never one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError, DataError
from . import kernel
from .index import Index, ShardEntry
from .samples import Samples
from .shard import map_shard

Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class MappedShard:
    """The two arrays of a shard that reading needs, mapped read-only."""

    path: Path
    residues: UInt8
    """Upper-case ASCII letters, end to end."""
    offsets: Int64
    """[num_sequences + 1]: where each sequence begins in `residues`."""


class Corpus:
    """One split of a corpus, open for reading; owns the maps of its shards, each made at its first use."""

    def __init__(self, index: Index, split: str = "train") -> None:
        """Raises CheckpointError when the corpus has no such split, DataError for a shard that is missing or of another size."""
        if split not in index.splits:
            raise CheckpointError(f"{index.path} has no split {split!r}; its splits are {', '.join(index.splits)}")
        self.index, self.split = index, split
        self._shards = index.splits[split].shards
        self._ends = np.cumsum([shard.num_sequences for shard in self._shards], dtype=np.int64)
        self._mapped: dict[int, MappedShard] = {}
        for shard in self._shards:
            _check_size(self._path(shard), shard)

    @property
    def num_sequences(self) -> int:
        """Sequences of the split; they are numbered from 0 through the shards."""
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def num_residues(self) -> int:
        """Residues of the split."""
        return sum(shard.num_residues for shard in self._shards)

    @cached_property
    def lengths(self) -> Int64:
        """Residues of every sequence, int64 [num_sequences]: 8 bytes a sequence, so not for the largest corpora."""
        return np.concatenate([np.zeros(0, np.int64), *(np.diff(self._map(number).offsets) for number in range(len(self._shards)))])

    def lengths_of(self, ids: Int64) -> Int64:
        """Residues of some sequences, int64 [n]; ids are below `num_sequences`. Raises DataError naming a damaged shard."""
        lengths = np.empty(len(ids), np.int64)
        for shard, which, local in self._by_shard(ids):
            found = shard.offsets[local + 1] - shard.offsets[local]
            if np.any((found < 0) | (found > len(shard.residues))):
                raise self._damaged(shard.path, "its offsets do not ascend")
            lengths[which] = found
        return lengths

    def gather(self, samples: Samples, table: bytes, out: Int64, out_starts: Int64) -> None:
        """Write the residues of each sample, mapped by `table` (256 token ids), to `out` from its place in `out_starts` on.

        Raises DataError naming the shard when a sample lies outside of it, as with damaged offsets.
        """
        for shard, which, local in self._by_shard(samples.ids):
            starts, lengths = shard.offsets[local] + samples.starts[which], samples.lengths[which]
            try:
                kernel.gather(shard.residues, starts, lengths, table, out, out_starts[which])
            except ValueError as error:
                raise self._damaged(shard.path, str(error)) from error

    def _by_shard(self, ids: Int64) -> Iterator[tuple[MappedShard, Int64 | slice, Int64]]:
        """For each shard that holds some of `ids`: the shard, which of the ids, and their numbers within it."""
        if not len(ids):
            return
        if len(self._shards) == 1:
            yield self._map(0), slice(None), ids
            return
        shard_of = np.searchsorted(self._ends, ids, side="right")
        order = np.argsort(shard_of, kind="stable")
        numbers, firsts = np.unique(shard_of[order], return_index=True)
        for number, which in zip(numbers.tolist(), np.split(order, firsts[1:]), strict=True):
            yield self._map(number), which, ids[which] - (self._ends[number] - self._shards[number].num_sequences)

    def _map(self, number: int) -> MappedShard:
        if number not in self._mapped:
            shard = self._shards[number]
            self._mapped[number] = _open(self._path(shard), shard)
        return self._mapped[number]

    def _damaged(self, path: Path, how: str) -> DataError:
        return DataError(f"{path} is damaged: {how}; `prottrans corpus check {self.index.path}` tells more")

    def _path(self, shard: ShardEntry) -> Path:
        return self.index.shard_path(shard)


def _open(path: Path, entry: ShardEntry) -> MappedShard:
    arrays = map_shard(path)
    offsets = arrays.offsets.view(np.int64)
    if len(offsets) != entry.num_sequences + 1 or offsets[0] != 0 or offsets[-1] != len(arrays.residues) or len(arrays.residues) != entry.num_residues:
        raise DataError(
            f"{path} is not the shard of the index: it has {len(offsets) - 1} sequences and {len(arrays.residues)} residues, "
            f"the index says {entry.num_sequences} and {entry.num_residues}"
        )
    return MappedShard(path, arrays.residues, offsets)


def _check_size(path: Path, shard: ShardEntry) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"the shard {path} is missing: copy the corpus again, or build it anew with `prottrans preprocess`") from None
    if size != shard.num_bytes:
        raise DataError(f"the shard {path} has {size} bytes, the index says {shard.num_bytes}: copy the corpus again, or build it anew")
