"""Live and peak bytes of the storages that a piece of work makes: the allocator's counters, for devices whose allocator has none.

The resident set of a CPU process says nothing about tensors, as the heap keeps what it is given back. So every operation is watched
for what it returns, and a storage counts from then on until nothing refers to it, on whichever thread that happens.
"""

from __future__ import annotations

import threading
import weakref
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageTracker:
    """Counts storages made while it is entered, in the entering thread and in the backward passes that it runs. Enter it once.

    `beside` are tensors that are there anyway (parameters, inputs): a view of one or an operation in place makes nothing new. What is
    made counts as long as it lives, also after the tracker was left. Gradients count, so measure with gradients that exist already
    or pass them, too, to see activations alone.
    """

    def __init__(self, *beside: Tensor, device_type: str = "cpu") -> None:
        self.live_bytes = 0
        """Of storages that are alive now."""
        self.peak_bytes = 0
        """The most that were alive at once, since the start or `reset_peak`."""
        self._device_type = device_type
        self._lock = threading.RLock()  # a storage may die, and call back, while the count is being changed
        self._tracked: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._beside = {tensor.untyped_storage()._cdata for tensor in beside}
        self._held = beside  # so that none of these addresses is given to another storage
        self._mode = _Watching(self)

    def reset_peak(self) -> None:
        """From here on the peak is that of what follows."""
        with self._lock:
            self.peak_bytes = self.live_bytes

    def count(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, once; of a wrapper, nothing, as its parts are seen themselves."""
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.device.type != self._device_type or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        with self._lock:
            known = self._tracked.get(key)
            if key in self._beside or size == 0 or (known is not None and known() is not None):
                return
            self._tracked[key] = weakref.ref(storage, lambda reference: self._forget(key, reference, size))
            self.live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, key: int, reference: weakref.ref[torch.UntypedStorage], size: int) -> None:
        with self._lock:
            self.live_bytes -= size
            if self._tracked.get(key) is reference:  # the address may belong to another storage by now
                del self._tracked[key]

    def __enter__(self) -> StorageTracker:
        self._mode.__enter__()  # type: ignore[no-untyped-call] # of torch
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._mode.__exit__(kind, error, trace)  # type: ignore[no-untyped-call] # of torch


class _Watching(TorchDispatchMode):  # type: ignore[no-untyped-call] # of torch
    """Shows a tracker what every operation returns."""

    def __init__(self, tracker: StorageTracker) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # of torch
        self._tracker = weakref.proxy(tracker)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._tracker.count(leaf)
        return result
