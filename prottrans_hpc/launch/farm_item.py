"""`python -P -m prottrans_hpc.launch.farm_item FOLDER NUMBER TRY`: one job of a farm, on its node.

Runs the commands of the job side by side (one a GPU, or just one), writes what they print to the job's log, hands
signals on to them, and leaves its exit code in a file: that, not submitit's pickle, tells the farm how it ended.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import durable, errors
from .children import STOP_SIGNALS, die_with_parent, hold_signals, next_signal, shell_code, start
from .farm_files import FarmFiles

_GRACE_S = 60.0
_LOOK_EVERY_S = 1.0


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
    """Run job NUMBER of the farm in FOLDER for the TRY-th time, counted from 1."""
    die_with_parent(os.getppid())
    hold_signals()
    files, number, attempt = FarmFiles(Path(arguments[0])), int(arguments[1]), int(arguments[2])
    record = files.outcome(number, attempt)
    record.unlink(missing_ok=True)  # a batch system that requeues starts the same try again
    job = durable.read_json(files.job(number))
    started = time.monotonic()
    with files.log(number).open("ab", buffering=0) as log:
        log.write(f"--- try {attempt} on {os.uname().nodename}, {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}\n".encode())
        codes = _run_all(job, log)
    code = worst(codes)
    durable.write_json(record, {"code": code, "host": os.uname().nodename, "seconds": round(time.monotonic() - started, 3)})
    return code


def _run_all(job: dict[str, Any], log: Any) -> list[int]:
    running = [start(command["argv"], env=os.environ | command["environment"], output=log, own_session=True) for command in job["commands"]]
    is_told = False
    while any(child.poll() is None for child in running):
        number = next_signal(_LOOK_EVERY_S)
        # Without a batch system nobody else ends what is left of a farm whose command was killed.
        if not is_told and job["driver"] is not None and not _is_alive(job["driver"]):
            number, is_told = STOP_SIGNALS[0], True
        if number in STOP_SIGNALS:
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
