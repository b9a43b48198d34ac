"""Following a run: wait in the queue, then print the job's log as it grows, until the last of its jobs has ended.

Schedulers are asked seldom; the files of the run directory, which cost nothing, tell when it is worth asking. A job
has ended only when its scheduler says so twice: a requeued one is for a moment nowhere. To stop following never stops
the job.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import errors, run_dir, terminal
from ..errors import ProttransError, SubmitError
from ..run_dir import Jobs, RunDir
from . import local_process, progress, submission
from .job_state import State
from .run_facts import read_exit_code
from .run_files import GrowingFile

LOG_EVERY_S = 0.5
STATES_EVERY_S = 30.0
"""A scheduler is asked no more often than this by itself,"""
SOON_S = 3.0
"""or than this when a file of the run says that something has happened."""
ENDED_AFTER_ANSWERS = 2
GONE_AFTER_ANSWERS = 10
"""For jobs of which the scheduler has never told: one that is just submitted may not be in its tables yet."""
_LONGEST_LINE = 4000
_END_STATES = {State.DONE: errors.DONE, State.OUT_OF_MEMORY: errors.NO_RESOURCES, State.FAILED: errors.NO_RESOURCES}
"""Exit codes for jobs that could leave none; whatever else ends a job leaves a run that can go on."""


def log_size(directory: RunDir) -> int:
    """How long the job's log is now: taken before a submission, it tells `follow` where the new job's words begin."""
    return _size(directory.job_log)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def follow(directory: RunDir, job_ids: Sequence[str], *, log_from: int | None = None) -> int:
    """Print the job log as it grows until the jobs have ended; the exit code of the run, or 130 when Ctrl-C ended the following.

    `log_from` is the byte of the log to begin with; None: where it ends now.
    """
    log = GrowingFile(directory.job_log, start=log_from)
    return follow_file(directory, JobWatch(directory, job_ids), log)


def follow_file(directory: RunDir, watch: JobWatch, log: GrowingFile) -> int:
    """`follow`, for any of the run's log files."""
    try:
        while not watch.have_ended():
            if print_lines(log.new_lines()):
                watch.look_soon()
            time.sleep(LOG_EVERY_S)
        print_lines([*log.new_lines(), *log.unfinished_line()])
        return watch.exit_code()
    except KeyboardInterrupt:
        terminal.note(
            f"stopped following; the job goes on\n  follow: prottrans runs logs {directory.path} --follow\n  stop:   prottrans runs cancel {directory.path}"
        )
        return errors.INTERRUPTED
    finally:
        log.close()


def print_lines(lines: Sequence[bytes]) -> bool:
    """Print lines of a log safely; whether there were any."""
    for line in lines:
        print(terminal.printable(line.rstrip(b"\r").expandtabs(), _LONGEST_LINE))
    if lines:
        sys.stdout.flush()
    return bool(lines)


class JobWatch:
    """Knows when the jobs of a run have ended; asks their scheduler as seldom as it can, and tells how their states change."""

    def __init__(self, directory: RunDir, job_ids: Sequence[str]) -> None:
        self._directory, self._job_ids = directory, tuple(job_ids)
        self._told: dict[str, State | None] = {}
        self._states: Mapping[str, State] = {}
        self._next_look = self._earliest_look = 0.0
        self._num_endings = 0
        self._warned = self._was_seen = False
        self._mark = _size(directory.jobs_log), read_exit_code(directory)

    def look_soon(self) -> None:
        """Something has happened that may have changed a state, if the jobs are not known to run."""
        if State.RUNNING not in self._states.values():
            self._next_look = min(self._next_look, self._earliest_look)

    def have_ended(self) -> bool:
        """Whether no job of the run is alive any more, as far as was asked."""
        jobs = run_dir.read_jobs(self._directory)
        if jobs is None or jobs.scheduler == "local":
            return jobs is None or not local_process.runs(self._directory, jobs)
        mark = _size(self._directory.jobs_log), read_exit_code(self._directory)
        if mark != self._mark:
            self._mark, self._next_look = mark, min(self._next_look, self._earliest_look)
        if time.monotonic() >= self._next_look:
            self._look(jobs)
        return self._num_endings >= (ENDED_AFTER_ANSWERS if self._was_seen else GONE_AFTER_ANSWERS)

    def _look(self, jobs: Jobs) -> None:
        job_ids = tuple(dict.fromkeys((*self._job_ids, *jobs.job_ids)))  # a job may have submitted another in its place
        try:
            states = submission.states(jobs.scheduler, job_ids)
        except SubmitError as error:
            self._warn(error)
            self._plan_next(STATES_EVERY_S)
            return
        self._states, self._warned, self._was_seen = states, False, self._was_seen or bool(states)
        self._tell(jobs, job_ids)
        self._num_endings = 0 if any(state.is_alive for state in states.values()) else self._num_endings + 1
        self._plan_next(SOON_S if self._num_endings else STATES_EVERY_S)

    def _plan_next(self, seconds: float) -> None:
        now = time.monotonic()
        self._earliest_look, self._next_look = now + SOON_S, now + seconds

    def _warn(self, error: SubmitError) -> None:
        if not self._warned:
            terminal.warn(f"{error}. It will be asked again; meanwhile the job counts as alive")
        self._warned = True

    def _tell(self, jobs: Jobs, job_ids: Sequence[str]) -> None:
        for job_id in job_ids:
            state = self._states.get(job_id)
            if job_id in self._told and self._told[job_id] is state:
                continue
            if state or self._was_seen:
                text = _WORDS[state] if state else f"is not known to {jobs.scheduler} any more"
                terminal.note(f"{time.strftime('%H:%M:%S')} job {job_id} {text}")
            self._told[job_id] = state

    def exit_code(self) -> int:
        """The exit code of the run after its last job, also of one that could not leave any."""
        code = read_exit_code(self._directory)
        if code is not None:
            return code
        if _is_done(self._directory):
            return errors.DONE
        last = next((self._states[job_id] for job_id in reversed(self._job_ids) if job_id in self._states), None)
        code = _END_STATES.get(last, errors.REQUEUE) if last else errors.REQUEUE
        how = f"as {last}" if last else "without a word"
        terminal.warn(f"the job ended {how} and left no exit code; taken as {code}: {errors.MEANING[code]}")
        return code


_WORDS = {
    State.PENDING: "waits in the queue",
    State.RUNNING: "runs",
    State.STOPPING: "is being ended",
    State.SUSPENDED: "is suspended",
    State.DONE: "is done",
    State.FAILED: "has failed",
    State.CANCELLED: "was cancelled",
    State.PREEMPTED: "was preempted",
    State.TIMEOUT: "was ended by its walltime",
    State.NODE_LOST: "lost a node",
    State.OUT_OF_MEMORY: "ran out of memory",
    State.UNKNOWN: "is in a state that this program does not know; it counts as alive",
}


def _is_done(directory: RunDir) -> bool:
    try:
        return progress.read_progress(directory).is_done
    except ProttransError:
        return False
