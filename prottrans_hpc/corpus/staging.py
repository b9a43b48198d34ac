"""Copying a corpus to a node's own disk: in the background, several shards at once, each verified on the way.

Only what has the SHA-256 of the index gets its name there, by a rename behind an fsync; so a shard that is there and
looks as the journal says was right when it was written, after a kill as well. What the folder is like: `node_disk`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

from .. import durable, file_lock
from ..errors import DataError
from ..file_lock import Lock
from . import node_disk
from .index import INDEX, Index, ShardEntry

_CHUNK_BYTES = 8 << 20
_NUM_THREADS = 4
"""Shards at once: hashing keeps a core busy at less than the speed of a good file system."""
_LOCK_POLL_S = 0.1
_log = logging.getLogger(__name__)
T = TypeVar("T")


class Stopped(Exception):  # noqa: N818 - asked for, not a fault
    """The copy was told to stop."""


class Staging:
    """The copy of one corpus to one node's disk; owns its threads, and its place among the readers of the copy."""

    def __init__(self, index: Index, folder: Path, *, rehash: bool = False, begin_at: float = 0.0) -> None:
        """`rehash` reads again what an earlier start staged; `begin_at` in [0, 1) is where in the list of shards to begin."""
        self.index, self.folder = index, folder
        self.error: BaseException | None = None
        self.num_bytes_ready = 0
        """Of the shards that were found there, and of those that are copied."""
        self.last_sign = time.monotonic()
        """When something last moved."""
        self._rehash, self._begin_at = rehash, begin_at
        self._ended, self._stop, self._counting = threading.Event(), threading.Event(), threading.Lock()
        self._reading: int | None = None
        self._thread = threading.Thread(target=self._run, name="staging", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Whether the work has ended, well or with `error`, after waiting for at most this long."""
        return self._ended.wait(timeout_s)

    def close(self, *, remove: bool = False, timeout_s: float = 10.0) -> None:
        """Stop copying and reading; `remove` deletes the copy unless another process uses it."""
        self._stop.set()
        self._thread.join(timeout_s)
        if self._reading is not None:
            os.close(self._reading)
            self._reading = None
            if remove and node_disk.remove_unused(self.folder):
                _log.info("removed the staged corpus %s", self.folder)

    def _run(self) -> None:
        try:
            node_disk.make_private(self.folder.parent)
            self._reading = self._locked("lock", shared=True)
            copying = self._locked("copying", shared=False)
            try:
                self._stage()
            finally:
                os.close(copying)
        except BaseException as error:
            self.error = error
        finally:
            self._ended.set()

    def _stage(self) -> None:
        began, folder = time.monotonic(), self.folder
        folder.mkdir(mode=0o700, exist_ok=True)
        for path in folder.iterdir():
            if durable.is_temporary(path):  # a killed copy
                path.unlink()
        missing = self._missing_shards()
        num_bytes = sum(shard.num_bytes for shard in missing)
        self.num_bytes_ready = self.index.num_bytes - num_bytes
        node_disk.require_space(folder, num_bytes)
        self._all_at_once(self._copy_shard, missing)
        durable.write_bytes(folder / INDEX, self._index_bytes())
        num_shards = sum(len(split.shards) for split in self.index.splits.values())
        _log.info("the corpus is staged in %s: %d of %d shards copied, %.3f GB in %.1f s", folder, len(missing), num_shards, num_bytes / 1e9, _since(began))

    def _missing_shards(self) -> list[ShardEntry]:
        """What is to be copied, in this node's order: a thousand nodes must not all read the same file first."""
        shards = [shard for split in self.index.splits.values() for shard in split.shards]
        recorded = node_disk.read_journal(self.folder)
        present = [shard for shard in shards if shard.file in recorded and recorded[shard.file] == node_disk.record_of(self.folder / shard.file, shard)]
        if self._rehash:
            intact = self._all_at_once(self._is_intact, present)
            present = [shard for shard, is_intact in zip(present, intact, strict=True) if is_intact]
        kept = set(present)
        missing = [shard for shard in shards if shard not in kept]
        start = int(self._begin_at * len(missing))
        return missing[start:] + missing[:start]

    def _is_intact(self, shard: ShardEntry) -> bool:
        path, digest = self.folder / shard.file, hashlib.sha256()
        for chunk in self._chunks(path):
            digest.update(chunk)
        if digest.hexdigest() == shard.sha256:
            return True
        _log.warning("%s is damaged: its SHA-256 is not the one in the index; it is copied again", path)
        return False

    def _copy_shard(self, shard: ShardEntry) -> None:
        source, final = self.index.shard_path(shard), self.folder / shard.file
        if not self._copied(source, final, shard):
            _log.warning("what was read from %s does not have its SHA-256; it is read once more", source)
            if not self._copied(source, final, shard):
                raise DataError(f"{source} is damaged: its SHA-256 is not the one in the index; `prottrans corpus check {self.index.path}` tells more")
        record = node_disk.record_of(final, shard)
        assert record is not None  # it was just written, and nobody else writes there
        node_disk.append_to_journal(self.folder, record)

    def _copied(self, source: Path, final: Path, shard: ShardEntry) -> bool:
        """Copy; whether it had the right content. What has not never gets its name."""
        digest, num_bytes = hashlib.sha256(), 0
        try:
            with durable.new_file(final) as temporary, temporary.open("xb", buffering=0) as writer:
                for chunk in self._chunks(source):
                    digest.update(chunk)
                    written = 0
                    while written < len(chunk):
                        written += writer.write(chunk[written:])
                    num_bytes = self._count(num_bytes, writer.tell(), shard)
                if digest.hexdigest() != shard.sha256:
                    raise _OtherContent
        except _OtherContent:
            self._count(num_bytes, 0, shard)
            return False
        return True

    def _count(self, before: int, now: int, shard: ShardEntry) -> int:
        """Move the count of bytes; a file that is longer than it should be counts as far as it should go."""
        now = min(now, shard.num_bytes)
        with self._counting:
            self.num_bytes_ready += now - before
        return now

    def _chunks(self, path: Path) -> Iterator[memoryview]:
        """The content of a file. Raises DataError when it is missing, OSError that names it, or Stopped."""
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        try:
            with path.open("rb", buffering=0) as reader:
                while num := reader.readinto(buffer):
                    self._go_on()
                    yield buffer[:num]
        except FileNotFoundError:
            raise DataError(f"{path} is missing: copy the corpus again, or build it anew with `prottrans preprocess`") from None
        except OSError as error:
            raise OSError(error.errno, error.strerror, error.filename or str(path)) from error

    def _index_bytes(self) -> bytes:
        content = (self.index.path / INDEX).read_bytes()
        if hashlib.sha256(content).hexdigest() != self.index.sha256:
            raise DataError(f"{self.index.path / INDEX} has changed while the corpus was staged")
        return content

    def _all_at_once(self, work: Callable[[ShardEntry], T], shards: Sequence[ShardEntry]) -> list[T]:
        """Do the work for all shards, several at a time; the first error stops the others."""
        with ThreadPoolExecutor(_NUM_THREADS, "staging") as pool:
            futures = [pool.submit(work, shard) for shard in shards]
            ended, _ = wait(futures, return_when=FIRST_EXCEPTION)
            errors = [error for future in ended if (error := future.exception())]
            if errors:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise min(errors, key=lambda error: isinstance(error, Stopped))
        return [future.result() for future in futures]

    def _go_on(self) -> None:
        """Show that something moves. Raises Stopped."""
        self.last_sign = time.monotonic()
        if self._stop.is_set():
            raise Stopped

    def _locked(self, kind: str, *, shared: bool) -> int:
        """An open lock file whose lock is ours; waited for as long as another process holds it."""
        descriptor, told = node_disk.lock_file(self.folder, kind), False
        try:
            while file_lock.take(descriptor, shared=shared) is Lock.BUSY:
                if not told:
                    _log.info("another process is staging the same corpus in %s: waiting for it", self.folder)
                told = True
                self._stop.wait(_LOCK_POLL_S)
                self._go_on()
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


class _OtherContent(Exception):  # noqa: N818 - never leaves this module
    """What was copied is not what the index lists."""


def _since(began: float) -> float:
    return time.monotonic() - began
