"""What there is of one device under large model support: which saved storages are on it, which go to the host next, and which come back."""

from __future__ import annotations

import weakref
from collections import OrderedDict

from .counting import Counts
from .departures import Departures
from .host_pool import HostPool
from .moving import Grave, Moving, Saved
from .transfer import Transfer

_BEHIND, _FARTHEST = 8, 64
"""Saved storages that are looked at when one may be brought back early."""

_Order = OrderedDict[int, "weakref.ref[Moving]"]


class Residence:
    """Of one device. Its owner sees to it that one thread at a time is here."""

    def __init__(self, transfer: Transfer, pool: HostPool) -> None:
        self.transfer, self.pool = transfer, pool
        self.counts = Counts()
        self.departures = Departures()
        self.movable: _Order = OrderedDict()
        """On the device alone, the first saved first."""
        self.spent: _Order = OrderedDict()
        """Brought back, had by the backward pass and alive all the same (retain_graph): dropping them costs no copy."""
        self.beside_bytes = 0
        """On the device when the first tensor was saved, if the limit is one of the whole device."""

    @property
    def bytes(self) -> int:
        """Of saved storages that are there."""
        return self.counts.on_device.bytes["all"].current

    def settle(self, moving: Moving) -> None:
        """A storage that is being saved is here."""
        self.counts.on_device.add(moving.num_bytes)
        self.movable[moving.number] = weakref.ref(moving)

    def bury(self, grave: Grave) -> None:
        """One less."""
        self.movable.pop(grave.number, None)
        self.spent.pop(grave.number, None)
        if grave.is_on_device:
            self.counts.on_device.remove(grave.num_bytes)
        if grave.is_pinned:
            self.counts.pinned.remove(grave.num_bytes)
        if grave.block is not None:
            self.counts.on_host.remove(grave.num_bytes)
            self.pool.give(grave.block)

    def make_room(self, target_bytes: int, most_under_way: int) -> str:
        """Have no more on the device than that, if possible. Returns what did it, in the words of the allocator's statistics.

        What goes takes memory until it is there: no more than `most_under_way` bytes are on their way at a time, or one storage that is larger.
        """
        while self.bytes > target_bytes and self.spent:
            _, reference = self.spent.popitem(last=False)
            if (moving := reference()) is not None:
                self._drop(moving)
        num_moved = 0
        while self.bytes > target_bytes and self.movable:
            _, reference = self.movable.popitem(last=False)
            if (moving := reference()) is not None:
                self._move(moving, most_under_way)
                num_moved += 1
        if num_moved == 0:
            return "freelist"
        if not self.movable and num_moved > 1:
            return "reclaim_all"
        return "reclaim_one" if num_moved == 1 else "reclaim_fragments"

    def _move(self, moving: Moving, most_under_way: int) -> None:
        assert moving.bytes is not None
        self.departures.wait_until(max(0, most_under_way - moving.num_bytes))
        block = self.pool.take(moving.num_bytes, pinned=self.transfer.pinned)
        moving.is_out = self.transfer.out(moving.bytes, block, moving.written)
        self.departures.add(moving.is_out, moving.bytes)
        moving.block, moving.bytes, moving.is_on_device = block, None, False
        self.counts.on_device.remove(moving.num_bytes)
        self.counts.on_host.add(moving.num_bytes)
        self.counts.reclaimed += 1
        self.counts.reclaimed_bytes += moving.num_bytes

    def _drop(self, moving: Moving) -> None:
        assert moving.bytes is not None
        moving.lent = weakref.ref(moving.bytes.untyped_storage())
        moving.bytes, moving.is_on_device, moving.is_pinned = None, False, False
        self.counts.on_device.remove(moving.num_bytes)
        self.counts.pinned.remove(moving.num_bytes)

    def bring_back(self, moving: Moving) -> None:
        """From the host."""
        assert moving.block is not None
        moving.bytes, moving.is_back = self.transfer.back(moving.block, moving.num_bytes, moving.is_out, moving.device)
        moving.lent, moving.is_on_device = None, True
        self.counts.on_device.add(moving.num_bytes)
        self.pin(moving)

    def pin(self, moving: Moving) -> None:
        """It is not moved any more."""
        if not moving.is_pinned:
            moving.is_pinned = True
            self.movable.pop(moving.number, None)
            self.counts.pinned.add(moving.num_bytes)

    def fetch_ahead(self, moving: Moving, most_bytes: int) -> None:
        """Bring back what will be wanted after this storage, as far as there is room."""
        # An operation wants what it saved in the order of saving: hence from a few places behind.
        first = min(len(moving.tape), moving.place + _BEHIND) - 1
        for place in range(first, max(-1, first - _FARTHEST), -1):
            other = moving.tape[place]()
            if other is None or other.on_device() is not None or other.round != moving.round:
                continue
            if self.bytes + other.num_bytes > most_bytes:
                return
            self.counts.sources["freelist"] += 1
            self.bring_back(other)

    def want(self, moving: Moving, saved: Saved) -> None:
        """Note that this tensor was had; with its last one in this backward pass the storage need not stay if it has a copy."""
        if saved.round == moving.round:
            saved.round += 1
            moving.num_wanted += 1
        if moving.num_wanted >= moving.num_saved:
            moving.num_wanted, moving.round = 0, moving.round + 1
            if moving.block is not None and moving.bytes is not None:
                self.spent[moving.number] = weakref.ref(moving)
