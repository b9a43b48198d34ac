"""The command of a rank: `python -m prottrans_hpc STAGE RUN_DIR`. Its exit codes are those of errors.py."""

from __future__ import annotations

import sys

from .train import preemption

if __name__ == "__main__":
    # Before anything heavy is imported: from here on a signal asks for an orderly stop and cannot kill the rank.
    preemption.install()

import contextlib
import logging
import os
import traceback
from typing import NoReturn

from . import errors, rank, terminal
from .stage import run_stage

_STAGES = ("pretrain", "preflight", "comm")
"""What the ranks of a gang run."""
_USAGE = f"usage: python -m prottrans_hpc {'|'.join(_STAGES)} RUN_DIR [--quiet | --verbose]"
_log = logging.getLogger("prottrans_hpc")


def main(arguments: list[str]) -> int:
    """Run the stage and return the exit code; every error is told once, to the log when there is one."""
    if not 2 <= len(arguments) <= 3 or arguments[0] not in _STAGES or arguments[2:] not in ([], *([flag] for flag in terminal.LEVELS)):
        print(_USAGE, file=sys.stderr)
        return errors.USAGE
    for flag in arguments[2:]:
        terminal.set_verbosity(terminal.LEVELS[flag])
    try:
        if "PROTTRANS_NONCE" in os.environ and rank.detect(os.environ).is_main:
            preemption.watch(arguments[1], os.environ["PROTTRANS_NONCE"])
        run_stage(arguments[0], {"run_dir": arguments[1]})
    except errors.RequeueRequested as error:
        _log.info("%s (exit code %d)", error, error.exit_code)
        return error.exit_code
    except BaseException as error:
        code = errors.exit_code(error)
        _tell(error, code)
        _leave_at_once(code)
    return errors.DONE


def _tell(error: BaseException, code: int) -> None:
    message = errors.explain(error)  # the log escapes what it shows
    if _log.hasHandlers():
        _log.error("%s (exit code %d: %s)", message, code, errors.MEANING[code], exc_info=error if code == errors.BUG else None)
    else:
        print(f"error: {terminal.printable_lines(message)}", file=sys.stderr, flush=True)
        if code == errors.BUG:
            traceback.print_exception(error)


def _leave_code(code: int) -> None:
    """For a job script whose starter may not pass codes on: that of the first rank that failed, or else that rank 0 stopped."""
    path = os.environ.get("PROTTRANS_EXIT_CODE_FILE")
    if not path or code == errors.DONE:
        return
    with contextlib.suppress(OSError, errors.ConfigError):  # FileExistsError: another one was first
        if code != errors.REQUEUE or rank.detect(os.environ).is_main:
            with open(path, "x", encoding="ascii") as file:
                file.write(f"{code}\n")


def _leave_at_once(code: int) -> NoReturn:
    """End without Python's shutdown, in which a library could wait for ranks that are gone, or a thread of gloo abort."""
    _leave_code(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    final_code = main(sys.argv[1:])
    preemption.forget_signals()
    _leave_at_once(final_code)
