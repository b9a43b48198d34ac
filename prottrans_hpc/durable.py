"""The save protocol for everything that a later run trusts: checkpoints, shards, indexes, embeddings.

Write into a temporary sibling, fsync the file, rename, fsync the directory. A folder gets a manifest with the
SHA-256 of each file, written last. So a reader finds the old state or the new one, never a mixture, after a
kill, a full disk or a power cut; and a flipped bit is found, which none of torch.load, safetensors and HDF5
would do (measured: over 99 % of single-bit flips load silently). Nothing is ever appended to in place.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DataError, OutputError

MANIFEST = "manifest.json"
_TEMPORARY = ".tmp-"
_NO_PLACE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG)
"""Nothing can be written under such a name. Of an input the same numbers say that it is not there."""


@dataclass(frozen=True)
class FileSeal:
    """What a manifest says about a file."""

    num_bytes: int
    sha256: str


def temporary_sibling(path: Path, token: str | None = None) -> Path:
    """A hidden name beside `path`, on the same file system so that a rename is atomic; `token` None makes it a fresh one."""
    return path.with_name(f".{path.name}{_TEMPORARY}{token or secrets.token_hex(6)}")


def is_temporary(path: Path) -> bool:
    """Whether a name was made by `temporary_sibling`: the leftover of a killed process, never to be read."""
    return path.name.startswith(".") and _TEMPORARY in path.name


def fsync_path(path: Path) -> None:
    """Force a file or directory to storage, the file's data or the directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems refuse fsync on a directory; for data it is always an error.
        if not (error.errno in (errno.EINVAL, errno.ENOTSUP) and stat.S_ISDIR(os.fstat(descriptor).st_mode)):
            raise
    finally:
        os.close(descriptor)


def rename_into_place(temporary: Path, final: Path) -> None:
    """Rename and fsync the parent; the rename is what makes the new state visible."""
    os.replace(temporary, final)
    fsync_path(final.parent)


def make_folder(folder: Path, *, output: Path) -> None:
    """Make a folder, and those above it, for an `output` that a user asked for. Raises OutputError that names it when something is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _about(output, error) from error


def _about(output: Path, error: OSError) -> OSError:
    """The error as one of the `output` itself, which the user knows, not of a temporary beside it."""
    if error.errno in _NO_PLACE:
        return OutputError(f"{output} cannot be written: {_hindrance(output) or os.strerror(error.errno)}. Choose another place")
    return OSError(error.errno, os.strerror(error.errno or 0), str(output))


def _hindrance(output: Path) -> str | None:
    """What stands where a file is to be, or a folder above it."""
    if os.path.isdir(output):
        return "a folder of this name is there"
    files = (parent for parent in reversed(output.parents) if os.path.lexists(parent) and not os.path.isdir(parent))
    return next((f"{parent} is no folder" for parent in files), None)


@contextlib.contextmanager
def new_file(final: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on success it becomes `final` durably, on failure it is removed. Folders above it are made.

    A failed write carries no file name of its own (and h5py's text is for programmers), or a name that is nobody's: the OSError names `final`.
    """
    if not os.path.isdir(final.parent):
        make_folder(final.parent, output=final)
    temporary = temporary_sibling(final)
    try:
        yield temporary
        fsync_path(temporary)
        rename_into_place(temporary, final)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, temporary, str(temporary)):
            raise _about(final, error) from error
        raise


def write_bytes(final: Path, content: bytes) -> None:
    """Replace a small file durably."""
    with new_file(final) as temporary:
        temporary.write_bytes(content)


def write_json(final: Path, value: Any) -> None:
    """Replace a JSON file durably; keys keep their order so that equal values give equal bytes."""
    write_bytes(final, _json_bytes(value))


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Read a JSON file; a damaged one is a DataError that names it."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: it is not readable JSON ({error})") from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it is sealed with a manifest and becomes `final`. Folders above it are made."""
    temporary = temporary_sibling(final)
    make_folder(temporary, output=final)
    try:
        yield temporary
        seal_folder(temporary)
        rename_into_place(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def seal_folder(folder: Path, known: Mapping[str, FileSeal] | None = None) -> None:
    """Fsync every file of `folder` and write its manifest. A folder within it is sealed by itself.

    `known` are files that their writers have forced to storage, names too, and what they wrote: these are not touched again.
    """
    sealed = dict(known or {})
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_file() and entry.name != MANIFEST)
    for name in names:
        if name not in sealed:
            path = folder / name
            digest = sha256_of(path)
            fsync_path(path)
            sealed[name] = FileSeal(path.stat().st_size, digest)
    write_json(folder / MANIFEST, {"files": {name: {"bytes": sealed[name].num_bytes, "sha256": sealed[name].sha256} for name in names}})


def read_manifest(folder: Path) -> dict[str, FileSeal]:
    """What the manifest of a sealed folder says. Raises FileNotFoundError, or DataError when it is damaged."""
    path = folder / MANIFEST
    content = path.read_bytes()
    try:
        values = json.loads(content)
        files = {str(name): FileSeal(int(entry["bytes"]), str(entry["sha256"])) for name, entry in values["files"].items()}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if content != _json_bytes(values):  # it has no checksum of its own; a changed blank is a damaged byte too
        raise DataError(f"{path} is damaged: it is not as this program writes it")
    return files


def folder_problems(folder: Path) -> list[str]:
    """What is wrong with a sealed folder, one line a fault; an empty list means every byte is as written."""
    try:
        expected = read_manifest(folder)
        present = {path.name for path in folder.iterdir()} - {MANIFEST}
    except (FileNotFoundError, NotADirectoryError):
        return [f"{folder / MANIFEST} is missing: the save did not finish"]
    except DataError as error:
        return [str(error)]
    problems = [f"{folder / name} is not in the manifest" for name in sorted(present - expected.keys())]
    for name, seal in expected.items():
        path = folder / name
        if name not in present:
            problems.append(f"{path} is missing")
        elif path.stat().st_size != seal.num_bytes:
            problems.append(f"{path} has {path.stat().st_size} bytes, {seal.num_bytes} were written")
        elif sha256_of(path) != seal.sha256:
            problems.append(f"{path} is damaged: its SHA-256 is not the one that was written")
    return problems


def remove_folder(folder: Path) -> None:
    """Delete a folder so that a kill half way cannot leave a partial one under its name."""
    doomed = temporary_sibling(folder)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)
