"""Saves training state while training goes on: a short blocking copy, then a thread that writes.

Each of a few ranks writes its share of the tensors. What it wrote (sizes and SHA-256) travels to rank 0 inside the
loop's own status all-reduce, so a save costs no collective of its own; rank 0 then seals and renames the folder in
its thread. Until that rename no reader sees anything, and afterwards everything is there (see durable.py).

A file is forced to storage by who wrote it: another node's fsync does not reach its cache, and takes rank 0 long for thousands
of files. In this order: every writer's bytes, fsync of the file and of the temporary folder (its name), and its report; when all
have reported, on rank 0, fsync of the training's records, state.json, the manifest, each with its name; the rename, and fsync of
the folder of checkpoints. So whenever the machine stops, the folder has no name yet, or every byte that its manifest tells of is
on storage. A file that rank 0 cannot see by then fails the save. But for one listing, its calls do not grow with the files.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import durable, errors
from ..comm import Comm
from ..durable import FileSeal
from ..recipe import Checkpointing
from ..run_dir import RunDir
from . import checkpoint, pieces, retention
from .lane_memory import lane_files
from .piece_plan import MAX_WRITERS, MIN_BYTES_A_WRITER, PiecePlan, plan_pieces
from .tensor_file import Staging, file_name, tensor_bytes

_log = logging.getLogger(__name__)

_DIGEST_PART = 6
"""Bytes of a digest that one number carries: whole numbers up to 2^53 are exact in fp64."""
_SLOT = 1 + -(-32 // _DIGEST_PART)
"""Numbers that report one file: its size, or minus the exit code of its failure, or 0 while it is being written; then its digest."""


class SaveError(errors.ProttransError):
    """A save that failed on another rank; it ends this one with the same exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


@dataclass(frozen=True)
class FilePlan:
    """One file of a checkpoint: who writes it and which tensors it holds, or pieces of them."""

    name: str
    kind: str
    rank: int
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class LaneTensors:
    """What one rank remembers of its lanes."""

    num_lanes: int
    """Of all ranks together."""
    num_shares: int
    """Over so many ranks of the data path they are shared out; the ranks of a tensor group remember the same, and its first one saves it."""
    tensors: Mapping[str, torch.Tensor]


def plan_memory(memory: LaneTensors | None, world_size: int) -> tuple[FilePlan, ...]:
    """A file a share for the memory of its lanes: gigabytes a node at the published sizes, so nobody collects it from others."""
    if memory is None:
        return ()
    apart = world_size // memory.num_shares
    return tuple(FilePlan(file.name, "memory", share * apart, ()) for share, file in enumerate(lane_files(memory.num_lanes, memory.num_shares)))


def plan_files(sizes: Mapping[str, Mapping[str, int]], world_size: int) -> tuple[FilePlan, ...]:
    """Share the tensors of each kind ("model", "optimizer") out by bytes over a few ranks; the same on every rank.

    `sizes` has the bytes of every tensor by kind and name. Writers are spread evenly over the ranks, hence over nodes.
    """
    total = sum(sum(kind.values()) for kind in sizes.values())
    num_writers = max(1, min(world_size, MAX_WRITERS, total // MIN_BYTES_A_WRITER))
    load = [0] * num_writers
    plans = []
    for kind, tensors in sizes.items():
        shares: dict[int, list[str]] = {}
        for name in sorted(tensors, key=lambda name: (-tensors[name], name)):
            writer = load.index(min(load))
            load[writer] += tensors[name]
            shares.setdefault(writer, []).append(name)
        for index, (writer, names) in enumerate(sorted(shares.items())):
            plans.append(FilePlan(file_name(kind, index, len(shares)), kind, writer * world_size // num_writers, tuple(sorted(names))))
    return tuple(plans)


def plan_piece_files(plan: PiecePlan) -> tuple[FilePlan, ...]:
    """The files of a sharded save, each with the tensors of which its writer has pieces."""
    named = {kind: plan.names_by_writer(kind) for kind in plan.groups}
    return tuple(FilePlan(plan.file_of(kind, rank), kind, rank, names) for kind, by_rank in named.items() for rank, names in by_rank.items())


class Saver:
    """Owns the staging buffers and the writing thread of one rank. Every rank calls the same methods at the same steps."""

    def __init__(self, run_dir: RunDir, comm: Comm, policy: Checkpointing, *, start_id: str) -> None:
        self._run_dir, self._comm, self._policy, self._start_id = run_dir, comm, policy, start_id
        self._plans: tuple[FilePlan, ...] = ()
        self._layout: dict[str, Any] = {}
        """What state.json has to say of a sharded save."""
        self._staging: dict[str, Staging] = {}
        self._thread: threading.Thread | None = None
        self._cancel = threading.Event()
        self._pending: _Pending | None = None
        self._commit_error: BaseException | None = None
        self.last_committed: int | None = None
        """Newest step this rank knows to be saved; only rank 0 knows of a commit as it happens."""

    @property
    def pending(self) -> bool:
        """Whether the files of a save are still being written; the same on every rank."""
        return self._pending is not None

    def stage(self, step: int, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, torch.Tensor]], memory: LaneTensors | None = None) -> None:
        """Copy this rank's share into the staging buffers; blocks for that copy only. `start` does the rest.

        `tensors` has by kind and name what `plan_files` shares out; `memory` is this rank's own. A save that still runs is finished first.
        """
        self._finish_writing()
        self._join()  # on rank 0, the commit of the save before
        if not self._plans:
            self._plan(tensors)
        plans = (*self._plans, *plan_memory(memory, self._comm.world_size))
        own = [plan for plan in plans if plan.rank == self._comm.rank]
        # A phase with other lanes names the files of their memory otherwise: the buffers of the ones before go first.
        for name in self._staging.keys() - {plan.name for plan in own}:
            del self._staging[name]
        for plan in own:
            share = memory.tensors if memory and plan.kind == "memory" else _share(tensors[plan.kind], plan.tensors)
            if plan.name not in self._staging or not self._staging[plan.name].fits(share):
                self._staging.pop(plan.name, None)
                self._staging[plan.name] = Staging(share)
            self._staging[plan.name].fill(share)
        if self._comm.device.type == "cuda":
            torch.cuda.synchronize(self._comm.device)
        files = {kind: [plan.name for plan in plans if plan.kind == kind] for kind in (*tensors, *(["memory"] if memory else []))}
        final = self._run_dir.checkpoint(step)
        temporary = durable.temporary_sibling(final, self._start_id)
        self._pending = _Pending(step, {**state, **self._layout, "files": files}, plans, final, temporary, [0.0] * (_SLOT * len(plans)))

    def _plan(self, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        if not any(pieces.is_sharded(group.values()) for group in tensors.values()):
            self._plans = plan_files({kind: {name: tensor_bytes(t) for name, t in group.items()} for kind, group in tensors.items()}, self._comm.world_size)
            return
        divided = {kind: {name: (pieces.division_of(t), tensor_bytes(t)) for name, t in group.items()} for kind, group in tensors.items()}
        plan = plan_pieces(divided, self._comm.world_size)
        self._plans = plan_piece_files(plan)
        self._layout = {"format": checkpoint.FORMAT_OF_PIECES, "pieces": plan.to_json()}

    def start(self) -> None:
        """Write what was staged, in the background."""
        assert self._pending is not None, "stage comes before start"
        self._thread = threading.Thread(target=self._write, args=(self._pending,), name="checkpoint-writer", daemon=True)
        self._thread.start()

    def report(self) -> list[float]:
        """This rank's numbers for the status all-reduce: a failed commit's exit code, then a slot for each pending file."""
        code = float(errors.exit_code(self._commit_error)) if self._commit_error else 0.0
        return [code, *(self._pending.slots if self._pending else [])]

    def receive(self, summed: list[float]) -> None:
        """Act on the sum of all ranks' reports: commit when every file is there. Raises, on all ranks, when any save failed."""
        if summed[0]:
            self._give_up()
            raise self._commit_error or SaveError("rank 0 could not finish a checkpoint; its log has the cause", int(summed[0]))
        if self._pending is None:
            return
        plans = self._pending.plans
        slots = [summed[1 + i * _SLOT : 1 + (i + 1) * _SLOT] for i in range(len(plans))]
        failed = [plan for plan, slot in zip(plans, slots, strict=True) if slot[0] < 0]
        if failed:
            self._fail(failed[0], -int(min(slot[0] for slot in slots)))
        if all(slot[0] > 0 for slot in slots):
            self._commit(self._pending, {plan.name: FileSeal(int(slot[0]), _digest_of(slot[1:])) for plan, slot in zip(plans, slots, strict=True)})

    def drain(self) -> None:
        """Wait until everything is saved and every rank knows that it is. Collective; raises what a failed save raises."""
        self._finish_writing()
        self._join()
        self._exchange()

    def _finish_writing(self) -> None:
        while self._pending is not None:
            self._join()
            self._exchange()

    def _exchange(self) -> None:
        report = torch.tensor(self.report(), dtype=torch.float64)
        self.receive(self._comm.all_reduce_sum(report).tolist())

    def abandon(self) -> None:
        """Stop writing, not caring what other ranks do; the error that ends this start is already under way."""
        self._cancel.set()
        self._join()
        if self._pending is not None and self._comm.rank == 0:
            shutil.rmtree(self._pending.temporary, ignore_errors=True)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, pending: _Pending) -> None:
        for number, plan in enumerate(pending.plans):
            if plan.rank != self._comm.rank:
                continue
            try:
                pending.temporary.mkdir(exist_ok=True)
                written = self._staging[plan.name].write(pending.temporary / plan.name, self._cancel.is_set)
                durable.fsync_path(pending.temporary)
            except BaseException as error:
                pending.error = error
                pending.slots[number * _SLOT] = -float(errors.exit_code(error))
                return
            start = number * _SLOT
            # The size comes last: the loop may read the slot at any moment, and takes a size for "complete".
            pending.slots[start + 1 : start + _SLOT] = _digest_numbers(written.sha256)
            pending.slots[start] = float(written.num_bytes)

    def _fail(self, plan: FilePlan, code: int) -> None:
        assert self._pending is not None
        own = self._pending.error
        self._give_up()
        raise own or SaveError(f"rank {plan.rank} could not write {plan.name} of a checkpoint; the log of its node has the cause", code)

    def _give_up(self) -> None:
        """All ranks: stop writing, and when everybody has, rank 0 removes what was written."""
        self._cancel.set()
        self._join()
        self._comm.barrier()
        if self._pending is not None and self._comm.rank == 0:
            shutil.rmtree(self._pending.temporary, ignore_errors=True)
        self._pending = None

    def _commit(self, pending: _Pending, written: dict[str, FileSeal]) -> None:
        self._join()
        self._pending = None
        if self._comm.rank == 0:
            self._thread = threading.Thread(target=self._seal, args=(pending, written), name="checkpoint-commit", daemon=True)
            self._thread.start()

    def _seal(self, pending: _Pending, written: dict[str, FileSeal]) -> None:
        try:
            for record in (self._run_dir.metrics, self._run_dir.validation):
                if record.exists():  # a resume needs their lines up to this step
                    durable.fsync_path(record)
            durable.write_json(pending.temporary / checkpoint.STATE, pending.state)
            missing = written.keys() - set(os.listdir(pending.temporary))
            if missing:
                raise OSError(errno.EIO, "files of other ranks did not arrive", str(pending.temporary / min(missing)))
            durable.seal_folder(pending.temporary, known=written)
            retention.replace_folder(pending.temporary, pending.final)
            self.last_committed = pending.step
            _log.info("saved the checkpoint %s", pending.final.name)
        except BaseException as error:
            shutil.rmtree(pending.temporary, ignore_errors=True)
            self._commit_error = error
            return
        retention.prune(self._run_dir, self._policy, newest=pending.step)


def _share(tensors: Mapping[str, torch.Tensor], names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return {piece: tensor for name in names for piece, tensor in pieces.own_piece(name, tensors[name]).items()}


def _digest_numbers(sha256: str) -> list[float]:
    content = bytes.fromhex(sha256)
    return [float(int.from_bytes(content[start : start + _DIGEST_PART], "big")) for start in range(0, len(content), _DIGEST_PART)]


def _digest_of(numbers: list[float]) -> str:
    sizes = [_DIGEST_PART] * (len(numbers) - 1) + [32 - _DIGEST_PART * (len(numbers) - 1)]
    return b"".join(int(number).to_bytes(size, "big") for number, size in zip(numbers, sizes, strict=True)).hex()


@dataclass
class _Pending:
    step: int
    state: dict[str, Any]
    plans: tuple[FilePlan, ...]
    final: Path
    temporary: Path
    slots: list[float]
    error: BaseException | None = None
