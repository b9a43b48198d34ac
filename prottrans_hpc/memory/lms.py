"""Large model support: saved tensors over a byte limit wait in host memory for the backward pass. Gradients stay the same to the bit.

What IBM's patch did in torch's allocator (Allocated, Active, Inactive, Reclaimed) is done on stock torch, between the forward pass that saves a
tensor and the backward pass that wants it, which is the time in which it lies idle:

- A storage counts when one of its tensors is saved, once however many are. When they exceed the limit, those saved first are moved: the backward
  pass wants them last. So with a limit as many bytes travel as exceed it, each storage once, and what is wanted next is still there.
- The backward pass goes the other way. Whenever it takes a tensor, those saved before it are brought back, as far as the limit (or `ahead_bytes`,
  if that is more) has room.
- Parameters and their views, storages below `size_bytes`, and what is no plain tensor of the device (sparse, subclasses) stay where they are. Of a
  DTensor the local part is moved.

To CPU tensors the same happens, on a machine with a GPU or without: the limit is one of a device that is only counted, and copies go through the same
pool. That spares no memory; it makes everything but the streams testable anywhere.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from .counting import Counts
from .divided import by_parts
from .hooks import AS_IS, Hooks, applied, is_plain
from .host_pool import HostPool
from .moving import Grave, Moving, Saved, Tape
from .residence import Residence
from .storages import Catalogue, Parameters, View
from .transfer import CudaTransfer, DirectTransfer, Pause

P = ParamSpec("P")
R = TypeVar("R")

SIZE_BYTES = 1 << 20
"""Smaller storages stay, unless told otherwise: a copy of less takes longer to begin than to make."""
AHEAD_BYTES = 64 << 20
"""Enough to hide a copy behind the computation of a layer."""


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.tapes: defaultdict[torch.device, Tape] = defaultdict(list)
        self.entered: list[contextlib.AbstractContextManager[None]] = []


class LargeModelSupport:
    """Context manager and decorator around forward passes; backward passes may run outside. Re-entrant, and for any number of threads.

    `limit_bytes` is what saved tensors may take on the device, or with `limits="device"` all that is allocated there. `parameters` need be given
    only where they are saved as something else than themselves or views.
    """

    def __init__(
        self,
        limit_bytes: int = 0,
        *,
        size_bytes: int | None = None,
        ahead_bytes: int = AHEAD_BYTES,
        limits: Literal["saved", "device"] = "saved",
        parameters: Iterable[Tensor] | Parameters = (),
        pause: Pause | None = None,
    ) -> None:
        self.limit_bytes, self.ahead_bytes, self.limits = limit_bytes, ahead_bytes, limits
        self.size_bytes = SIZE_BYTES if size_bytes is None else size_bytes
        self.pool = HostPool()
        self._parameters = Parameters.of(parameters)
        self.hooks = by_parts(Hooks(self._pack, self._unpack), self._parameters.has)
        self._pause = pause
        self._lock = threading.RLock()
        self._catalogue = Catalogue[Moving]()
        self._devices: dict[torch.device, Residence] = {}
        self._graves: deque[Grave] = deque()
        self._of_thread = _OfThread()
        self._number = 0

    def __enter__(self) -> LargeModelSupport:
        context = applied(self.hooks)
        context.__enter__()
        self._of_thread.entered.append(context)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._of_thread.entered.pop().__exit__(kind, error, trace)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """The function with large model support around each call."""

        @functools.wraps(function)
        def supported(*arguments: P.args, **named: P.kwargs) -> R:
            with self:
                return function(*arguments, **named)

        return supported

    def counts(self, device: torch.device | None = None) -> Counts:
        """Of one device, by default the first that tensors were saved on; changes go on in it."""
        with self._up_to_date():
            found = next(iter(self._devices.values()), None) if device is None else self._devices.get(device)
            return found.counts if found else Counts()

    def devices(self) -> list[torch.device]:
        """Those that tensors were saved on."""
        with self._lock:
            return list(self._devices)

    def reclaim_inactive(self) -> int:
        """Move all that may be moved to the host, whatever the limit, and wait until its memory is free. Returns how many bytes went."""
        with self._up_to_date():
            before = sum(device.counts.reclaimed_bytes for device in self._devices.values())
            for device in self._devices.values():
                device.make_room(0, self.ahead_bytes)
                device.departures.wait_until(0)
            return sum(device.counts.reclaimed_bytes for device in self._devices.values()) - before

    def trim(self) -> None:
        """Let go of host memory that nothing is in."""
        with self._up_to_date():
            self.pool.trim()

    @contextlib.contextmanager
    def _up_to_date(self) -> Iterator[None]:
        """Alone, and with everything counted that died or was copied since."""
        with self._lock:
            while self._graves:
                grave = self._graves.popleft()
                self._devices[grave.device].bury(grave)
            for device in self._devices.values():
                device.departures.let_go()
            yield

    def _takes(self, tensor: Tensor) -> bool:
        if tensor.device.type not in ("cpu", "cuda") or not is_plain(tensor):
            return False
        return tensor.untyped_storage().nbytes() >= max(self.size_bytes, 1) and not self._parameters.has(tensor)

    def _pack(self, tensor: Tensor) -> Any:
        if not self._takes(tensor):
            return AS_IS.pack(tensor)
        with self._up_to_date():
            moving = self._catalogue.find(tensor) or self._begin(tensor)
            moving.num_saved += 1
            return Saved(moving, View.of(tensor))

    def _begin(self, tensor: Tensor) -> Moving:
        device = self._device_of(tensor)
        if self.limits == "device" and not len(self._catalogue):
            device.beside_bytes = _beside(tensor, device)
        self._number += 1
        moving = Moving(tensor, self._number, self._graves)
        moving.written = device.transfer.written()
        tape = moving.tape = self._of_thread.tapes[tensor.device]
        while tape and tape[-1]() is None:
            tape.pop()
        moving.place = len(tape)
        tape.append(weakref.ref(moving))
        self._catalogue.add(moving)
        device.settle(moving)
        device.counts.sources[device.make_room(self._room(device), self.ahead_bytes)] += 1
        return moving

    def _device_of(self, tensor: Tensor) -> Residence:
        """Each tensor goes as its own device has it, whatever others the machine has."""
        device = self._devices.get(tensor.device)
        if device is None:
            transfer = CudaTransfer(tensor.device, self._pause) if tensor.is_cuda else DirectTransfer()
            device = self._devices[tensor.device] = Residence(transfer, self.pool)
        return device

    def _room(self, device: Residence) -> int:
        return max(0, self.limit_bytes - device.beside_bytes)

    def _unpack(self, saved: Any) -> Tensor:
        if not isinstance(saved, Saved):
            return AS_IS.unpack(saved)
        moving = saved.moving
        moving.origin.version.check(f"a tensor of shape {list(saved.view.size)}, saved under large model support,")
        with self._up_to_date():
            device = self._devices[moving.device]
            storage = moving.on_device()
            if storage is None:
                device.counts.sources[device.make_room(max(0, self._room(device) - moving.num_bytes), self.ahead_bytes)] += 1
                device.counts.fetched_late += 1
                device.bring_back(moving)
            elif moving.bytes is not None:
                device.pin(moving)
            device.fetch_ahead(moving, max(self._room(device), self.ahead_bytes))
            device.want(moving, saved)
            storage = moving.on_device() if storage is None else storage
            assert storage is not None
            if moving.is_back is not None:
                device.transfer.ready(View(torch.uint8, (moving.num_bytes,), (1,), 0).on(storage), moving.is_back)
            return saved.view.on(storage)


def _beside(tensor: Tensor, device: Residence) -> int:
    """What is allocated on a GPU beside the first tensor that is saved, and beside what still goes."""
    if not tensor.is_cuda:
        return 0
    return torch.cuda.memory_allocated(tensor.device) - tensor.untyped_storage().nbytes() - device.departures.bytes
