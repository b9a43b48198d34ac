"""The part of an extraction that takes long: every window through the model, results into part files.

A part is written in the background while the next batches run. It is closed after some seconds or megabytes,
so that a kill costs seconds of work and memory stays bounded; which batches share a part changes no number.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from .. import terminal
from .batches import Int64s, plan_bins
from .extract import Extractor
from .parts import Extract, PartsFolder, joined, read_part
from .proteins import Window
from .stopping import StopRequest

_PART_S = 10.0
_PART_BYTES = 64 << 20
_NUM_EXAMPLES = 10


@dataclass
class Totals:
    """What became of the proteins so far."""

    num_embedded: int = 0
    num_residues: int = 0
    """Of the embedded ones."""
    num_failed: int = 0
    num_resumed: int = 0
    """Batches that an earlier run had finished."""
    examples: list[str] = field(default_factory=list)
    """The first failures, "name: reason", safe to print."""

    def count(self, window: Window, failed: dict[int, str]) -> None:
        """Add a finished window, all of whose proteins but the failed ones were embedded."""
        embedded = np.setdiff1d(np.arange(len(window.names)), list(failed))
        self.num_embedded += len(embedded)
        self.num_residues += int(window.lengths[embedded].sum())
        self.num_failed += len(failed)
        for place, reason in sorted(failed.items()):
            line = f"{terminal.printable(window.names[place])}: {reason}"
            terminal.detail(f"failed: {line}")
            if len(self.examples) < _NUM_EXAMPLES:
                self.examples.append(line)


@dataclass(frozen=True)
class Workers:
    """How the batches share the processor."""

    num_workers: int
    """Batches that run at the same time."""
    num_threads: int
    """Threads of each."""


def plan_workers(num_cores: int, num_batches: int) -> Workers:
    """Whole batches side by side, one thread each, waste nothing on waiting for one another (measured: up to twice as
    fast on two cores, far more on busy ones); with fewer batches than cores each gets several."""
    num_workers = max(1, min(num_cores, num_batches))
    return Workers(num_workers, max(1, num_cores // num_workers))


@dataclass(frozen=True)
class Batching:
    """How the proteins are cut into work."""

    num_proteins: int
    """All of the input, for the progress."""
    batch_residues: int
    workers: Workers


@dataclass
class _PartWriter:
    """Collects consecutive batches of one window and writes them as a part, one at a time, in the background."""

    folder: PartsFolder
    executor: ThreadPoolExecutor
    window: int = 0
    first: int = 0
    pending: list[Extract] = field(default_factory=list)
    opened: float = field(default_factory=time.monotonic)
    running: Future[None] | None = None

    def add(self, extract: Extract, *, window: int, batch: int) -> None:
        """Take the result of a batch; it need not follow the one before."""
        if (window, batch) != (self.window, self.first + len(self.pending)):
            self.flush()
            self.window, self.first = window, batch
        self.pending.append(extract)
        if time.monotonic() - self.opened > _PART_S or sum(one.num_bytes for one in self.pending) > _PART_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand what was collected to the writing thread, once that has finished the part before. Raises what it met."""
        self.wait()
        if self.pending:
            batches, first, last = self.pending, self.first, self.first + len(self.pending) - 1
            self.running = self.executor.submit(lambda: self.folder.write(joined(batches), window=self.window, first=first, last=last))
            self.pending, self.first = [], last + 1
        self.opened = time.monotonic()

    def wait(self) -> None:
        """Until the last part is on disk."""
        if self.running is not None:
            self.running.result()
            self.running = None


@dataclass(frozen=True)
class _Task:
    """A batch to compute, or the end of a window."""

    window: Window
    batch: int
    rows: Int64s | None
    """None: the window has no more batches."""


def compute_parts(windows: Iterable[Window], extractor: Extractor, folder: PartsFolder, *, batching: Batching, stop: StopRequest) -> Totals:
    """Embed what `folder` does not hold yet; afterwards its parts cover every protein of every window.

    Raises RequeueRequested at a signal, with everything finished so far on disk.
    """
    totals, failed = Totals(), dict[int, str]()

    def run(task: _Task) -> Extract | None:
        return None if task.rows is None else extractor.run([task.window.residues[row] for row in task.rows.tolist()], task.rows)

    with _part_writer(folder) as writer, terminal.progress("embedding", total=batching.num_proteins, unit="proteins") as advance:
        tasks = _tasks(windows, folder, batching.batch_residues, totals, advance)
        for task, extract in _in_order(tasks, run, batching.workers):
            if extract is not None:
                writer.add(extract, window=task.window.index, batch=task.batch)
                failed |= extract.failed
                advance(len(extract.rows) + len(extract.failed))
            else:
                totals.count(task.window, failed | _failed_before(task.window, folder))
                failed = {}
                writer.flush()
            if stop.signal_name:
                writer.flush()
                writer.wait()
                stop.check(f"the results of all finished batches are kept in {folder.path}")
    return totals


def _tasks(windows: Iterable[Window], folder: PartsFolder, batch_residues: int, totals: Totals, advance: terminal.Advance) -> Iterator[_Task]:
    """What is left to do, in the fixed order that parts refer to."""
    for window in windows:
        finished = folder.finished_batches(window.index)
        sound = np.array([place for place in range(len(window.names)) if place not in window.problems], np.int64)
        advance(len(window.problems))
        for batch, chosen in enumerate(plan_bins(window.lengths[sound], batch_residues)):
            if batch in finished:
                totals.num_resumed += 1
                advance(len(chosen))
            else:
                yield _Task(window, batch, sound[chosen])
        yield _Task(window, -1, None)


def _failed_before(window: Window, folder: PartsFolder) -> dict[int, str]:
    """Failures that the input shows, and those in parts of an earlier run."""
    failed = dict(window.problems)
    for part in folder.parts.get(window.index, ()):
        failed |= read_part(part).failed
    return failed


def _in_order(tasks: Iterator[_Task], run: Callable[[_Task], Extract | None], workers: Workers) -> Iterator[tuple[_Task, Extract | None]]:
    """The results in the order of the tasks; a few tasks run ahead, so memory stays bounded."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(workers.num_threads)
    executor = ThreadPoolExecutor(workers.num_workers, "embed")
    running: deque[tuple[_Task, Future[Extract | None]]] = deque()
    try:
        for task in tasks:
            running.append((task, executor.submit(run, task)))
            if len(running) > 2 * workers.num_workers:
                first, future = running.popleft()
                yield first, future.result()
        while running:
            first, future = running.popleft()
            yield first, future.result()
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(threads_before)


@contextlib.contextmanager
def _part_writer(folder: PartsFolder) -> Iterator[_PartWriter]:
    with ThreadPoolExecutor(1, "part-writer") as executor:
        writer = _PartWriter(folder, executor)
        yield writer
        writer.flush()
        writer.wait()
