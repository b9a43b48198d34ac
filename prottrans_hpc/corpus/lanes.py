"""Lanes: an epoch's text, cut into as many equal parts as a step has sequences, each read on from step to step.

The text is that of all proteins of the epoch in the sample order, whole, special tokens included. Lane l of G is its l-th
part; at step k of the epoch it gives the k-th piece of L tokens. What is left at the end of the epoch, less than G times
L tokens, is left out. All of it is a pure function of corpus, seed, epoch, G and L: a rank finds the pieces of its own
lanes without those of others, and a run its place at any world size.

The tokens of all blocks are counted once (4 bytes a block stay in memory) and summed by window once an epoch; a lane
keeps the next `_AHEAD` proteins, 24 bytes each, so that a window is shuffled again only when they are used up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .. import recipe as recipes
from ..errors import DataError
from .order import SampleOrder, SamplePosition, SequenceLengths

Int64 = npt.NDArray[np.int64]

_AHEAD = 128
_UNLIMITED = 1 << 40
"""As a limit in residues: no protein is cut."""


@dataclass(frozen=True)
class Pieces:
    """Pieces of S lanes: P stretches of proteins' texts, lane after lane, in order."""

    epoch: int
    lanes: Int64
    """[S]"""
    starts: Int64
    """[S]: where the piece begins in its lane's text, tokens."""
    piece_tokens: int
    """Tokens of a piece."""
    carried: Int64
    """[S]: tokens of the piece's first protein that lie before it in the lane."""
    piece_of: Int64
    """[P]: which of the S pieces a stretch is of. One more token than the piece's is there unless the epoch ends behind it."""
    documents: Int64
    """[P]: number of the protein in the order of the epoch."""
    ids: Int64
    """[P]: number of the sequence within the split."""
    lengths: Int64
    """[P]: residues of the whole protein."""
    offsets: Int64
    """[P]: where the stretch begins in the protein's text, tokens."""
    num_tokens: Int64
    """[P]: tokens of the stretch."""


@dataclass(frozen=True)
class _Ahead:
    """Some consecutive proteins of an epoch, from the one that a lane is in."""

    epoch: int
    first: int
    """Number of the first in the order of the epoch."""
    ids: Int64
    lengths: Int64
    borders: Int64
    """[n + 1]: where each begins in the epoch's text, then where the last ends."""

    def covers(self, epoch: int, begin: int, end: int) -> bool:
        """Whether all tokens of a stretch of the epoch's text are of these proteins."""
        return epoch == self.epoch and int(self.borders[0]) <= begin and end <= int(self.borders[-1])


class LaneOrder:
    """The lanes of one phase; owns the token counts and what its lanes read next."""

    def __init__(self, source: SequenceLengths, *, seed: int, order: recipes.Order, num_lanes: int, piece_tokens: int, num_specials: int) -> None:
        """`num_specials` tokens are added to every protein. Raises DataError when an epoch has no piece for every lane."""
        self.num_lanes, self.piece_tokens = num_lanes, piece_tokens
        self._num_specials = num_specials
        self._order = SampleOrder(source, seed=seed, order=replace(order, long_sequences="crop"), max_residues=_UNLIMITED)
        self._tokens_a_block = self._order.block_sums(lambda lengths: lengths + num_specials)
        num_tokens = int(self._tokens_a_block.sum(dtype=np.int64))
        self.steps_per_epoch = num_tokens // (num_lanes * piece_tokens)
        if self.steps_per_epoch < 1:
            raise DataError(
                f"{num_lanes:,} lanes with pieces of {piece_tokens} tokens need {num_lanes * piece_tokens:,} tokens, and the corpus has {num_tokens:,}: "
                f"global_batch_size can be {num_tokens // piece_tokens:,} at most"
            )
        self._windows: tuple[int, Int64] = (-1, np.zeros(1, np.int64))
        self._ahead: dict[int, _Ahead] = {}

    def behind(self, position: SamplePosition) -> SamplePosition:
        """The position one step on; `consumed` counts the steps taken in the epoch."""
        ends = position.consumed + 1 >= self.steps_per_epoch
        return SamplePosition(position.epoch + 1, 0) if ends else SamplePosition(position.epoch, position.consumed + 1)

    def pieces(self, position: SamplePosition, lanes: Int64) -> Pieces:
        """What some lanes read at a position."""
        epoch, start = position.epoch, position.consumed * self.piece_tokens
        extra = 0 if position.consumed + 1 == self.steps_per_epoch else 1
        found, carried = [], np.empty(len(lanes), np.int64)
        for place, lane in enumerate(lanes.tolist()):
            lane_begin = lane * self.steps_per_epoch * self.piece_tokens
            begin = lane_begin + start
            stretches = self._stretches(lane, epoch, begin, begin + self.piece_tokens + extra)
            carried[place] = min(int(stretches[3, 0]), start)
            found.append(np.vstack([np.full(stretches.shape[1], place), stretches]))
        piece_of, documents, ids, lengths, offsets, num_tokens = np.concatenate(found, axis=1) if found else np.zeros((6, 0), np.int64)
        starts = np.full(len(lanes), start, np.int64)
        return Pieces(epoch, lanes, starts, self.piece_tokens, carried, piece_of, documents, ids, lengths, offsets, num_tokens)

    def _stretches(self, lane: int, epoch: int, begin: int, end: int) -> Int64:
        """Rows: documents, ids, lengths, offsets, num_tokens of the proteins that tokens `begin` to `end` of the epoch are of."""
        ahead = self._ahead.get(lane)
        if ahead is None or not ahead.covers(epoch, begin, end):
            ahead = self._ahead[lane] = self._look_ahead(epoch, begin, end)
        first, last = np.searchsorted(ahead.borders, begin, side="right") - 1, np.searchsorted(ahead.borders, end, side="left")
        borders = ahead.borders[first : last + 1]
        begins, ends = np.maximum(borders[:-1], begin), np.minimum(borders[1:], end)
        numbers = ahead.first + np.arange(first, last)
        return np.stack([numbers, ahead.ids[first:last], ahead.lengths[first:last], begins - borders[:-1], ends - begins])

    def _look_ahead(self, epoch: int, begin: int, end: int) -> _Ahead:
        window = int(np.searchsorted(self._window_tokens(epoch), begin, side="right")) - 1
        parts: list[tuple[Int64, Int64]] = []
        first = border = -1
        reached, count = -1, 0
        while reached < end or count < _AHEAD:
            if window == self._order.num_windows:
                break
            samples = self._order.window(epoch, window)
            starts = self._window_tokens(epoch)[window] + np.concatenate([[0], np.cumsum(samples.lengths + self._num_specials)])
            skipped = max(0, int(np.searchsorted(starts, begin, side="right")) - 1)
            taken = max(_AHEAD - count, int(np.searchsorted(starts, end, side="left")) - skipped)
            if first < 0:
                first, border = int(self._order.window_starts(epoch)[window]) + skipped, int(starts[skipped])
            parts.append((samples.ids[skipped : skipped + taken].copy(), samples.lengths[skipped : skipped + taken].copy()))
            count += len(parts[-1][0])
            reached = int(starts[min(skipped + taken, len(samples))])
            window += 1
        ids, lengths = (np.concatenate(column) for column in zip(*parts, strict=True))
        return _Ahead(epoch, first, ids, lengths, border + np.concatenate([[0], np.cumsum(lengths + self._num_specials)]))

    def _window_tokens(self, epoch: int) -> Int64:
        """Where each window begins in the epoch's text: int64 [num_windows]."""
        if self._windows[0] != epoch:
            sums = self._order.window_sums(epoch, self._tokens_a_block)
            self._windows = (epoch, np.cumsum(sums) - sums)
        return self._windows[1]


def enter_phase(order: LaneOrder, position: SamplePosition, *, previous: LaneOrder) -> SamplePosition:
    """Where a phase begins: lanes of another number or length of pieces are other lanes, and begin with the next epoch."""
    same = (order.num_lanes, order.piece_tokens) == (previous.num_lanes, previous.piece_tokens)
    return position if same or not position.consumed else SamplePosition(position.epoch + 1, 0)


def own_lanes(num_lanes: int, rank: int, world_size: int) -> range:
    """The lanes that live on a rank: equally many on each, or one more on some where the world size does not divide them."""
    return range(rank * num_lanes // world_size, (rank + 1) * num_lanes // world_size)
