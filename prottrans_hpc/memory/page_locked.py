"""Host memory that a GPU copies to and from by itself: exactly as much as was asked for, given back when the last tensor in it dies.

torch's own page-locked memory (`pin_memory=True`) takes a power of two for every piece, a third more on average, and keeps what was freed. So plain
pages are had of the system and locked here. They are shared ones: a fork, of whatever library, then leaves them where the GPU knows them.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref
from typing import Any

import torch
from torch import Tensor


def empty_bytes(num_bytes: int, *, pinned: bool) -> Tensor:
    """uint8 with anything in it, on the host. Raises OSError or RuntimeError where there is no more."""
    if not pinned or num_bytes == 0:
        return torch.empty(num_bytes, dtype=torch.uint8)
    pages = mmap.mmap(-1, -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)
    # It is the array that all tensors of this memory hold, and not the mapping, which would be gone when told that it is not needed.
    array = (ctypes.c_ubyte * len(pages)).from_buffer(pages)
    address = ctypes.addressof(array)
    code = int(_driver().cudaHostRegister(address, len(pages), 1))  # cudaHostRegisterPortable: for every device
    if code != 0:
        raise RuntimeError(f"CUDA error: out of memory (cudaHostRegister gave {code} for {num_bytes:,} bytes of host memory)")
    # At the end of the process the driver may have gone first, and all goes back anyway.
    weakref.finalize(array, _release, pages, address).atexit = False
    return torch.frombuffer(array, dtype=torch.uint8, count=num_bytes)


def empty(shape: torch.Size | int, dtype: torch.dtype, *, pinned: bool) -> Tensor:
    """As torch.empty on the host."""
    size = torch.Size((shape,)) if isinstance(shape, int) else shape
    return empty_bytes(size.numel() * dtype.itemsize, pinned=pinned).view(dtype).view(size)


def _release(pages: mmap.mmap, address: int) -> None:
    """`pages` lives until this returns."""
    with contextlib.suppress(RuntimeError):  # a GPU that failed copies nothing any more
        _finish_copies()
    _driver().cudaHostUnregister(address)


def _finish_copies() -> None:
    """Copies that Python has forgotten may be on their way still; any GPU that this process uses may make them."""
    for device in range(torch.cuda.device_count()):
        if torch._C._cuda_hasPrimaryContext(device):  # type: ignore[attr-defined] # of builds with CUDA
            torch.cuda.synchronize(device)


def _driver() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call] # of torch
