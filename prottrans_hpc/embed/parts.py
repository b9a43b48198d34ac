"""The work folder `FILE.h5.parts/`: finished pieces of an extraction, from which a later run goes on.

A part holds the results of consecutive batches of one window in one safetensors file. Its name carries the
window, the batches and the SHA-256 of its bytes, so that one rename commits content and digest together, and a
damaged part is found by its own name. Parts are never changed; `identity.json` says what they are parts of.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from .. import config, durable, file_lock, terminal
from ..errors import IdentityError, ResourceError
from ..file_lock import Lock

IDENTITY = "identity.json"
_LOCK = "lock"
_NAME = re.compile(r"window-(\d{8})-batches-(\d{6})-(\d{6})-([0-9a-f]{64})\.safetensors")
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "I64": np.dtype("<i8")}

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Extract:
    """What came of some proteins of a window."""

    rows: Rows
    """int64 [n]: places in the window of the proteins that were embedded."""
    mean: npt.NDArray[Any] | None
    """[n, H]."""
    residues: npt.NDArray[Any] | None
    """[sum of their lengths, H], in the order of `rows`."""
    failed: Mapping[int, str]
    """Place in the window -> why the protein could not be embedded."""

    @property
    def num_bytes(self) -> int:
        """Memory of the arrays."""
        return sum(array.nbytes for array in (self.mean, self.residues) if array is not None)


def joined(extracts: list[Extract]) -> Extract:
    """Several extracts as one, in their order."""
    means = [extract.mean for extract in extracts if extract.mean is not None]
    residues = [extract.residues for extract in extracts if extract.residues is not None]
    return Extract(
        rows=np.concatenate([extract.rows for extract in extracts]),
        mean=np.concatenate(means) if means else None,
        residues=np.concatenate(residues) if residues else None,
        failed={row: reason for extract in extracts for row, reason in extract.failed.items()},
    )


@dataclass(frozen=True)
class Part:
    """A part file: batches `first` to `last` of a window."""

    path: Path
    window: int
    first: int
    last: int
    sha256: str

    def is_intact(self) -> bool:
        """Whether its bytes are those that were written."""
        return durable.sha256_of(self.path) == self.sha256


@dataclass
class PartsFolder:
    """The open, locked work folder."""

    path: Path
    parts: dict[int, list[Part]] = field(default_factory=dict)
    """Window -> its finished parts."""

    def finished_batches(self, window: int) -> set[int]:
        """The batches of a window that need not be computed again."""
        return {batch for part in self.parts.get(window, ()) for batch in range(part.first, part.last + 1)}

    def write(self, extract: Extract, *, window: int, first: int, last: int) -> None:
        """Commit a part durably. Raises OSError that names the file."""
        tensors = {"rows": extract.rows, "mean": extract.mean, "residues": extract.residues}
        present = {name: np.ascontiguousarray(array) for name, array in tensors.items() if array is not None}
        content = safetensors.numpy.save(present, metadata={"failed": json.dumps({str(row): reason for row, reason in extract.failed.items()})})
        digest = hashlib.sha256(content).hexdigest()
        path = self.path / f"window-{window:08d}-batches-{first:06d}-{last:06d}-{digest}.safetensors"
        durable.write_bytes(path, content)
        self.parts.setdefault(window, []).append(Part(path, window, first, last, digest))


def read_part(part: Part) -> Extract:
    """Map a part whose bytes were checked; the arrays stay on disk until they are used."""
    content = np.memmap(part.path, np.uint8, "r")
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:start].tobytes())
    failed = json.loads(header.pop("__metadata__")["failed"])
    arrays = {name: _array(content[start:], **entry) for name, entry in header.items()}
    return Extract(arrays["rows"], arrays.get("mean"), arrays.get("residues"), {int(row): reason for row, reason in failed.items()})


def _array(data: npt.NDArray[np.uint8], *, dtype: str, shape: list[int], data_offsets: tuple[int, int]) -> npt.NDArray[Any]:
    begin, end = data_offsets
    result: npt.NDArray[Any] = np.frombuffer(data[begin:end], _DTYPES[dtype]).reshape(shape)
    return result


@contextlib.contextmanager
def open_folder(path: Path, identity: Mapping[str, Any]) -> Iterator[PartsFolder]:
    """Make or reopen the work folder, locked against a second process while it is open.

    Raises IdentityError when its parts belong to other proteins, weights or options, and ResourceError when
    another process is at work on it. Parts that are damaged are named and removed.
    """
    with _locked(path):
        recorded = path / IDENTITY
        if recorded.exists():
            check_identity(durable.read_json(recorded), identity, what=str(path), remedy=f"remove the folder {path} to start over")
        elif others := sorted(set(os.listdir(path)) - {_LOCK} - {name.name for name in path.iterdir() if durable.is_temporary(name)}):
            raise IdentityError(f"{path} was not made by `prottrans embed`: it holds {terminal.printable(others[0])}. Choose another --out")
        else:
            durable.write_json(recorded, identity)
        yield PartsFolder(path, _intact_parts(path))


def check_identity(old: Any, new: Mapping[str, Any], *, what: str, remedy: str) -> None:
    """Raise IdentityError with every difference and what to do about it, if there is any."""
    lines = config.differences(old, dict(new))
    if lines:
        raise IdentityError(
            f"{what} holds embeddings of another request; these differ (there -> asked for): {'; '.join(lines)}. "
            f"Ask for the same again, give another --out, or {remedy}"
        )


def _intact_parts(path: Path) -> dict[int, list[Part]]:
    """The parts of an earlier run by window, each verified; leftovers of a killed process are removed."""
    for place in path.iterdir():
        if durable.is_temporary(place):
            place.unlink()
    found = list_parts(path)
    for parts in found.values():
        for part in [part for part in parts if not part.is_intact()]:
            terminal.warn(f"{part.path} is damaged: its SHA-256 is not the one that was written; its proteins are embedded again")
            part.path.unlink()
            parts.remove(part)
    return {window: parts for window, parts in found.items() if parts}


def list_parts(path: Path) -> dict[int, list[Part]]:
    """The parts in a folder by window, as their names tell; their bytes are not looked at."""
    found: dict[int, list[Part]] = {}
    for place in sorted(path.iterdir()):
        if match := _NAME.fullmatch(place.name):
            part = Part(place, int(match[1]), int(match[2]), int(match[3]), match[4])
            found.setdefault(part.window, []).append(part)
    return found


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the folder's lock; the folder may vanish between being made and being locked, then it is made again."""
    while True:
        durable.make_folder(path, output=path.with_name(path.name.removesuffix(".parts")))
        try:
            descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:
            continue
        try:
            _lock(descriptor, path)
            if _is_still(path / _LOCK, descriptor):
                remove_leftovers(path)
                yield
                return
        finally:
            os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    match file_lock.take(descriptor):
        case Lock.BUSY:
            raise ResourceError(f"another process is writing embeddings in {path}; wait for it, or give another --out")
        case Lock.NO_LOCKS:
            terminal.warn(f"the file system of {path} has no locks: make sure that no second process writes the same file")


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def remove_leftovers(path: Path) -> None:
    """Delete what killed processes left beside the output of the work folder `path`: half-written files, doomed folders."""
    target = path.name.removesuffix(".parts")
    for place in path.parent.iterdir():
        if durable.is_temporary(place) and place.name.startswith((f".{target}.tmp-", f".{path.name}.tmp-")):
            if place.is_dir():
                shutil.rmtree(place, ignore_errors=True)
            else:
                place.unlink(missing_ok=True)
