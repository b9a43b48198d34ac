"""`python -m prottrans_hpc.launch.end SCHEDULER RUN_DIR CODE`: a job script of a batch system settles what follows from its end.

It notes in jobs.jsonl how the ranks ended, gives the lease of the run directory back, cancels the rest of the chain
when that would be in vain, and asks for a requeue where the scheduler would forget a job that makes room for another.
Ends with CODE, whatever happens to itself.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import errors, terminal
from ..errors import ProttransError
from ..run_dir import RunDir
from . import chain, job_events, lease, preflight_notes, submission, verdicts
from .begin import hold_stop_signals
from .job_events import Event
from .own_job import Start, identify
from .progress import read_progress

_ASK_S = 20.0
"""The scheduler may kill the job at any moment now: what matters is on the disk before it is asked anything."""


def end(scheduler: str, run_dir: RunDir, code: int, environment: Mapping[str, str]) -> None:
    """Note the end, give the lease back, and settle what becomes of this job and of those after it."""
    events = job_events.read_events(run_dir)
    start = identify(scheduler, environment, earlier_starts=lambda job_id: job_events.num_begun(events, job_id) - 1)
    begun = next((event for event in reversed(events) if event["event"] == "begun" and event["job_id"] == start.job_id), None)
    try:
        vain = _note_end(run_dir, start, code, events, begun)
    finally:  # also where the disk is full
        lease.release(run_dir, start)
    if vain is not None:
        chain.cancel_rest(run_dir, start, vain)
    elif code == errors.REQUEUE and not _was_cancelled(events, start):
        _requeue_if_preempted(run_dir, start)


def _note_end(run_dir: RunDir, start: Start, code: int, events: Sequence[Event], begun: Event | None) -> str | None:
    """Note how the ranks ended; why the rest of the chain would be in vain, if it would."""
    step = read_progress(run_dir).step
    vain = verdicts.why_not_again(events, (*chain.read_chain(run_dir), start.job_id), code, step)
    details = {"cause": _cause(run_dir, start, code, begun), "step": step, "num_nodes": len(start.nodes), "elapsed_s": _seconds_since(begun)}
    try:
        job_events.note(run_dir, start, "ended", code=code, **details, in_vain=vain)
    except OSError as error:
        terminal.warn(f"jobs.jsonl has no line about this end ({errors.explain(error)}): exit code {code}, {details['cause']}, step {step}")
    return vain


def _was_cancelled(events: Sequence[Event], start: Start) -> bool:
    """Whether `prottrans runs cancel` has asked for this end."""
    return any(event["event"] == "cancelled" and event["job_id"] == start.job_id for event in events)


def _requeue_if_preempted(run_dir: RunDir, start: Start) -> None:
    """A job that ends in the grace period before its preemption has ended for Slurm: nothing would start it again."""
    if not submission.is_being_preempted(start.scheduler, start.job_id, timeout_s=_ASK_S):
        return
    job_events.note(run_dir, start, "requeued", reason="preempted: it makes room for another job")
    terminal.note(f"preempted: job {start.job_id} goes back into the queue")
    sys.stderr.flush()
    submission.requeue(start.scheduler, start.job_id, timeout_s=_ASK_S)


def _cause(run_dir: RunDir, start: Start, code: int, begun: Event | None) -> str:
    """In words: what the ranks noted themselves, or what the code means; and which nodes are down."""
    told = _last_stop(run_dir, begun)
    parts = [told or verdicts.describe_code(code)]
    if code != errors.DONE and (told is None or "Error" in told or told.startswith(preflight_notes.FAILED)):
        lost = submission.lost_nodes(start.scheduler, start.nodes, timeout_s=_ASK_S)
        parts += [*_first_fault(run_dir, begun), *(f"node {node} is down" for node in lost)]
    return "; ".join(parts)


_FAULT = re.compile(rb"^srun: error: ([\w.-]+: tasks? [\d,-]+: .*|Node failure on .*)$", re.MULTILINE)
"""How srun tells which rank ended badly, and on which node."""
_ORDERLY = f"Exited with exit code {errors.REQUEUE}".encode()
_LONGEST_LOG = 1 << 20


def _first_fault(run_dir: RunDir, begun: Event | None) -> list[str]:
    """What the starter said first about a rank that failed in this start; the others fail because of it."""
    try:
        with run_dir.job_log.open("rb") as log:
            log.seek(int(begun["log_bytes"]) if begun else 0)
            faults = [fault for fault in _FAULT.findall(log.read(_LONGEST_LOG)) if not fault.endswith(_ORDERLY)]
    except (OSError, ValueError, KeyError):
        return []
    return [terminal.printable(faults[0])] if faults else []


def _last_stop(run_dir: RunDir, begun: Event | None) -> str | None:
    """The cause in the trainer's own last line, if it is of this start."""
    try:
        line: dict[str, Any] = json.loads(run_dir.history.read_bytes().splitlines()[-1])
        is_of_this_start = begun is not None and str(line["time"]) >= str(begun["time"])
        return terminal.printable(str(line["cause"]), 500) if line["event"] == "stop" and is_of_this_start else None
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return None


def _seconds_since(begun: Event | None) -> float | None:
    if begun is None:
        return None
    elapsed = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(str(begun["time"]))
    return round(elapsed.total_seconds(), 1)


def main(arguments: list[str]) -> int:
    """Settle, and end with the code that the ranks ended with."""
    if len(arguments) != 3:
        raise SystemExit("usage: python -m prottrans_hpc.launch.end SCHEDULER RUN_DIR CODE")
    code = int(arguments[2])
    hold_stop_signals()
    try:
        end(arguments[0], RunDir(Path(arguments[1])), code, os.environ)
    except (ProttransError, OSError) as error:
        print(f"warning: the end of this job is not settled: {terminal.printable_lines(errors.explain(error))}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
