"""What a model with memory remembers of this rank's lanes from one step to the next: part of the training state.

It stays on the device, a tensor a micro batch as the model returned it, lanes first. In a checkpoint each rank (of a tensor group,
the first) has a file with its own lanes, named by them, so that any number of ranks that divides the lanes finds what it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..architecture import Batch
from ..corpus.lanes import own_lanes


class LaneMemory:
    """Owns the tensors. A batch without lanes passes through it unchanged."""

    def __init__(self) -> None:
        self._by_micro_batch: dict[int, Tensor] = {}
        self._restored: tuple[int, Tensor] | None = None

    def put_into(self, batch: Batch, index: int) -> Batch:
        """The micro batch of this number with what was remembered of its lanes, if anything."""
        if batch.lanes is None:
            return batch
        if index in self._by_micro_batch:
            self._restored = None
            return replace(batch, memory=self._by_micro_batch[index])
        if self._restored is None:
            return batch
        first, rows = self._restored
        begin = int(batch.lanes[0]) - first
        return replace(batch, memory=rows[begin : begin + len(batch.lanes)].to(batch.lanes.device))

    def take(self, index: int, memory: Tensor | None) -> None:
        """Keep what the model returned for a micro batch."""
        if memory is not None:
            self._by_micro_batch[index] = memory

    def forget(self) -> None:
        """The lanes begin anew, with nothing before them."""
        self._by_micro_batch.clear()
        self._restored = None

    def restore(self, first_lane: int, rows: Tensor) -> None:
        """Go on from a checkpoint; `rows` are those of this rank's lanes."""
        self.forget()
        self._restored = (first_lane, rows)

    def tensors(self, first_lane: int) -> dict[str, Tensor]:
        """For a checkpoint: each tensor named by its first lane."""
        named = {}
        for index in sorted(self._by_micro_batch):
            named[tensor_name(first_lane)] = self._by_micro_batch[index]
            first_lane += len(self._by_micro_batch[index])
        return named


@dataclass(frozen=True)
class LaneFile:
    """The file of one rank's lanes in a checkpoint."""

    first: int
    end: int
    num_lanes: int
    """Of all ranks together."""

    @property
    def name(self) -> str:
        """Of the file."""
        return f"memory-{self.first:08d}-{self.end:08d}-of-{self.num_lanes:08d}.safetensors"


def lane_files(num_lanes: int, world_size: int) -> list[LaneFile]:
    """A file for each rank."""
    return [LaneFile(lanes.start, lanes.stop, num_lanes) for lanes in (own_lanes(num_lanes, rank, world_size) for rank in range(world_size))]


def parse_name(name: str) -> LaneFile:
    """The file of this name. Raises ValueError for another kind of name."""
    first, end, num_lanes = name.removeprefix("memory-").removesuffix(".safetensors").replace("-of-", "-").split("-")
    return LaneFile(int(first), int(end), int(num_lanes))


def tensor_name(first_lane: int) -> str:
    """Of the tensor whose rows begin with this lane."""
    return f"lane-{first_lane:08d}"


def rows_of(lanes: range, found: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """The rows of some lanes, out of the tensors of the files that hold them. Raises ValueError when one is missing."""
    parts, reached = [], lanes.start
    for name, tensor in sorted((name, tensor) for tensors in found for name, tensor in tensors.items()):
        first = int(name.removeprefix("lane-"))
        begin, end = max(lanes.start, first), min(lanes.stop, first + len(tensor))
        if begin >= end:
            continue
        if begin != reached:
            break
        parts.append(tensor[begin - first : end - first])
        reached = end
    if reached != lanes.stop or not parts:
        raise ValueError(f"the memory of lane {reached} is not there")
    return torch.cat(parts)
