"""The folder on a node's own disk that holds a staged corpus: its name, owner, locks, journal, space and removal.

`DISK/prottrans-UID/ID/` holds the shards, index.json (written last, so that the folder is a corpus of its own) and
staged.jsonl, which says of every shard that it was verified and how the file looked then. Beside it lie two lock files:
ID.lock is shared by all who read the copy, ID.copying is held by the one who writes it. The folder is for its owner only.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import file_lock, json_lines, terminal
from ..errors import ConfigError, ResourceError
from ..file_lock import Lock
from .index import Index, ShardEntry

JOURNAL = "staged.jsonl"


def staged_folder(index: Index, disk: str, environment: Mapping[str, str]) -> Path:
    """Where a corpus lies on this node; `disk` may hold environment variables, which are those of the node. Raises ConfigError."""
    try:
        path = Path(string.Template(disk).substitute(environment))
    except KeyError as error:
        raise ConfigError(f"node.local_disk_path is {disk!r}, but the environment variable {error.args[0]} is not set on this node") from None
    except ValueError:
        raise ConfigError(f"node.local_disk_path is {disk!r}, in which a $ is not followed by a variable's name; $$ stands for a dollar sign") from None
    if not path.is_absolute():
        raise ConfigError(f"node.local_disk_path is {disk!r}, here {str(path)!r}; it must be an absolute path")
    return path / f"prottrans-{os.getuid()}" / index.sha256[:16]


def make_private(folder: Path) -> None:
    """Make the folder of one user, and the one above it. Raises ResourceError when the disk is not there or others may look in."""
    disk = folder.parent
    if not disk.parent.is_dir():
        raise ResourceError(
            f"this node has no {disk}: node.local_disk_path of the machine profile must be a folder, or the name of one in a folder that exists"
        )
    disk.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ResourceError(
            f"{folder} on this node belongs to another user, is open to others or is no folder: remove it, or choose another node.local_disk_path"
        )


def lock_file(folder: Path, kind: str) -> int:
    """Open the lock file `kind` ("lock", "copying") beside a staged corpus."""
    return os.open(folder.with_name(f"{folder.name}.{kind}"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def remove_unused(folder: Path) -> bool:
    """Delete a staged corpus that no process reads or writes; whether it is gone. A file system without locks has them all free."""
    descriptor = lock_file(folder, "lock")
    try:
        if file_lock.take(descriptor) is Lock.BUSY:
            return False
        shutil.rmtree(folder, ignore_errors=True)
        return not folder.exists()
    finally:
        os.close(descriptor)


def require_space(folder: Path, needed: int) -> None:
    """Make room where other corpora of this user lie unused; raises the error of a full disk, with the numbers, when that is not enough."""
    if needed <= _free(folder):
        return
    for other in sorted(folder.parent.iterdir(), key=lambda path: path.lstat().st_mtime):
        if other != folder and other.is_dir() and needed > _free(folder) and remove_unused(other):
            terminal.note(f"removed the staged corpus {other} to make room for another")
    free = _free(folder)
    if needed > free:
        text = f"{needed / 1e6:,.1f} MB of the corpus are to be staged there, {free / 1e6:,.1f} MB are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {text}", str(folder))


def _free(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def record_of(path: Path, shard: ShardEntry) -> dict[str, Any] | None:
    """The line of the journal for a shard that was verified, as its file looks now; None when it cannot be that file."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode) or status.st_size != shard.num_bytes:
        return None
    return {"file": shard.file, "bytes": shard.num_bytes, "sha256": shard.sha256, "mtime_ns": status.st_mtime_ns}


def read_journal(folder: Path) -> dict[str, Any]:
    """The newest record of each file. What a kill cut short is not there: its shard is copied again."""
    return {record["file"]: record for record in json_lines.read(folder / JOURNAL) if isinstance(record.get("file"), str)}


def append_to_journal(folder: Path, record: Mapping[str, Any]) -> None:
    """Add a record with one write, which several threads can do."""
    json_lines.append(folder / JOURNAL, record)
