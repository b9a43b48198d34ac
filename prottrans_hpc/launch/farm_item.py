"""`python -P -m prottrans_hpc.launch.farm_item FOLDER NUMBER TRY TOKEN`: one job of a farm, on its node.

Runs the commands of the job side by side (one a GPU, or just one), writes what they print to the job's log, hands
signals on to them, and leaves its exit code in a file: that, not submitit's pickle, tells the farm how it ended.

A submission that was interrupted may have left jobs in the queue of which the farm knows nothing. So each carries a
token, and works only as long as the farm's file of the job names the same one: no scheduler has to be asked.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import durable, errors
from .children import STOP_SIGNALS, Deadline, die_with_parent, hold_signals, next_signal, shell_code, start
from .farm_files import FarmFiles

_GRACE_S = 60.0
_LOOK_EVERY_S = 1.0
_FENCE_EVERY_S = 5.0
_STALE_S = 75.0
"""For so long a node may see an older file than the farm has written: NFS keeps what it knows of files and folders for up to 60 s."""


def run(argv: Sequence[str]) -> int:
    """What submitit runs: start a command and wait for it. All that its pickle holds is the command's words.

    submitit ends a job by raising from a signal handler; the command is then asked to stop, and given time to save.
    """
    child = subprocess.Popen(list(argv))
    try:
        return child.wait()
    except BaseException:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE_S)
        child.kill()
        child.wait()
        raise


def main(arguments: list[str]) -> int:
    """Run job NUMBER of the farm in FOLDER for the TRY-th time, counted from 1, unless another submission than TOKEN's is to do it."""
    die_with_parent(os.getppid())
    hold_signals()
    files, number, attempt, token = FarmFiles(Path(arguments[0])), int(arguments[1]), int(arguments[2]), arguments[3]
    fence = Fence(files.job(number), token)
    job = fence.wait()
    if job is None:
        print(f"{files.job(number)} is not for this submission: nothing to do", file=sys.stderr, flush=True)
        return errors.REQUEUE
    record = files.outcome(number, attempt, token)
    record.unlink(missing_ok=True)  # a batch system that requeues starts the same try again
    started = time.monotonic()
    with files.log(number).open("ab", buffering=0) as log:
        log.write(f"--- try {attempt} on {os.uname().nodename}, {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}\n".encode())
        codes = _run_all(job, log, fence)
    if fence.is_lost:
        return errors.REQUEUE
    code = worst(codes)
    durable.write_json(record, {"code": code, "host": os.uname().nodename, "seconds": round(time.monotonic() - started, 3)})
    return code


class Fence:
    """Whether a submission is still the one that is to do a job."""

    def __init__(self, path: Path, token: str) -> None:
        self._path, self._token = path, token
        self._next_look = time.monotonic() + _FENCE_EVERY_S
        self._num_misses = 0

    @property
    def is_lost(self) -> bool:
        """Whether another one has taken its place. One look that says so may have met a file system in disorder."""
        return self._num_misses > 1

    def wait(self) -> dict[str, Any] | None:
        """What the job runs; None when it is not for this submission, for longer than a node may see old files, or a signal came."""
        end = time.monotonic() + _STALE_S
        while (job := self._read()) is None and time.monotonic() < end:
            if next_signal(_FENCE_EVERY_S) in STOP_SIGNALS:
                return None
        return job

    def look(self) -> None:
        """Look again, if it is time."""
        if self.is_lost or time.monotonic() < self._next_look:
            return
        # Once the node has seen our token it sees no older one: what differs now is newer.
        self._num_misses = 0 if self._read() is not None else self._num_misses + 1
        self._next_look = time.monotonic() + _FENCE_EVERY_S

    def _read(self) -> dict[str, Any] | None:
        try:
            job: dict[str, Any] = durable.read_json(self._path)
        except (OSError, errors.DataError):
            return None
        return job if job.get("token") == self._token else None


def _run_all(job: dict[str, Any], log: Any, fence: Fence) -> list[int]:
    running = [start(command["argv"], env=os.environ | command["environment"], output=log, own_session=True) for command in job["commands"]]
    is_told = False
    grace = Deadline()
    while any(child.poll() is None for child in running):
        number = next_signal(_LOOK_EVERY_S)
        fence.look()
        if fence.is_lost:
            number, is_told = (number, True) if is_told else (STOP_SIGNALS[0], True)
            grace.set_in(_GRACE_S)
        # Without a batch system nobody else ends what is left of a farm whose command was killed.
        if not is_told and job["driver"] is not None and not _is_alive(job["driver"]):
            number, is_told = STOP_SIGNALS[0], True
        if grace.is_past:
            number = signal.SIGKILL
        if number in (*STOP_SIGNALS, signal.SIGKILL):
            for child in running:
                child.send_signal(number)
    return [shell_code(child.returncode) for child in running]


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def worst(codes: Sequence[int]) -> int:
    """The exit code of several commands: that of the first that failed; one that only stopped early counts less."""
    failed = [code for code in codes if code != errors.DONE]
    return next((code for code in failed if code != errors.REQUEUE), failed[0] if failed else errors.DONE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
