"""What large model support counts, under the names that torch.cuda.memory_stats has for what it counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

_LARGEST_SMALL_BYTES = 1 << 20
"""The allocator of torch has a pool of its own for what is not larger."""

ALLOCATION_SOURCES = ("freelist", "cudamalloc", "reclaim_one", "reclaim_fragments", "reclaim_all", "cudamalloc_retry")


@dataclass
class Amount:
    """A number that goes up and down."""

    current: int = 0
    peak: int = 0
    allocated: int = 0
    """All that was ever added."""
    freed: int = 0
    """All that was ever taken away."""

    def add(self, number: int) -> None:
        """Up."""
        self.current += number
        self.allocated += number
        self.peak = max(self.peak, self.current)

    def remove(self, number: int) -> None:
        """Down."""
        self.current -= number
        self.freed += number

    def forget(self, *, peak: bool, accumulated: bool) -> None:
        """Begin anew with the peak, or with what was ever added and taken away."""
        if peak:
            self.peak = self.current
        if accumulated:
            self.allocated = self.freed = 0


class Blocks:
    """Number and bytes of some storages, in all and by the allocator's pools."""

    def __init__(self) -> None:
        self.number = {pool: Amount() for pool in ("all", "large_pool", "small_pool")}
        self.bytes = {pool: Amount() for pool in ("all", "large_pool", "small_pool")}

    def add(self, num_bytes: int) -> None:
        """One more."""
        for pool in ("all", _pool_of(num_bytes)):
            self.number[pool].add(1)
            self.bytes[pool].add(num_bytes)

    def remove(self, num_bytes: int) -> None:
        """One less."""
        for pool in ("all", _pool_of(num_bytes)):
            self.number[pool].remove(1)
            self.bytes[pool].remove(num_bytes)

    def forget(self, *, peak: bool = False, accumulated: bool = False) -> None:
        """As `Amount.forget`."""
        for amount in (*self.number.values(), *self.bytes.values()):
            amount.forget(peak=peak, accumulated=accumulated)

    def named(self, name: str) -> dict[str, int]:
        """`name.pool.current` and so on, and the same of `name_bytes`."""
        found: dict[str, int] = {}
        for kind, amounts in ((name, self.number), (f"{name}_bytes", self.bytes)):
            for pool, amount in amounts.items():
                found |= {f"{kind}.{pool}.{field}": value for field, value in vars(amount).items()}
        return found


def _pool_of(num_bytes: int) -> str:
    return "small_pool" if num_bytes <= _LARGEST_SMALL_BYTES else "large_pool"


@dataclass
class Counts:
    """All of it, of one device."""

    on_device: Blocks = field(default_factory=Blocks)
    """Saved storages that are on the device, the device's own and those brought back."""
    pinned: Blocks = field(default_factory=Blocks)
    """Of these the ones that are not moved any more: brought back, or in the hands of the backward pass."""
    on_host: Blocks = field(default_factory=Blocks)
    """Saved storages that have a copy on the host."""
    reclaimed: int = 0
    """Storages that were moved to the host, ever."""
    reclaimed_bytes: int = 0
    fetched_late: int = 0
    """Storages that were brought back when they were needed, not before."""
    sources: Counter[str] = field(default_factory=Counter)
    """By what made room, how often a storage got a place on the device."""

    def named(self) -> dict[str, int]:
        """As torch.cuda.memory_stats gives them."""
        return {
            **self.pinned.named("pinned"),
            "reclaimed": self.reclaimed,
            "reclaimed_bytes": self.reclaimed_bytes,
            **{f"alloc_distribution.{source}": self.sources[source] for source in ALLOCATION_SOURCES},
        }

    def forget(self, *, peak: bool = False, accumulated: bool = False) -> None:
        """Begin anew with the peaks, or with all that only grows."""
        for blocks in (self.on_device, self.pinned, self.on_host):
            blocks.forget(peak=peak, accumulated=accumulated)
        if accumulated:
            self.reclaimed = self.reclaimed_bytes = self.fetched_late = 0
            self.sources.clear()
