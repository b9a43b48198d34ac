"""Compressed input, told by its first bytes, read as one stream that is hashed on the way and refuses damage.

Every format is driven the same way: a decoder a member (gzip members, zstd frames, ...), fed small pieces so that
a bomb cannot fill the memory. A stream that ends inside a member, or is followed by something else, is an error:
several libraries would end quietly there. isal and zstandard are used where they are installed.
"""

from __future__ import annotations

import bz2
import hashlib
import importlib.util
import lzma
import sys
import zlib
from collections.abc import Callable
from io import RawIOBase
from pathlib import Path
from typing import Protocol

from ..errors import DataError, missing_package

_PIECE = 1 << 16  # compressed bytes read at once
_ZSTD_PIECE = 1 << 13  # zstd has no limit on what one call returns: at most 32,768 times this
_XZ_MEMORY = 1 << 30  # bytes; an xz file may ask for 4 GiB of dictionary
MAX_RATIO = 400
"""Sequences compress 2 to 100 times. Beyond this, and 1 GiB, the file is taken for a bomb (gzip reaches 1,032)."""
_BOMB_BYTES = 1 << 30


class Decoder(Protocol):
    """What bz2.BZ2Decompressor does, for any format."""

    @property
    def eof(self) -> bool:
        """The member is complete."""

    @property
    def needs_input(self) -> bool:
        """Nothing more comes without input."""

    @property
    def unused_data(self) -> bytes:
        """Input behind the end of the member."""

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        """Up to `max_length` bytes, where the format can stop there."""


class _Zlib:
    """zlib's decompressobj as a Decoder."""

    def __init__(self) -> None:
        self._object = zlib.decompressobj(wbits=31)
        self._left = b""

    @property
    def eof(self) -> bool:
        return self._object.eof

    @property
    def needs_input(self) -> bool:
        return not self._left

    @property
    def unused_data(self) -> bytes:
        return self._object.unused_data

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        out = self._object.decompress(self._left + data, max(max_length, 0))
        self._left = self._object.unconsumed_tail
        return out


class _Zstd:
    """zstandard's decompressobj as a Decoder."""

    def __init__(self) -> None:
        import zstandard

        self._object = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        self._left = b""

    @property
    def eof(self) -> bool:
        return bool(self._object.eof)

    @property
    def needs_input(self) -> bool:
        return not self._left

    @property
    def unused_data(self) -> bytes:
        return bytes(self._object.unused_data) + self._left

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        data = self._left + data if self._left else data
        out = bytes(self._object.decompress(data[:_ZSTD_PIECE]))
        self._left = data[_ZSTD_PIECE:]
        return out


def _gzip_decoder() -> Decoder:
    if importlib.util.find_spec("isal"):
        from isal import igzip_lib

        decoder: Decoder = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        return decoder
    return _Zlib()


def _zstd_decoder() -> Decoder:
    if not importlib.util.find_spec("zstandard"):
        raise missing_package("zstandard", "fast", "reading a .zst file")
    return _Zstd()


DECODERS: dict[str, Callable[[], Decoder]] = {
    "gzip": _gzip_decoder,
    "zstd": _zstd_decoder,
    "bzip2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY),
}
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}
_SKIPPABLE = tuple(bytes([first]) + b"\x2a\x4d\x18" for first in range(0x50, 0x60))  # zstd frames that hold no data
_STARTS = {name: (magic, *(_SKIPPABLE if name == "zstd" else ())) for magic, name in _MAGIC.items()}
_LONGEST_START = max(map(len, _MAGIC))
_FOREIGN = {
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x9d": "a .Z file",
    b"\x04\x22\x4d\x18": "an lz4 file",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x89HDF": "an HDF5 file",
}


def detect(head: bytes, path: Path) -> str | None:
    """The compression that the first bytes of a file tell, None for plain. Raises DataError for formats not read here."""
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise DataError(f"{path} is {what}, not FASTA: unpack it first (read are plain, .gz, .zst, .bz2 and .xz files)")
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


class Stream:
    """The plain bytes of a file; with `hashing`, `sha256` is that of the file itself once everything has been read."""

    def __init__(self, path: Path, compression: str | None, file: RawIOBase, *, hashing: bool = True) -> None:
        self.path = path
        self.compression = compression
        self.file = file
        self.hashing = hashing
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0
        """Of the file, read so far."""
        self._decoder: Decoder | None = None
        self._has_member = False
        self._input = b""
        self._output = memoryview(b"")
        self._produced = 0

    def read_into(self, buffer: memoryview) -> int:
        """Fill the front of `buffer`; 0 at the end. Raises DataError when the compressed data are damaged or cut short."""
        if self.compression is None:
            num = self.file.readinto(buffer) or 0
            if self.hashing:
                self.sha256.update(buffer[:num])
            self.num_bytes += num
            return num
        if not self._output:
            self._output = memoryview(self._decompress(len(buffer)))
        num = min(len(buffer), len(self._output))
        buffer[:num] = self._output[:num]
        self._output = self._output[num:]
        return num

    def _raw(self) -> bytes:
        data = self.file.read(_PIECE) or b""
        if self.hashing:
            self.sha256.update(data)
        self.num_bytes += len(data)
        return data

    def _decompress(self, limit: int) -> bytes:
        """The next plain bytes, empty at the end."""
        while self._decoder is not None or self._next_member():
            assert self._decoder is not None
            piece = (self._input or self._raw()) if self._decoder.needs_input else b""
            starving = self._decoder.needs_input and not piece
            self._input = b""
            data = self._decode(self._decoder, piece, limit)
            if self._decoder.eof:
                self._input, self._decoder = self._decoder.unused_data.lstrip(b"\x00"), None
            elif starving and not data:
                raise DataError(f"{self.path} is cut short: its {self.compression} data end within a member, after {self.num_bytes} bytes")
            if data:
                self._produced += len(data)
                self._refuse_bomb()
                return data
        return b""

    def _next_member(self) -> bool:
        """Start on another member if there is one; zero padding may stand before it, as on tapes."""
        assert self.compression is not None
        data = self._input
        while len(data) < _LONGEST_START and (more := self._raw()):
            data = (data + more).lstrip(b"\x00") if self._has_member else data + more
        if not data:
            return False
        # A decoder may take what is no member for the beginning of one, and wait for its end.
        if self._has_member and not any(data.startswith(start) or start.startswith(data) for start in _STARTS[self.compression]):
            num = len(data) + self.path.stat().st_size - self.num_bytes
            raise DataError(f"{self.path} is damaged: {num} bytes that are no {self.compression} data follow their end, after {self._produced} good bytes")
        self._input, self._has_member = data, True
        self._decoder = DECODERS[self.compression]()
        return True

    def _decode(self, decoder: Decoder, piece: bytes, limit: int) -> bytes:
        try:
            return decoder.decompress(piece, limit)
        except _decoder_errors() as error:
            after = f" after {self._produced} good bytes," if self._produced else ""
            raise DataError(f"{self.path} is damaged: its {self.compression} data cannot be read{after} before byte {self.num_bytes} ({error})") from error

    def _refuse_bomb(self) -> None:
        if self._produced > _BOMB_BYTES and self._produced > MAX_RATIO * self.num_bytes:
            raise DataError(f"{self.path} expands more than {MAX_RATIO}-fold ({self.num_bytes} bytes to {self._produced}): no sequence file does; not read on")


def _decoder_errors() -> tuple[type[Exception], ...]:
    errors: list[type[Exception]] = [OSError, EOFError, ValueError, zlib.error, lzma.LZMAError]
    # Classes of modules that were imported when their decoder was made, if at all.
    for module, name in (("isal.igzip_lib", "IsalError"), ("zstandard", "ZstdError")):
        if module in sys.modules:
            errors.append(getattr(sys.modules[module], name))
    return tuple(errors)
