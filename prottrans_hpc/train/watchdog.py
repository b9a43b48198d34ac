"""Tells which rank hangs, and where, before the time-out of a collective ends the gang. It ends nothing itself but a rank that is alone.

A thread of every rank looks now and then how long ago its main thread last moved. After `health.hang_fraction` of
`parallel.timeout_s` the rank adds a line to its node's file; so files are made by ranks that hang, and by nobody else,
and it works without a network and for any way of talking between ranks. Shortly after, a rank of the same node speaks
for those that cannot (a stopped process, one in the kernel). Rank 0, or if that is silent the first other node that
finds no report, reads the files and says who keeps whom waiting. A rank that keeps others waiting adds its stacks.
Validation, checkpoints and the first step may take long: a rank in them is told of only when the time-out is near.

Nobody waits for a rank that is alone, so no collective would ever end it. It is ended when the time-out is over, as a gang is:
with its stacks in a file, and the code after which a chain of jobs goes on from the last checkpoint. Not in a phase that may
take long; not by the clock, which goes on while a process is stopped; and where a step was slow before and went on, only after
a few times as long. Code that never gives up the interpreter's lock cannot be ended so.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from .. import errors, json_lines
from ..run_dir import RunDir
from ..whereabouts import HERE
from . import stuck_ranks
from .stacks import append_stacks, process_state, stacks_file
from .stragglers import Place
from .stuck_ranks import Hang, Sighting

_log = logging.getLogger(__name__)

_POLLS_S = (0.05, 5.0)
_LEAVING_S = 10.0
_NEAR = 0.9
"""Of the time-out: so long may phases take that are known to be long."""
_TIMES_LONGEST = 3
"""So many times as long as it ever took to go on may a rank take that is alone."""


@dataclass(frozen=True)
class Limits:
    """When to do what, in seconds without a move of the main thread."""

    speak_s: float
    """Write down where this rank is."""
    pause_s: float
    """Between that, speaking for the silent, the report of rank 0, and that of another."""
    patient_s: float
    """Tell of a rank in a phase that may take long."""
    end_s: float
    """End a rank that is alone."""

    @property
    def poll_s(self) -> float:
        """Between two looks."""
        return min(max(self.pause_s / 5, _POLLS_S[0]), _POLLS_S[1])


def limits(timeout_s: float, hang_fraction: float) -> Limits:
    """All of it happens before the time-out; the pauses let the ranks of a slow network file system see one another's lines."""
    speak_s = hang_fraction * timeout_s
    return Limits(speak_s, max(0.0, min(15.0, speak_s / 4, (_NEAR * timeout_s - speak_s) / 4)), max(_NEAR * timeout_s, speak_s), timeout_s)


class Watchdog:
    """Owns the thread, while training runs."""

    def __init__(self, run_dir: RunDir, places: Sequence[Place], rank: int, *, start_id: str, limits: Limits) -> None:
        self._run_dir, self._places, self._rank, self._start_id, self._limits = run_dir, places, rank, start_id, limits
        self._node = places[rank].node
        self._node_ranks = [other for other, place in enumerate(places) if place.node == self._node]
        self._longest_s = 0.0
        """That the main thread took to go on, of what was told of."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._log = os.open(self._run_dir.node_log(self._node), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # For code that never gives up the interpreter's lock, in which the thread could say nothing: a signal stops the main thread, and its
        # own stack alone is shown. (faulthandler's timer shows those of running threads, and a rank that was only suspended could crash of it.)
        faulthandler.register(signal.SIGALRM, file=self._log, all_threads=False)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join(_LEAVING_S)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        faulthandler.unregister(signal.SIGALRM)
        if not self._thread.is_alive():  # else it waits for a disk that hangs
            os.close(self._log)

    def _watch(self) -> None:
        try:
            while not self._rest():
                if time.monotonic() - HERE.moved >= self._limits.speak_s:
                    self._watch_hang(HERE.moved)
        except Exception:  # a daemon thread would end without a word, and the hang with it
            _log.warning("nobody watches this rank any more", exc_info=True)

    def _rest(self) -> bool:
        """Wait for a moment; True when training is over."""
        signal.setitimer(signal.ITIMER_REAL, self._limits.speak_s + self._limits.poll_s)
        return self._over.wait(self._limits.poll_s)

    def _watch_hang(self, since: float) -> None:
        """From the first line about it until the main thread moves again."""
        self._say(self._own_sighting())
        pause_s = self._limits.pause_s
        deeds = [
            (self._limits.speak_s, self._dump_if_computing),
            (self._limits.speak_s + pause_s, self._speak_for_silent),
            (self._limits.speak_s + pause_s * (2 if self._rank == 0 else 3), self._report),
            (self._limits.patient_s, self._dump_if_awaited),
        ]
        num_rests = 0
        while HERE.moved == since and not self._rest():
            num_rests += 1
            if len(self._places) == 1 and not HERE.is_patient:
                self._end_after(self._limits.speak_s + num_rests * self._limits.poll_s)
            idle_s = time.monotonic() - since
            for due_s, deed in [entry for entry in deeds if idle_s >= entry[0]]:
                if deed():
                    deeds.remove((due_s, deed))
        if HERE.moved != since:
            self._longest_s = max(self._longest_s, HERE.moved - since)
            _log.warning("rank %d goes on after %.0f s", self._rank, HERE.moved - since)
            self._say(self._own_sighting(), went_on=True)

    def _end_after(self, awake_s: float) -> None:
        """End this process when it could have done something for so long."""
        if awake_s < max(self._limits.end_s, _TIMES_LONGEST * self._longest_s):
            return
        self._dump()
        cause = f"the only rank got nowhere for {awake_s:.0f} s, {stuck_ranks.where(self._own_sighting())}"
        _log.error("%s: it is ended, and the same command goes on from the last checkpoint", cause)
        with contextlib.suppress(OSError):  # a full disk must not keep it
            json_lines.append(self._run_dir.history, stuck_ranks.stop(cause, step=HERE.step - 1))
        os._exit(errors.REQUEUE)  # the main thread cannot be asked

    def _own_sighting(self) -> Sighting:
        place = self._places[self._rank]
        return Sighting(self._rank, place.host, HERE.position, HERE.step, HERE.phase, HERE.is_patient, HERE.collective, HERE.waits)

    def _say(self, sighting: Sighting, *, went_on: bool = False) -> None:
        json_lines.append(stuck_ranks.sightings_file(self._run_dir, self._node), stuck_ranks.record(sighting, start_id=self._start_id, went_on=went_on))

    def _dump_if_computing(self) -> bool:
        """The stacks of a rank that should have moved long ago and waits for nobody. These deeds tell whether they are done."""
        if not HERE.waits and not HERE.is_patient:
            self._dump()
        return True

    def _dump_if_awaited(self) -> bool:
        """Near the time-out: of one in a long phase, too, and of one where all are there and it does not end."""
        hang = self._find()
        if hang is None:
            return True
        is_awaited = bool(hang.num_waiting) and HERE.is_patient and not HERE.waits
        if is_awaited or (not hang.missing and self._rank == self._node_ranks[0]):
            self._dump()
        return True

    def _dump(self) -> None:
        path = stacks_file(self._run_dir, self._node)
        doing = stuck_ranks.where(self._own_sighting())
        append_stacks(path, f"rank {self._rank} on {self._places[self._rank].host} gets nowhere, {doing}")
        _log.warning("rank %d gets nowhere, %s; its stacks are in logs/%s", self._rank, doing, path.name)

    def _speak_for_silent(self) -> bool:
        """The first rank of a node that has spoken says what the kernel knows of those that have not."""
        heard = stuck_ranks.read_sightings(self._run_dir, [self._node], start_id=self._start_id)
        if self._rank == min(heard, default=-1):
            for rank in self._node_ranks:
                if rank not in heard:
                    self._say(stuck_ranks.unheard(rank, self._places[rank].host, process_state(self._places[rank].pid)))
        return True

    def _find(self) -> Hang | None:
        nodes = sorted({place.node for place in self._places})
        sightings = stuck_ranks.read_sightings(self._run_dir, nodes, start_id=self._start_id)
        return stuck_ranks.find_hang(sightings, [place.host for place in self._places])

    def _report(self) -> bool:
        """Say who keeps whom waiting, once for all ranks; of long phases only when the time-out is near."""
        if self._rank != self._node_ranks[0]:
            return True
        hang = self._find()
        if hang is None or not (hang.is_certain or time.monotonic() - HERE.moved >= self._limits.patient_s):
            return False
        if not self._is_first(hang):
            return True
        ends = "The time-out of a collective ends the gang" if len(self._places) > 1 else "It is ended when the time-out is over"
        _log.warning("%s (for %.0f s). %s", hang.sentence, time.monotonic() - HERE.moved, ends)
        json_lines.append(self._run_dir.history, stuck_ranks.event(hang))
        return True

    def _is_first(self, hang: Hang) -> bool:
        """Whether no other node has told of this hang."""
        path = self._run_dir.path / "logs" / f".stuck-{self._start_id}-{hang.step:08d}"
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            return False
        return True
