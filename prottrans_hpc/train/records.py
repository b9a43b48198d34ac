"""The growing records of a run, written by rank 0: metrics.jsonl, validation.jsonl, history.jsonl, TensorBoard events.

A resume goes back to a checkpoint, so metrics and validation are cut back to its step: each step has one line, as
if the run had never stopped. The history is never cut.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import durable, json_lines, timestamp
from ..json_lines import Record
from ..run_dir import RunDir

_log = logging.getLogger(__name__)


class JsonLines:
    """A file of a run that stays open and gains one line at a time, each with one write, so that a reader never meets half a line of a live run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = self._open()

    def _open(self) -> int:
        return json_lines.open_file(self._path)

    def append(self, record: Record) -> None:
        """Add a line. An OSError names the file."""
        json_lines.append_to(self._descriptor, self._path, record)

    def cut_back(self, step: int) -> int:
        """Drop the lines of later steps, and a last line that a kill left unfinished; returns how many were dropped."""
        kept, dropped = [], 0
        for line in self._path.read_bytes().splitlines(keepends=True):
            if _step_of(line) <= step:
                kept.append(line)
            else:
                dropped += 1
        if dropped:
            durable.write_bytes(self._path, b"".join(kept))
            os.close(self._descriptor)
            self._descriptor = self._open()
        return dropped

    def later_than(self, step: int) -> Record:
        """How many steps of metrics come after `step`, how long they took, and when the last line was written (None: there is none)."""
        lines = self._path.read_bytes().splitlines(keepends=True)
        lost = [json.loads(line) for line in lines if step < _step_of(line) < math.inf]
        seconds = sum(float(record.get("step_s") or 0.0) for record in lost)
        last_step_at = timestamp.utc(os.fstat(self._descriptor).st_mtime) if lines else None
        return {"steps_lost": len(lost), "lost_s": round(seconds, 3), "last_step_at": last_step_at}

    def last_step(self) -> int:
        """The step of the last line; 0 when there is none."""
        records = json_lines.read(self._path)
        return int(records[-1]["step"]) if records else 0

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


class EventFile:
    """Scalars for TensorBoard; `first_step` makes it drop what an earlier start wrote for that step and later ones."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2, summary_pb2
        self._writer = EventFileWriter(str(folder))
        if first_step > 1:
            self._writer.add_event(event_pb2.Event(wall_time=time.time(), step=first_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START)))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """One event with several scalars."""
        scalars = [self._summary.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, summary=self._summary.Summary(value=scalars)))

    def close(self) -> None:
        """Write what is waiting."""
        self._writer.close()


_SCALARS = ("loss", "perplexity", "accuracy", "lr", "grad_norm", "residues_per_s", "mfu", "data_wait_s", "memory_mib")


class Records:
    """All of rank 0's files of a run."""

    def __init__(self, run_dir: RunDir) -> None:
        self._metrics, self._validation, self._history = (JsonLines(path) for path in (run_dir.metrics, run_dir.validation, run_dir.history))
        self._folder = run_dir.tensorboard
        self._events: EventFile | None = None
        self.taken_again: Record = {}
        """What the latest `begin_at` found that an earlier start had done in vain, for the history."""

    def begin_at(self, step: int) -> None:
        """Cut back to `step` and go on from there."""
        self.taken_again = self._metrics.later_than(step)
        dropped = self._metrics.cut_back(step) + self._validation.cut_back(step)
        if dropped:
            _log.info("dropped %d lines of metrics and validation after step %d; the steps are taken again", dropped, step)
        self._close_events()
        try:
            self._events = EventFile(self._folder, step + 1)
        except ModuleNotFoundError:
            _log.info("no TensorBoard files are written: the package tensorboard is not installed (metrics.jsonl has everything)")

    @property
    def last_validated(self) -> int:
        """The step of the last validation."""
        return self._validation.last_step()

    def step(self, record: Record) -> None:
        """A line of metrics.jsonl, and the scalars among it for TensorBoard."""
        self._metrics.append(record)
        self._show(record, "train", _SCALARS)

    def validation(self, record: Record) -> None:
        """A line of validation.jsonl."""
        self._validation.append(record)
        self._show(record, "validation", ("loss", "perplexity", "accuracy"))

    def event(self, name: str, **details: Any) -> None:
        """A line of history.jsonl."""
        self._history.append({"time": timestamp.now(), "event": name, **details})

    def close(self) -> None:
        """Close all files."""
        self._close_events()
        for file in (self._metrics, self._validation, self._history):
            file.close()

    def _show(self, record: Record, group: str, names: tuple[str, ...]) -> None:
        if self._events is None:
            return
        values = {f"{group}/{name}": float(record[name]) for name in names if record.get(name) is not None}
        try:
            self._events.add(int(record["step"]), values)
        except OSError as error:
            _log.warning("no more TensorBoard files are written: %s", error)
            self._events = None

    def _close_events(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None
