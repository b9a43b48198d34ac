"""`python -m prottrans_hpc.launch.begin SCHEDULER RUN_DIR`: a job script of a batch system asks whether it may start the ranks.

Prints "go", "finished" when nothing is left to do, or "refused" when another job has the run directory; it ends with
another code than 0 when the job must not start. It takes the lease of the run directory, and notes in jobs.jsonl what it found.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from .. import errors, terminal
from ..errors import ProttransError, ResourceError, SubmitError
from ..run_dir import RunDir
from . import chain, job_events, lease, submission, verdicts
from .children import STOP_SIGNALS
from .job_state import State
from .lease import Taken
from .own_job import Start, identify
from .progress import read_progress

GO, FINISHED, REFUSED = "go", "finished", "refused"
_ASK_S = 30.0


class RefusedError(SubmitError):
    """Another job has the run directory, or may have it."""


def begin(scheduler: str, run_dir: RunDir, environment: Mapping[str, str]) -> str:
    """Take the lease and say whether to go on. Raises RefusedError, or the error that makes a start vain."""
    start = identify(scheduler, environment, earlier_starts=lambda job_id: job_events.num_begun(job_events.read_events(run_dir), job_id))
    try:
        taken = lease.take(run_dir, start)
    except SubmitError as error:
        job_events.note(run_dir, start, "refused", reason=str(error))
        raise RefusedError(str(error)) from error
    chain.enrol(run_dir, start)
    try:
        return _decide(run_dir, start, taken)
    except (ProttransError, OSError) as error:
        _give_up(run_dir, start, error)
        raise


def _decide(run_dir: RunDir, start: Start, taken: Taken | None) -> str:
    progress = read_progress(run_dir)
    if taken is not None:
        _note_takeover(run_dir, start, taken, progress.step)
    events = job_events.read_events(run_dir)
    if progress.is_done:
        _note_end(run_dir, start, code=errors.DONE, cause="nothing was left to do", step=progress.step, in_vain="the work is done")
        lease.release(run_dir, start)
        chain.cancel_rest(run_dir, start, "the work is done")
        terminal.note(f"nothing to do: step {progress.step} of {progress.last_step} was reached before")
        return FINISHED
    doom = verdicts.doomed_by(events, chain.read_chain(run_dir), start.job_id)
    if doom is not None:
        raise ResourceError(f"job {doom['job_id']} of this chain ended for good: {doom['in_vain']}")
    vain = verdicts.why_not_begin(events, start, progress.step)
    if vain is not None:
        raise ResourceError(f"{vain}: look at the log, then submit again")
    job_events.note(run_dir, start, "begun", nodes=list(start.nodes), hostname=start.host, step=progress.step, log_bytes=_size(run_dir.job_log))
    return GO


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _note_takeover(run_dir: RunDir, start: Start, taken: Taken, step: int) -> None:
    """Note how the previous holder ended, which left no line of its own."""
    old = taken.lease
    lost = submission.lost_nodes(old.scheduler, old.nodes, timeout_s=_ASK_S)
    ended = State.NODE_LOST if lost else taken.state
    same = old.job_id == start.job_id
    how = {True: "was requeued (preempted, by an operator, or after a fault)", False: "was killed, and the scheduler has forgotten it"}[same]
    cause = f"lost {_nodes_text(lost)}" if lost else how if ended is None else f"ended as {ended} without a word of its own"
    job_events.note(
        run_dir,
        start,
        "taken_over",
        from_job_id=old.job_id,
        from_restart=old.restart,
        ended=str(ended or ("REQUEUED" if same else "killed")),
        cause=cause,
        lost_nodes=lost,
        step=step,
    )
    terminal.note(f"took the run directory over from {old.holder}: it {cause}")


def _nodes_text(nodes: list[str]) -> str:
    return f"{'node' if len(nodes) == 1 else 'nodes'} {', '.join(nodes)}"


def _give_up(run_dir: RunDir, start: Start, error: ProttransError | OSError) -> None:
    """This start ends before it began; nothing cures what `error` says, unless it is an error of input and output."""
    code = errors.exit_code(error)
    reason = errors.explain(error)
    with contextlib.suppress(OSError):  # a full disk must not hide the error
        _note_end(run_dir, start, code=code, cause=reason, step=None, in_vain=reason)
    lease.release(run_dir, start)
    chain.cancel_rest(run_dir, start, reason)


def _note_end(run_dir: RunDir, start: Start, *, code: int, cause: str, step: int | None, in_vain: str) -> None:
    job_events.note(run_dir, start, "ended", code=code, cause=cause, step=step, num_nodes=len(start.nodes), elapsed_s=0, in_vain=in_vain)


def hold_stop_signals() -> None:
    """A signal that asks the job to stop must not end this short work half way; the script hears it as well."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)


def main(arguments: list[str]) -> int:
    """Ask, and turn an error into a message and an exit code."""
    if len(arguments) != 2:
        raise SystemExit("usage: python -m prottrans_hpc.launch.begin SCHEDULER RUN_DIR")
    hold_stop_signals()
    try:
        print(begin(arguments[0], RunDir(Path(arguments[1])), os.environ), flush=True)
        return errors.DONE
    except (ProttransError, OSError) as error:
        if isinstance(error, RefusedError):
            print(REFUSED, flush=True)
        print(f"error: {terminal.printable_lines(errors.explain(error))}", file=sys.stderr, flush=True)
        return errors.exit_code(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
