"""IBM's interface of large model support (PyTorch 1.1 to 1.5 of WML CE), so that scripts written for it run on stock torch.

`install()` puts the functions on torch.cuda, and what large model support counts into torch.cuda.memory_stats. What is the same and what cannot be, as
it was done inside of torch's allocator then and is done at autograd's door now, is a table in docs/lms.md.
"""

from __future__ import annotations

import operator
import threading
import warnings
from typing import Any

import torch

from .counting import Counts
from .lms import LargeModelSupport

_INTERFACE = ("set_enabled_lms", "get_enabled_lms", "set_limit_lms", "get_limit_lms", "set_size_lms", "get_size_lms", "reclaim_inactive")
_STATISTICS = ("memory_stats", "reset_peak_memory_stats", "reset_accumulated_memory_stats")


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.is_enabled = False


class _Process:
    """The one large model support that IBM's functions set."""

    def __init__(self) -> None:
        self.support = LargeModelSupport(0, limits="device")
        self.of_thread = _OfThread()
        self.replaced: dict[str, Any] = {}


_process: _Process | None = None
_lock = threading.Lock()


def _state() -> _Process:
    global _process
    with _lock:
        if _process is None:
            _process = _Process()
        return _process


def support() -> LargeModelSupport:
    """What the functions here set."""
    return _state().support


def set_enabled_lms(enable: bool) -> None:
    """From now on tensors that this thread saves are under large model support, or no longer. Threads that run forward passes call it each."""
    state = _state()
    if bool(enable) == state.of_thread.is_enabled:
        return
    if enable:
        state.support.__enter__()
    else:
        state.support.__exit__(None, None, None)
    state.of_thread.is_enabled = bool(enable)


def get_enabled_lms() -> bool:
    """Whether they are, in this thread."""
    return _state().of_thread.is_enabled


def set_limit_lms(limit: int) -> None:
    """Bytes that may be allocated on the device, softly: saved tensors are moved where more would be. 0, as at first: all are moved."""
    support().limit_bytes = _num_bytes(limit, "the limit of large model support")


def _num_bytes(number: int, what: str) -> int:
    try:
        found = operator.index(number)
    except TypeError:
        raise TypeError(f"{what} is {number!r}; it must be a whole number of bytes, 0 or more") from None
    if found < 0:
        raise ValueError(f"{what} is {found} bytes; it must be 0 or more")
    return found


def get_limit_lms() -> int:
    """Bytes."""
    return support().limit_bytes


def set_size_lms(size: int) -> None:
    """Bytes that a storage must have to be moved; 1 MiB at first. IBM's last version took this and did nothing with it."""
    support().size_bytes = _num_bytes(size, "the least size for large model support")


def get_size_lms() -> int:
    """Bytes."""
    return support().size_bytes


def reclaim_inactive() -> None:
    """Move every saved tensor to the host that may be moved."""
    support().reclaim_inactive()


def memory_stats(device: Any = None) -> dict[str, Any]:
    """What torch.cuda.memory_stats gives, and what large model support counts. Of CPU tensors the latter alone, of the simulated device."""
    found: dict[str, Any] = dict(_original("memory_stats")(device)) if torch.cuda.is_available() else {}
    counted = _counts(device).named()
    # These two are the allocator's: what it asked the driver for, and how often it had to let go of its cache first.
    counted["alloc_distribution.cudamalloc"] = found.get("num_device_alloc", 0)
    counted["alloc_distribution.cudamalloc_retry"] = found.get("num_alloc_retries", 0)
    return found | counted


def reset_peak_memory_stats(device: Any = None) -> None:
    """Peaks begin anew, torch's and those of large model support."""
    if torch.cuda.is_available():
        _original("reset_peak_memory_stats")(device)
    _counts(device).forget(peak=True)


def reset_accumulated_memory_stats(device: Any = None) -> None:
    """What only grows begins anew, torch's and that of large model support."""
    if torch.cuda.is_available():
        _original("reset_accumulated_memory_stats")(device)
    _counts(device).forget(accumulated=True)


def _counts(device: Any) -> Counts:
    """Of a GPU; where nothing was saved on it, of the device that CPU tensors stand for."""
    gpu, known = _gpu(device) if torch.cuda.is_available() else None, support().devices()
    return support().counts(gpu if gpu in known else torch.device("cpu"))


def _gpu(device: Any) -> torch.device:
    if device is None:
        return torch.device("cuda", torch.cuda.current_device())
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if found.type == "cuda" and found.index is None else found


def _original(name: str) -> Any:
    return _state().replaced.get(name) or getattr(torch.cuda, name)


def install() -> None:
    """Put all this on torch.cuda, once. Where torch brings functions of these names itself (IBM's does), its own stay, with a warning."""
    state = _state()
    if state.replaced:
        return
    if any(hasattr(torch.cuda, name) for name in _INTERFACE):
        warnings.warn("this torch has large model support of its own; prottrans_hpc's is not installed", stacklevel=2)
        return
    state.replaced = {name: getattr(torch.cuda, name) for name in _STATISTICS}
    for name in (*_INTERFACE, *_STATISTICS):
        setattr(torch.cuda, name, globals()[name])


def uninstall() -> None:
    """Take it away again; large model support is off in this thread afterwards."""
    state = _state()
    set_enabled_lms(False)
    if state.replaced:
        for name in _INTERFACE:
            delattr(torch.cuda, name)
        for name, function in state.replaced.items():
            setattr(torch.cuda, name, function)
        state.replaced = {}
