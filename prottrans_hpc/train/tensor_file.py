"""Tensors to and from one safetensors file: staged in a flat buffer, hashed while written, verified while read.

The format is written by hand (a length, a JSON header, the bytes) because that lets one preallocated buffer
serve every save, and the SHA-256 be computed from the bytes on their way out instead of by reading them back.
It is read by the safetensors library, from memory, after the SHA-256 of exactly these bytes was checked; or, by who needs parts
of it only, one tensor at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from ..memory.page_locked import empty_bytes

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK_BYTES = 8 << 20
_MAX_HEADER_BYTES = 100_000_000
"""What the safetensors library reads."""


class Cancelled(Exception):  # noqa: N818 - a request to stop, not a fault
    """Raised inside `Staging.write` when the writer was told to stop."""


@dataclass(frozen=True)
class Written:
    """What came of writing a file."""

    num_bytes: int
    sha256: str


def file_name(kind: str, index: int, count: int) -> str:
    """The name of one of the files of a checkpoint that hold a kind ("model" or "optimizer") of tensors."""
    return f"{kind}-{index:05d}-of-{count:05d}.safetensors"


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


class Staging:
    """A host buffer as large as one file's tensors, allocated once and filled again at every save."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        # Large elements first, so that every tensor is aligned whatever the mixture of types.
        names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        self._buffer = empty_bytes(sum(map(tensor_bytes, tensors.values())), pinned=on_gpu)
        self._views: dict[str, torch.Tensor] = {}
        offset = 0
        for name in names:
            tensor, end = tensors[name], offset + tensor_bytes(tensors[name])
            header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
            self._views[name] = self._buffer[offset:end].view(tensor.dtype).view(tensor.shape)
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header = struct.pack("<Q", len(text)) + text

    def fits(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether `fill` can take these: the same names, types and shapes."""
        return self._views.keys() == tensors.keys() and all(
            (view.dtype, view.shape) == (tensors[name].dtype, tensors[name].shape) for name, view in self._views.items()
        )

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy the tensors in; from a GPU the copies run asynchronously until the device is synchronised."""
        for name, view in self._views.items():
            view.copy_(tensors[name].detach(), non_blocking=True)

    def write(self, path: Path, cancelled: Callable[[], bool] = lambda: False) -> Written:
        """Write and fsync the file. An OSError names `path`, so that a full disk can be named."""
        digest = hashlib.sha256()
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                for part in (memoryview(self._header), self._buffer.numpy().data):
                    _write_all(descriptor, part, digest.update, cancelled)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error
        return Written(len(self._header) + self._buffer.numel(), digest.hexdigest())


def _write_all(descriptor: int, part: memoryview, update: Callable[[memoryview], None], cancelled: Callable[[], bool]) -> None:
    for start in range(0, len(part), _CHUNK_BYTES):
        if cancelled():
            raise Cancelled
        chunk = part[start : start + _CHUNK_BYTES]
        update(chunk)
        while chunk:
            chunk = chunk[os.write(descriptor, chunk) :]


def read(path: Path, *, sha256: str) -> dict[str, torch.Tensor]:
    """Read a file whose bytes must have this SHA-256. Raises ValueError when they do not; OSError when unreadable."""
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one that was written")
    try:
        tensors: dict[str, torch.Tensor] = safetensors.torch.load(content)
    except (safetensors.SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    return tensors


def read_each(path: Path, *, sha256: str) -> Iterator[tuple[str, torch.Tensor]]:
    """A file's tensors one after the other, so that host memory holds one of them beside what is kept of them.

    Whether the bytes have this SHA-256 shows behind the last: raises ValueError where they have not, and then none of
    them may be used. OSError when unreadable.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        entries = _entries(path, _read_exactly(file, _size_of_header(_read_exactly(file, 8, digest)), digest))
        for name, (dtype, shape, num_bytes) in entries.items():
            content = _read_exactly(file, num_bytes, digest)
            if len(content) < num_bytes:
                break
            yield name, torch.frombuffer(content, dtype=dtype).view(shape) if num_bytes else torch.empty(shape, dtype=dtype)
        while rest := file.read(_CHUNK_BYTES):
            digest.update(rest)
    if digest.hexdigest() != sha256:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one that was written")


def _size_of_header(content: bytearray) -> int:
    (size,) = struct.unpack("<Q", bytes(content).ljust(8, b"\0"))
    return min(int(size), _MAX_HEADER_BYTES)


def _read_exactly(file: FileIO, num_bytes: int, digest: Any) -> bytearray:
    """So many bytes, or those that there are."""
    content = bytearray(num_bytes)
    view, filled = memoryview(content), 0
    while filled < num_bytes and (count := file.readinto(view[filled : filled + _CHUNK_BYTES])):
        digest.update(view[filled : filled + count])
        filled += count
    view.release()
    del content[filled:]
    return content


def _entries(path: Path, text: bytearray) -> dict[str, tuple[torch.dtype, tuple[int, ...], int]]:
    """Type, shape and bytes of every tensor, in the order of their bytes. Raises ValueError where the header is not as this program writes it."""
    dtypes, found, end = {text: dtype for dtype, text in _DTYPES.items()}, {}, 0
    try:
        header = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = dtypes[entry["dtype"]], tuple(map(int, entry["shape"]))
            num_bytes = math.prod(shape) * dtype.itemsize
            if list(entry["data_offsets"]) != [end, end + num_bytes]:
                raise ValueError(f"{name} does not lie where it has to")
            found[name] = dtype, shape, num_bytes
            end += num_bytes
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its header cannot be read") from error
    return found


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors, by its header alone, which is not verified. Raises ValueError; OSError when unreadable."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        text = file.read(min(size, _MAX_HEADER_BYTES))
    try:
        header = json.loads(text)
        return {name: tuple(map(int, entry["shape"])) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its header cannot be read") from error
