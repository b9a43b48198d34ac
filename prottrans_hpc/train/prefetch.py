"""Run any iterator ahead in a background thread: its items, and its exceptions, reach the consumer in order."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

_POLL_S = 0.1
"""How long a blocked thread may take to notice that the other side is gone."""


@dataclass(frozen=True)
class _End:
    error: BaseException | None


class Prefetcher(Generic[T]):
    """Iterates over `source` with up to `depth` items ready; owns the thread that makes them.

    The thread does NumPy and C work, which release the interpreter lock. It is a daemon: a process that
    forgets `close` still ends.
    """

    def __init__(self, source: Iterator[T], *, depth: int, name: str) -> None:
        self.wait_s = 0.0
        """How long the last `next` waited."""
        self._ready: queue.Queue[T | _End] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._end: _End | None = None
        self._thread = threading.Thread(target=self._work, args=(source,), name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        begin = time.perf_counter()
        item = self._end or self._get()
        self.wait_s = time.perf_counter() - begin
        if not isinstance(item, _End):
            return item
        self._end = item
        if item.error is not None:
            raise item.error
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait until it has ended; items that were ready are dropped. May be called twice."""
        self._closed.set()
        self._end = self._end or _End(None)
        self._thread.join()

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _get(self) -> T | _End:
        while True:
            try:
                return self._ready.get(timeout=_POLL_S)
            except queue.Empty:
                # The thread posts an _End whatever happens; one that died without it must not hang the rank.
                if not self._thread.is_alive() and self._ready.empty():
                    return _End(RuntimeError("the background thread ended without a word"))

    def _work(self, source: Iterator[T]) -> None:
        # Only this frame holds the source: what a generator keeps open is released when the thread ends.
        try:
            for item in source:
                if not self._put(item):
                    return
            self._put(_End(None))
        except BaseException as error:  # whatever it is, the consumer has to know
            self._put(_End(error))

    def _put(self, item: T | _End) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
            return True
        return False
