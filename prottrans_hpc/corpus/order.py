"""The order of samples: a pure function of the corpus, the seed and the epoch.

Blocks of consecutive sequences are shuffled by a keyed permutation; then the samples of a window of shuffled
blocks are shuffled among themselves. Neither depends on the world size, on workers or on where a run resumed, and
only one window is ever in memory: a place in an epoch of 2.1 billion sequences is found without its past.

With split sequences (`cutting`) the number of samples in an epoch depends on all lengths: the first use reads
them once, 8 bytes a sequence, and keeps 4 bytes a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .. import recipe as recipes
from ..errors import CheckpointError, DataError
from .counter_rng import Purpose, draw
from .cutting import LONG_SEQUENCES, Cut, num_fragments
from .permutation import invert, permute, round_keys
from .samples import Samples, concatenate

Int64 = npt.NDArray[np.int64]

_CHUNK_BLOCKS = 1 << 14
"""Blocks whose lengths are read at once when something is summed over all."""
_NARROW_BLOCK = 4096
"""Sequences of a block up to which its residues, fragments or tokens are taken to fit 32 bits: a million residues each."""


class SequenceLengths(Protocol):
    """What the order needs to know of a split: a `reader.Corpus`, or plain lengths in simulations."""

    @property
    def num_sequences(self) -> int:
        """Sequences in the split."""

    def lengths_of(self, ids: Int64) -> Int64:
        """Residues of some sequences, int64 [n]."""


@dataclass(frozen=True)
class ArrayLengths:
    """Lengths that are at hand as an array."""

    lengths: Int64

    @property
    def num_sequences(self) -> int:
        """Sequences in the split."""
        return len(self.lengths)

    def lengths_of(self, ids: Int64) -> Int64:
        """Residues of some sequences, int64 [n]."""
        return self.lengths[ids]


@dataclass(frozen=True)
class SamplePosition:
    """How far a run has come in the order: enough to go on at any world size.

    `consumed` counts samples under the limit of the phase that took them; when an epoch is used up the position is
    the start of the next one.
    """

    epoch: int = 0
    consumed: int = 0

    def to_json(self) -> dict[str, int]:
        """Plain values for a checkpoint."""
        return {"epoch": self.epoch, "consumed": self.consumed}


def position_from_json(values: Any) -> SamplePosition:
    """The position in a checkpoint. Raises CheckpointError."""
    if isinstance(values, dict) and values.keys() == {"epoch", "consumed"} and all(type(value) is int and value >= 0 for value in values.values()):
        return SamplePosition(**values)
    raise CheckpointError(
        f"{values!r} is not a position in the order of samples: it needs an epoch and a count of consumed samples, both whole and not negative"
    )


class SampleOrder:
    """The order under one limit; owns the last window, and with split the fragment counts."""

    def __init__(self, source: SequenceLengths, *, seed: int, order: recipes.Order, max_residues: int) -> None:
        """Raises DataError when the split is empty."""
        if source.num_sequences < 1:
            raise DataError("this split of the corpus has no sequences: nothing to order")
        self.max_residues = max_residues
        self._source, self._seed, self._order = source, seed, order
        self._cut = LONG_SEQUENCES[order.long_sequences]
        self._num_blocks = -(-source.num_sequences // order.block_sequences)
        self._samples_a_block: npt.NDArray[Any] | None = None
        self._starts: tuple[int, Int64] = (-1, np.zeros(0, np.int64))
        self._window: tuple[int, int, Samples | None] = (-1, -1, None)

    @property
    def is_split(self) -> bool:
        """Whether the samples of an epoch depend on the limit."""
        return self._order.long_sequences == "split"

    @property
    def num_windows(self) -> int:
        """Windows an epoch."""
        return -(-self._num_blocks // self._order.window_blocks)

    def num_samples(self, epoch: int) -> int:
        """Samples of an epoch (the same in each)."""
        return int(self.window_starts(epoch)[-1])

    def window_starts(self, epoch: int) -> Int64:
        """How many samples of the epoch precede each window, then the total: int64 [num_windows + 1]."""
        if self._starts[0] != epoch:
            count = self._count_fragments if self.is_split else self._count_sequences
            self._starts = (epoch, np.concatenate([[0], np.cumsum(count(epoch))]).astype(np.int64))
        return self._starts[1]

    def window(self, epoch: int, window: int) -> Samples:
        """The samples of one window, in order."""
        if self._window[:2] != (epoch, window) or self._window[2] is None:
            ids = self._sequences_of(self._blocks_of(epoch, window, window + 1))
            samples = self._cut(ids, self._source.lengths_of(ids), Cut(self._seed, epoch, self.max_residues))
            # Where a crop begins must not matter here: the order of sequences is the same under every limit.
            numbers = samples.starts if self.is_split else 0
            words = draw(self._seed, Purpose.WINDOW_ORDER, epochs=epoch, sample_ids=samples.ids, counters=numbers)
            shuffled = samples.take(_order_of(words[0] << np.uint64(32) | words[1]))
            self._window = (epoch, window, shuffled)
            return shuffled
        return self._window[2]

    def rest(self, position: SamplePosition) -> Iterator[Samples]:
        """All samples from a position on, through the ends of epochs without end, by windows; the first is cut."""
        epoch, consumed = position.epoch, position.consumed
        while True:
            starts = self.window_starts(epoch)
            if consumed > starts[-1]:
                raise CheckpointError(
                    f"position {consumed} lies behind the {starts[-1]} samples of an epoch: the corpus or the order is not that of the checkpoint"
                )
            first = int(np.searchsorted(starts, consumed, side="right")) - 1
            for window in range(first, self.num_windows):
                yield self.window(epoch, window).take(slice(consumed - int(starts[window]), None))
                consumed = int(starts[window + 1])
            epoch, consumed = epoch + 1, 0

    def advanced(self, position: SamplePosition, count: int) -> SamplePosition:
        """The position `count` samples further on."""
        epochs, consumed = divmod(position.consumed + count, self.num_samples(position.epoch))
        return SamplePosition(position.epoch + epochs, consumed)

    def _blocks_of(self, epoch: int, first: int, last: int) -> Int64:
        width = self._order.window_blocks
        slots = np.arange(first * width, min(last * width, self._num_blocks))
        return permute(slots, self._num_blocks, round_keys(self._seed, epoch))

    def _sequences_of(self, blocks: Int64) -> Int64:
        width = self._order.block_sequences
        ids = (blocks[:, None] * width + np.arange(width)).ravel()
        return ids[ids < self._source.num_sequences]

    def _count_sequences(self, epoch: int) -> Int64:
        """Sequences of each window: all are full but the last one and the one that got the last, partial block."""
        width = self._order.window_blocks
        blocks = np.minimum(np.arange(1, self.num_windows + 1) * width, self._num_blocks) - np.arange(self.num_windows) * width
        counts = blocks * self._order.block_sequences
        place = invert(np.array([self._num_blocks - 1]), self._num_blocks, round_keys(self._seed, epoch))
        counts[int(place[0]) // width] -= self._num_blocks * self._order.block_sequences - self._source.num_sequences
        return counts

    def block_sums(self, measure: Callable[[Int64], Int64]) -> npt.NDArray[np.uint64] | npt.NDArray[np.uint32]:
        """For each block the sum of `measure(lengths)` over its sequences, [num_blocks]: reads all lengths once."""
        width, parts = self._order.block_sequences, []
        kind = np.uint32 if width <= _NARROW_BLOCK else np.uint64
        for first in range(0, self._num_blocks, _CHUNK_BLOCKS):
            ids = self._sequences_of(np.arange(first, min(first + _CHUNK_BLOCKS, self._num_blocks)))
            measured = measure(self._source.lengths_of(ids))
            parts.append(np.add.reduceat(measured, np.arange(0, len(ids), width)).astype(kind))
        return np.concatenate(parts)

    def window_sums(self, epoch: int, of_blocks: npt.NDArray[Any]) -> Int64:
        """What `block_sums` gave, summed over the blocks of each window of an epoch: int64 [num_windows]."""
        width, sums = self._order.window_blocks, []
        windows_at_once = max(1, _CHUNK_BLOCKS // width)
        for first in range(0, self.num_windows, windows_at_once):
            blocks = of_blocks[self._blocks_of(epoch, first, first + windows_at_once)]
            sums.append(np.add.reduceat(blocks, np.arange(0, len(blocks), width), dtype=np.int64))
        return np.concatenate(sums)

    def _count_fragments(self, epoch: int) -> Int64:
        if self._samples_a_block is None:
            self._samples_a_block = self.block_sums(lambda lengths: num_fragments(lengths, self.max_residues))
        return self.window_sums(epoch, self._samples_a_block)


def _order_of(keys: npt.NDArray[np.uint64]) -> Int64:
    """What sorts random keys: their lowest bits make room for the index, so that no two are equal and any sort agrees."""
    bits = np.uint64(len(keys).bit_length())
    numbered = (keys >> bits << bits) | np.arange(len(keys), dtype=np.uint64)
    numbered.sort()
    return (numbered & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)


def next_step(order: SampleOrder, position: SamplePosition, phase: recipes.Phase) -> tuple[Samples, SamplePosition]:
    """The samples of one optimizer step, over all ranks, and the position behind them.

    With a budget of residues, a step takes samples in order until the next would exceed it, and one at least.
    """
    parts: list[Samples] = []
    count, residues = 0, 0
    for samples in order.rest(position):
        if phase.global_batch_size is not None:
            fitting = min(len(samples), phase.global_batch_size - count)
        else:
            assert phase.global_batch_residues is not None
            ends = residues + np.cumsum(samples.lengths)
            fitting = int(np.searchsorted(ends, phase.global_batch_residues, side="right"))
            fitting = max(fitting, 1 - count)
            residues = int(ends[fitting - 1]) if fitting else residues
        parts.append(samples.take(slice(fitting)))
        count += fitting
        if fitting < len(samples) or count == phase.global_batch_size:
            break
    return concatenate(parts), order.advanced(position, count)


def enter_phase(order: SampleOrder, position: SamplePosition, *, previous: SampleOrder) -> SamplePosition:
    """Where a phase begins that follows one with another limit.

    Cropping gives one sample a sequence under any limit: the position holds as it is, and every sequence is
    seen once an epoch across the change. Split samples have no counterpart under another limit: the new phase
    begins with the next whole window, so that no sequence is seen twice in an epoch, and the remainder of the
    window that the change fell into (`window_blocks` x `block_sequences` sequences at most) is left out.
    """
    if not order.is_split or order.max_residues == previous.max_residues:
        return position
    window = int(np.searchsorted(previous.window_starts(position.epoch), position.consumed, side="left"))
    if window == order.num_windows:
        return SamplePosition(position.epoch + 1, 0)
    return SamplePosition(position.epoch, int(order.window_starts(position.epoch)[window]))
