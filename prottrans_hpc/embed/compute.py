"""The part of an extraction that takes long: every window through the model, results into part files.

A part is written in the background while the next batches run. It is closed after some seconds or megabytes,
so that a kill costs seconds of work and memory stays bounded; which batches share a part changes no number.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

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

    def count(self, window: Window, embedded: Int64s, failed: dict[int, str]) -> None:
        """Add a finished window."""
        self.num_embedded += len(embedded)
        self.num_residues += int(window.lengths[embedded].sum())
        self.num_failed += len(failed)
        for place, reason in sorted(failed.items()):
            line = f"{terminal.printable(window.names[place])}: {reason}"
            terminal.detail(f"failed: {line}")
            if len(self.examples) < _NUM_EXAMPLES:
                self.examples.append(line)


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


def compute_parts(windows: Iterable[Window], extractor: Extractor, folder: PartsFolder, *, total: int, bin_residues: int, stop: StopRequest) -> Totals:
    """Embed what `folder` does not hold yet; afterwards its parts cover every protein of every window.

    `total` is the number of proteins, for the progress. Raises RequeueRequested at a signal, with everything
    finished so far on disk.
    """
    totals = Totals()
    with _part_writer(folder) as writer, terminal.progress("embedding", total=total, unit="proteins") as advance:
        for window in windows:
            finished = folder.finished_batches(window.index)
            failed = dict(window.problems)
            for part in folder.parts.get(window.index, ()):
                failed |= read_part(part).failed
            advance(len(window.problems))
            for batch, rows in enumerate(_batches(window, bin_residues)):
                if batch in finished:
                    totals.num_resumed += 1
                else:
                    extract = extractor.run([window.residues[row] for row in rows.tolist()], rows)
                    failed |= extract.failed
                    writer.add(extract, window=window.index, batch=batch)
                advance(len(rows))
                if stop.signal_name:
                    writer.flush()
                    writer.wait()
                    stop.check(f"the results of all finished batches are kept in {folder.path}")
            writer.flush()
            totals.count(window, np.setdiff1d(np.arange(len(window.names)), list(failed)), failed)
    return totals


@contextlib.contextmanager
def _part_writer(folder: PartsFolder) -> Iterator[_PartWriter]:
    with ThreadPoolExecutor(1, "part-writer") as executor:
        writer = _PartWriter(folder, executor)
        yield writer
        writer.flush()
        writer.wait()


def _batches(window: Window, bin_residues: int) -> Iterator[Int64s]:
    """The places of the proteins of each batch, in the fixed order that parts refer to."""
    sound = np.array([place for place in range(len(window.names)) if place not in window.problems], np.int64)
    for chosen in plan_bins(window.lengths[sound], bin_residues):
        yield sound[chosen]
