"""Copies between device and host: at once on CPUs, on streams of their own beside the computation on GPUs.

Of each direction there is one stream. A copy out begins when what wrote the tensor is done, a copy back when the copy out is done and
when the memory that it goes to is free; who reads a tensor that was brought back waits for the copy, on the GPU and not in Python. The caching
allocator is told which streams still use memory that was brought back; what goes out is held until it is there (`Departures`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .host_pool import Block

Pause = Callable[[str], None]
"""Called with "out", "back" or "ready" on the stream that goes on then: tests put delays there that would show a missing wait."""


class Moment(Protocol):
    """When a device has done all that it was told before: a CUDA event."""

    def query(self) -> bool:
        """Whether that was."""

    def synchronize(self) -> None:
        """Wait for it."""


class Transfer(Protocol):
    """How tensors of one device travel. All are uint8, one row."""

    pinned: bool
    """Whether blocks of host memory have to be page-locked."""

    def written(self) -> Any:
        """When the tensor that is being saved is written, for `out`."""

    def out(self, device_bytes: Tensor, block: Block, written: Any) -> Moment | None:
        """Copy to a block of host memory, and when that is done: the tensor has to live until then. None: it is."""

    def back(self, block: Block, num_bytes: int, is_out: Any, device: torch.device) -> tuple[Tensor, Any]:
        """Copy to new memory of the device, and what says when that is done."""

    def ready(self, device_bytes: Tensor, is_back: Any) -> None:
        """What is computed from now on sees the copy."""


class DirectTransfer:
    """Copies that are done when the call returns: between two places of host memory."""

    pinned = False

    def written(self) -> None:
        """It is."""

    def out(self, device_bytes: Tensor, block: Block, written: None) -> None:
        """Copy, unseen by dispatch modes, which may be counting what is on the device."""
        with torch._C._DisableTorchDispatch():
            block.bytes[: len(device_bytes)].copy_(device_bytes)

    def back(self, block: Block, num_bytes: int, is_out: None, device: torch.device) -> tuple[Tensor, None]:
        """Copy. Of this the modes see the result."""
        result = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        with torch._C._DisableTorchDispatch():
            result.copy_(block.bytes[:num_bytes])
        return result, None

    def ready(self, device_bytes: Tensor, is_back: None) -> None:
        """It is."""


class CudaTransfer:
    """Asynchronous copies of one GPU, to and from page-locked memory."""

    pinned = True

    def __init__(self, device: torch.device, pause: Pause | None = None) -> None:
        self._device = device
        self._outward, self._inward = torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # of torch
        self._pause = pause or (lambda _where: None)

    def written(self) -> torch.cuda.Event:
        """When the stream that computes in this thread has done what it was told so far, and nothing that it is told until the tensor is moved."""
        now: torch.cuda.Event = torch.cuda.current_stream(self._device).record_event()
        return now

    def out(self, device_bytes: Tensor, block: Block, written: torch.cuda.Event) -> torch.cuda.Event:
        """Queue the copy. The allocator is not told of it: its owner holds the tensor until it is done, and then the memory is free at once."""
        self._outward.wait_event(written)
        if block.free_after is not None:
            self._outward.wait_event(block.free_after)
        with torch.cuda.stream(self._outward):
            self._pause("out")
            block.bytes[: len(device_bytes)].copy_(device_bytes, non_blocking=True)
            done: torch.cuda.Event = self._outward.record_event()
        return done

    def back(self, block: Block, num_bytes: int, is_out: torch.cuda.Event, device: torch.device) -> tuple[Tensor, torch.cuda.Event]:
        """Queue the copy behind the one out. The memory comes from the pool of the present stream, whose earlier work may still use it."""
        result = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self._inward.wait_stream(torch.cuda.current_stream(self._device))
        self._inward.wait_event(is_out)
        with torch.cuda.stream(self._inward):
            self._pause("back")
            result.copy_(block.bytes[:num_bytes], non_blocking=True)
            done = self._inward.record_event()
        result.record_stream(self._inward)
        return result, done

    def ready(self, device_bytes: Tensor, is_back: torch.cuda.Event) -> None:
        """The present stream waits."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(is_back)
        device_bytes.record_stream(stream)
        self._pause("ready")
