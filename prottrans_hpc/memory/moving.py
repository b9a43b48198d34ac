"""One saved storage under large model support: on the device, on the host, or both; and the order in which they were saved."""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .host_pool import Block
from .storages import HasOrigin, Origin, View

Tape = list["weakref.ref[Moving]"]
"""What one thread saved, in that order; the backward pass wants it from the end."""


@dataclass(frozen=True)
class Grave:
    """What a storage that nobody needs any more leaves behind."""

    device: torch.device
    num_bytes: int
    number: int
    block: Block | None
    is_on_device: bool
    is_pinned: bool


class Moving(HasOrigin):
    """A saved storage. Whatever happens to it, happens under the lock of its owner; its end alone may come at any moment, on any thread."""

    _graves: deque[Grave] | None = None
    """None: it was never made whole."""

    def __init__(self, tensor: Tensor, number: int, graves: deque[Grave]) -> None:
        super().__init__(Origin(tensor))
        storage = tensor.untyped_storage()
        self.number, self.device, self.num_bytes = number, tensor.device, storage.nbytes()
        self.tape: Tape = []
        self.place = 0
        """On the tape."""
        self.bytes: Tensor | None = View(torch.uint8, (self.num_bytes,), (1,), 0).on(storage)
        """On the device, as one row; None: not there, or held by others only."""
        self.lent: weakref.ref[torch.UntypedStorage] | None = None
        """What was brought back and is held by others only."""
        self.written: Any = None
        self.block: Block | None = None
        """On the host."""
        self.is_out: Any = None
        self.is_back: Any = None
        self.is_on_device, self.is_pinned = True, False
        """As counted."""
        self.num_saved = self.num_wanted = self.round = 0
        """Tensors saved with this storage, and how many of them this backward pass has had."""
        self._graves = graves

    def on_device(self) -> torch.UntypedStorage | None:
        """Its storage, if it is there."""
        if self.bytes is not None:
            return self.bytes.untyped_storage()
        return self.lent() if self.lent is not None else None

    def __del__(self) -> None:
        # No lock: this may run while this very thread holds it. What is left is buried by the next who does.
        if self._graves is None:
            return
        if self.is_back is not None and self.block is not None:
            self.block.free_after = self.is_back
        elif self.block is not None:
            self.block.free_after = self.is_out
        self._graves.append(Grave(self.device, self.num_bytes, self.number, self.block, self.is_on_device, self.is_pinned))


@dataclass
class Saved:
    """What autograd holds in place of a tensor."""

    moving: Moving
    view: View
    round: int = 0
    """Backward passes that had it."""
