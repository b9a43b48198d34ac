"""Large model support: saved tensors over a byte limit wait in host memory for the backward pass. Gradients stay the same to the bit.

What IBM's patch did in torch's allocator (Allocated, Active, Inactive, Reclaimed) is done on stock torch, between the forward pass that saves a
tensor and the backward pass that wants it, which is the time in which it lies idle:

- A storage counts when one of its tensors is saved, once however many are. When they exceed the limit, those saved first are moved: the backward
  pass wants them last. So with a limit as many bytes travel as exceed it, each storage once, and what is wanted next is still there.
- The backward pass goes the other way. Whenever it takes a tensor, those saved before it are brought back, as far as the limit (or `ahead_bytes`,
  if that is more) has room.
- Parameters and their views, storages below `size_bytes`, and what is no plain tensor of the device (sparse, subclasses) stay where they are. Of a
  DTensor the local part is moved.

On a machine without GPU the same happens to CPU tensors: the limit is one of a device that is only counted, and copies go through the same pool. That
spares no memory; it makes everything but the streams testable anywhere.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections import OrderedDict, defaultdict, deque
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
from .storages import Catalogue, Parameters, View
from .transfer import CudaTransfer, DirectTransfer, Pause, Transfer

P = ParamSpec("P")
R = TypeVar("R")

SIZE_BYTES = 1 << 20
"""Smaller storages stay, unless told otherwise: a copy of less takes longer to begin than to make."""
AHEAD_BYTES = 64 << 20
"""Enough to hide a copy behind the computation of a layer."""
_BEHIND, _FARTHEST = 8, 64
"""Saved storages that are looked at when one may be brought back early."""

_Order = OrderedDict[int, "weakref.ref[Moving]"]


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.tapes: defaultdict[torch.device, Tape] = defaultdict(list)
        self.entered: list[contextlib.AbstractContextManager[None]] = []


class _Device:
    """What is there of one device."""

    def __init__(self, transfer: Transfer) -> None:
        self.transfer = transfer
        self.counts = Counts()
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
        device_type: Literal["cpu", "cuda"] | None = None,
        pause: Pause | None = None,
    ) -> None:
        self.limit_bytes, self.ahead_bytes, self.limits = limit_bytes, ahead_bytes, limits
        self.size_bytes = SIZE_BYTES if size_bytes is None else size_bytes
        self.device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
        self.pool = HostPool(pinned=self.device_type == "cuda")
        self._parameters = Parameters.of(parameters)
        self.hooks = by_parts(Hooks(self._pack, self._unpack), self._parameters.has)
        self._pause = pause
        self._lock = threading.RLock()
        self._catalogue = Catalogue[Moving]()
        self._devices: dict[torch.device, _Device] = {}
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

    def reclaim_inactive(self) -> int:
        """Move all that may be moved to the host, whatever the limit. Returns how many bytes went."""
        with self._up_to_date():
            before = sum(device.counts.reclaimed_bytes for device in self._devices.values())
            for device in self._devices.values():
                self._make_room(device, target_bytes=0)
            return sum(device.counts.reclaimed_bytes for device in self._devices.values()) - before

    def trim(self) -> None:
        """Let go of host memory that nothing is in."""
        with self._up_to_date():
            self.pool.trim()

    @contextlib.contextmanager
    def _up_to_date(self) -> Iterator[None]:
        """Alone, and with everything counted that died since."""
        with self._lock:
            while self._graves:
                self._bury(self._graves.popleft())
            yield

    def _bury(self, grave: Grave) -> None:
        device = self._devices[grave.device]
        device.movable.pop(grave.number, None)
        device.spent.pop(grave.number, None)
        if grave.is_on_device:
            device.counts.on_device.remove(grave.num_bytes)
        if grave.is_pinned:
            device.counts.pinned.remove(grave.num_bytes)
        if grave.block is not None:
            device.counts.on_host.remove(grave.num_bytes)
            self.pool.give(grave.block)

    def _takes(self, tensor: Tensor) -> bool:
        if tensor.device.type != self.device_type or not is_plain(tensor):
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
        device = self._devices.get(tensor.device)
        if device is None:
            transfer = CudaTransfer(tensor.device, self._pause) if self.device_type == "cuda" else DirectTransfer()
            device = self._devices[tensor.device] = _Device(transfer)
        if self.limits == "device" and not len(self._catalogue):
            device.beside_bytes = torch.cuda.memory_allocated(tensor.device) - tensor.untyped_storage().nbytes() if self.device_type == "cuda" else 0
        self._number += 1
        moving = Moving(tensor, self._number, self._graves)
        moving.written_on = device.transfer.written_on()
        tape = moving.tape = self._of_thread.tapes[tensor.device]
        while tape and tape[-1]() is None:
            tape.pop()
        moving.place = len(tape)
        tape.append(weakref.ref(moving))
        self._catalogue.add(moving)
        device.counts.on_device.add(moving.num_bytes)
        device.movable[moving.number] = weakref.ref(moving)
        device.counts.sources[self._make_room(device, self._room(device))] += 1
        return moving

    def _room(self, device: _Device) -> int:
        return max(0, self.limit_bytes - device.beside_bytes)

    def _make_room(self, device: _Device, target_bytes: int) -> str:
        """Have no more on the device than that, if possible. Returns what did it, in the words of the allocator's statistics."""
        while device.bytes > target_bytes and device.spent:
            _, reference = device.spent.popitem(last=False)
            if (moving := reference()) is not None:
                self._drop(device, moving)
        num_moved = 0
        while device.bytes > target_bytes and device.movable:
            _, reference = device.movable.popitem(last=False)
            if (moving := reference()) is not None:
                self._move(device, moving)
                num_moved += 1
        if num_moved == 0:
            return "freelist"
        if not device.movable and num_moved > 1:
            return "reclaim_all"
        return "reclaim_one" if num_moved == 1 else "reclaim_fragments"

    def _move(self, device: _Device, moving: Moving) -> None:
        assert moving.bytes is not None
        block = self.pool.take(moving.num_bytes)
        moving.is_out = device.transfer.out(moving.bytes, block, moving.written_on)
        moving.block, moving.bytes, moving.is_on_device = block, None, False
        device.counts.on_device.remove(moving.num_bytes)
        device.counts.on_host.add(moving.num_bytes)
        device.counts.reclaimed += 1
        device.counts.reclaimed_bytes += moving.num_bytes

    def _drop(self, device: _Device, moving: Moving) -> None:
        assert moving.bytes is not None
        moving.lent = weakref.ref(moving.bytes.untyped_storage())
        moving.bytes, moving.is_on_device, moving.is_pinned = None, False, False
        device.counts.on_device.remove(moving.num_bytes)
        device.counts.pinned.remove(moving.num_bytes)

    def _bring_back(self, device: _Device, moving: Moving) -> None:
        assert moving.block is not None
        moving.bytes, moving.is_back = device.transfer.back(moving.block, moving.num_bytes, moving.is_out, moving.device)
        moving.lent, moving.is_on_device = None, True
        device.counts.on_device.add(moving.num_bytes)
        self._pin(device, moving)

    def _pin(self, device: _Device, moving: Moving) -> None:
        if not moving.is_pinned:
            moving.is_pinned = True
            device.movable.pop(moving.number, None)
            device.counts.pinned.add(moving.num_bytes)

    def _unpack(self, saved: Any) -> Tensor:
        if not isinstance(saved, Saved):
            return AS_IS.unpack(saved)
        moving = saved.moving
        moving.origin.version.check(f"a tensor of shape {list(saved.view.size)}, saved under large model support,")
        with self._up_to_date():
            device = self._devices[moving.device]
            storage = moving.on_device()
            if storage is None:
                device.counts.sources[self._make_room(device, max(0, self._room(device) - moving.num_bytes))] += 1
                device.counts.fetched_late += 1
                self._bring_back(device, moving)
            elif moving.bytes is not None:
                self._pin(device, moving)
            self._fetch_ahead(device, moving)
            self._want(device, moving, saved)
            storage = moving.on_device() if storage is None else storage
            assert storage is not None
            if moving.is_back is not None:
                device.transfer.ready(View(torch.uint8, (moving.num_bytes,), (1,), 0).on(storage), moving.is_back)
            return saved.view.on(storage)

    def _fetch_ahead(self, device: _Device, moving: Moving) -> None:
        # An operation wants what it saved in the order of saving: hence from a few places behind.
        first = min(len(moving.tape), moving.place + _BEHIND) - 1
        for place in range(first, max(-1, first - _FARTHEST), -1):
            other = moving.tape[place]()
            if other is None or other.on_device() is not None or other.round != moving.round:
                continue
            if device.bytes + other.num_bytes > max(self._room(device), self.ahead_bytes):
                return
            device.counts.sources["freelist"] += 1
            self._bring_back(device, other)

    def _want(self, device: _Device, moving: Moving, saved: Saved) -> None:
        """Note that this tensor was had; with its last one in this backward pass the storage need not stay if it has a copy."""
        if saved.round == moving.round:
            saved.round += 1
            moving.num_wanted += 1
        if moving.num_wanted >= moving.num_saved:
            moving.num_wanted, moving.round = 0, moving.round + 1
            if moving.block is not None and moving.bytes is not None:
                device.spent[moving.number] = weakref.ref(moving)
