"""timings/node-NNNN.jsonl: the ledger of each step as the mean over a node's ranks, written by the node's first rank.

The ranks of a node bring their numbers together in shared memory, without a collective: a rank puts its lap into its
slot before the status all-reduce of the step, and after that the first rank reads the slots of all. Two slots a rank
are enough, for nobody gets two all-reduces ahead. Where ranks share no memory (a container each) the file speaks of the
ranks that it has heard of. A disk that is full ends the file, not the training.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..comm import Comm
from ..rank import RankContext
from ..run_dir import RunDir
from . import timing
from .records import JsonLines

_log = logging.getLogger(__name__)

_WIDTH = 1 + len(timing.PARTS)
"""Numbers in a slot: the step, then the ledger."""


class Slots:
    """fp64 [2, ranks of the node, step and ledger], in memory that they share."""

    def __init__(self, num_ranks: int, descriptor: int | None) -> None:
        """`descriptor` is a file of the right size; None: memory of this process alone."""
        self._num_ranks = num_ranks
        self._memory = mmap.mmap(-1 if descriptor is None else descriptor, num_bytes(num_ranks))
        self._numbers = memoryview(self._memory).cast("d")

    def put(self, local_rank: int, step: int, ledger: Sequence[float]) -> None:
        """A rank's ledger of a step."""
        at = self._at(local_rank, step)
        for offset, value in enumerate(ledger, start=1):
            self._numbers[at + offset] = value
        self._numbers[at] = step  # last: it makes the others valid

    def of_step(self, step: int) -> list[tuple[float, ...]]:
        """The ledgers of this step that are there, by local rank."""
        starts = (self._at(local_rank, step) for local_rank in range(self._num_ranks))
        return [tuple(self._numbers[at + 1 : at + _WIDTH]) for at in starts if self._numbers[at] == step]

    def _at(self, local_rank: int, step: int) -> int:
        return ((step % 2) * self._num_ranks + local_rank) * _WIDTH

    def close(self) -> None:
        """Let go of the memory."""
        self._numbers.release()
        self._memory.close()


def num_bytes(num_ranks: int) -> int:
    """Of the slots of so many ranks."""
    return 2 * num_ranks * _WIDTH * 8


class NodeTimings:
    """A rank's part in its node's file; the first rank of the node writes it."""

    def __init__(self, path: Path | None = None, slots: Slots | None = None, *, local_rank: int = 0, host: str = "", left_over: Sequence[Path] = ()) -> None:
        """`path` is given on the node's first rank only. `left_over` are files of an earlier start's nodes that this start lacks: they are cut back, too."""
        self._left_over = left_over
        self._path, self._local_rank, self._slots, self._host = path, local_rank, slots or Slots(1, None), host
        self._file: JsonLines | None = None

    def begin_at(self, step: int) -> None:
        """Cut the file back to `step` and go on from there."""
        self._end_file()
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file = JsonLines(self._path)
            self._file.cut_back(step)
            for path in self._left_over:
                old = JsonLines(path)
                old.cut_back(step)
                old.close()
        except OSError as error:
            self._give_up(error)

    def put(self, step: int, ledger: Sequence[float]) -> None:
        """This rank's ledger; before the status all-reduce of the step."""
        self._slots.put(self._local_rank, step, ledger)

    def write(self, step: int) -> None:
        """The node's line about a step; after its status all-reduce."""
        if self._file is None:
            return
        ledgers = self._slots.of_step(step)
        work = [timing.compute_s(ledger) for ledger in ledgers]
        means = [sum(values) / len(ledgers) for values in zip(*ledgers, strict=True)]
        line = {"step": step, "host": self._host, "ranks": len(ledgers), "compute_s": round(sum(work) / len(work), 6), "slowest_compute_s": round(max(work), 6)}
        line["least_exposed_comm_s"] = round(min(timing.exposed_comm_s(ledger) for ledger in ledgers), 6)
        try:
            self._file.append(line | timing.by_name(means))
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        _log.warning("%s is written no further: %s", self._path, error)
        self._end_file()

    def _end_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def close(self) -> None:
        """Close the file and let go of the memory."""
        self._end_file()
        self._slots.close()


@contextlib.contextmanager
def shared(run_dir: RunDir, context: RankContext, comm: Comm, *, start_id: str) -> Iterator[NodeTimings]:
    """This rank's part in the file of its node. Collective at the beginning."""
    path = run_dir.node_timings(context.node_rank) if context.is_node_main else None
    ours = {run_dir.node_timings(node) for node in range(context.num_nodes)}
    left_over = sorted(set(run_dir.timings.glob("node-*.jsonl")) - ours) if context.is_main else []
    slots = _meet(context, comm, start_id)
    timings = NodeTimings(path, slots, local_rank=context.local_rank, host=context.hostname, left_over=left_over)
    try:
        yield timings
    finally:
        timings.close()


def _meet(context: RankContext, comm: Comm, start_id: str) -> Slots:
    """Memory that the node's ranks share. Its name is there for a moment only, so that no kill leaves it behind."""
    folder = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
    path, descriptor = folder / f"prottrans-{start_id}-{context.node_rank}", None
    if context.is_node_main and context.local_world_size > 1:
        descriptor = _make(path, num_bytes(context.local_world_size))
    comm.barrier()
    if not context.is_node_main:
        descriptor = _open(path, num_bytes(context.local_world_size))
    comm.barrier()
    if context.is_node_main and descriptor is not None:
        path.unlink(missing_ok=True)
    slots = Slots(context.local_world_size, descriptor)
    if descriptor is not None:
        os.close(descriptor)
    return slots


def _make(path: Path, size: int) -> int | None:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.posix_fallocate(descriptor, 0, size)  # a full /dev/shm shows here, and not as SIGBUS later
    except OSError as error:
        _log.warning("the timings of this node's other ranks are not recorded: %s: %s", path, error.strerror)
        path.unlink(missing_ok=True)
        return None
    return descriptor


def _open(path: Path, size: int) -> int | None:
    """The node's file; None where this rank does not see it, or it is none of ours."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    status = os.fstat(descriptor)
    if status.st_uid == os.getuid() and status.st_size == size:
        return descriptor
    os.close(descriptor)
    return None
