"""Host memory that tensors are moved to: blocks that are used again and again, page-locked where a GPU copies to them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ResourceError
from .page_locked import empty_bytes

_FINEST_BYTES = 4096


@dataclass
class Block:
    """A piece of host memory."""

    bytes: Tensor
    """uint8, of the rounded size."""
    pinned: bool = False
    free_after: Any = None
    """The CUDA event after which it may be written to; None: at once."""


class HostPool:
    """Blocks of a few sizes. Its owner sees to it that one thread at a time is here."""

    def __init__(self) -> None:
        self.bytes_in_use = 0
        """Of blocks that were taken and not given back."""
        self.bytes_in_all = 0
        """Of all blocks there are."""
        self._idle: defaultdict[tuple[bool, int], list[Block]] = defaultdict(list)

    def take(self, num_bytes: int, *, pinned: bool = False) -> Block:
        """A block of at least so many bytes, with anything in it. Raises ResourceError where the host has no more memory."""
        size = rounded(num_bytes)
        idle = self._idle[pinned, size]
        block = idle.pop() if idle else self._new(size, pinned)
        self.bytes_in_use += size
        return block

    def _new(self, size: int, pinned: bool) -> Block:
        try:
            with torch._C._DisableTorchDispatch():  # dispatch modes may be counting what is on the device
                block = Block(empty_bytes(size, pinned=pinned), pinned)
        except (RuntimeError, OSError) as error:
            raise ResourceError(
                f"large model support found no {size:,} bytes of {'page-locked ' if pinned else ''}host memory beside the {self.bytes_in_all:,} that it has: "
                "raise its limit on the device, recompute layers as well, or take smaller micro batches"
            ) from error
        self.bytes_in_all += size
        return block

    def give(self, block: Block) -> None:
        """Take a block back."""
        self.bytes_in_use -= len(block.bytes)
        self._idle[block.pinned, len(block.bytes)].append(block)

    def trim(self) -> None:
        """Let go of the blocks that nobody uses."""
        self.bytes_in_all = self.bytes_in_use
        self._idle.clear()


def rounded(num_bytes: int) -> int:
    """The size of block that so many bytes get: a multiple of an eighth of the power of two below, so that an eighth at most is lost."""
    step = max(_FINEST_BYTES, (1 << max(num_bytes - 1, 1).bit_length()) // 16)
    return -(-num_bytes // step) * step
