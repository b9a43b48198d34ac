"""The folder of a corpus while it is made: who may write there, what an earlier run left, and what stays."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from .. import durable, file_lock, terminal
from ..errors import ConfigError, ResourceError
from ..file_lock import Lock
from .index import INDEX, SPLITS
from .sources import Source

WORK = ".work"
"""Folder within an unfinished corpus; its pieces are never taken over by a later run, its records of complete shards are."""
_SHARD = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}\.h5")


class OccupiedError(ResourceError):
    """Another process is making this corpus."""


@contextlib.contextmanager
def open_workplace(out: Path) -> Iterator[Path]:
    """The working folder within `out`, ours alone; what is of no use to a later run is removed at the end.

    Raises ConfigError when `out` holds something else, OccupiedError when another process is making this corpus.
    """
    created = not out.exists()
    _refuse_foreign(out)
    work = out / WORK
    durable.make_folder(work, output=out)
    with _locked(work / "lock", out):
        _clear(out)
        try:
            yield work
        finally:
            _clear(out)
            _leave(out, created)


def pieces_folder(work: Path) -> Path:
    """Where pieces go."""
    folder = work / "pieces"
    folder.mkdir(exist_ok=True)
    return folder


def stop_file(out: Path) -> Path:
    """The sign by which MPI ranks tell each other to stop."""
    return out / WORK / "stop"


def remove_strays(out: Path, files: Sequence[str]) -> None:
    """Remove the shards of an earlier plan, so that the folder holds exactly what its index lists."""
    for path in out.iterdir():
        if _SHARD.fullmatch(path.name) and path.name not in files:
            path.unlink()


def require_space(out: Path, sources: Sequence[Source]) -> None:
    """Raise the error of a full disk before hours of work rather than after them; the estimate is a low one."""
    # Pieces and shards both hold the residues; half of a plain file may be headers, and text compresses 1.5-fold at least.
    needed = sum(2 * int(source.num_bytes * (1.5 if source.compression else 0.5)) for source in sources)
    free = shutil.disk_usage(out).free
    if free < needed:
        text = f"about {needed / 1e9:.1f} GB are needed at least, {free / 1e9:.1f} GB are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {text}", str(out))


def _refuse_foreign(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; --out must name a folder, new or of a corpus")
    if not out.exists() or (out / INDEX).exists() or (out / WORK).exists():
        return
    foreign = sorted(path.name for path in out.iterdir() if not _SHARD.fullmatch(path.name))
    if foreign:
        raise ConfigError(f"{out} holds other things ({terminal.printable(', '.join(foreign), 80)}); --out must name a new or empty folder")


@contextlib.contextmanager
def _locked(path: Path, out: Path) -> Iterator[None]:
    with path.open("wb") as file:
        match file_lock.take(file.fileno()):
            case Lock.BUSY:
                raise OccupiedError(f"another process is making the corpus {out}")
            case Lock.NO_LOCKS:
                terminal.warn(f"the file system of {out} has no locks: make sure that nothing else writes there")
        yield


def _clear(out: Path) -> None:
    """Remove pieces, signs, and files that a killed process left half written."""
    shutil.rmtree(out / WORK / "pieces", ignore_errors=True)
    stop_file(out).unlink(missing_ok=True)
    for folder in (out, out / WORK):
        for path in folder.iterdir() if folder.is_dir() else ():
            if durable.is_temporary(path):
                path.unlink(missing_ok=True)


def _leave(out: Path, created: bool) -> None:
    """Keep the working folder only where a later run can go on from it."""
    work = out / WORK
    if (out / INDEX).exists() or not any(path.suffix == ".json" for path in work.iterdir()):
        shutil.rmtree(work, ignore_errors=True)
    if created:
        with contextlib.suppress(OSError):
            out.rmdir()
