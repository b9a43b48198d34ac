"""`python -m prottrans_hpc.launch.tether [--codes DIR] CMD...`: run CMD so that it dies with its parent.

Job scripts of the local scheduler put it in front of starters that are not ours, so that a kill of the script
cannot leave mpirun or its ranks behind. A batch system does this itself.

With ``--codes DIR`` the first command of a start that fails leaves its exit code in DIR, for torchrun, which
ends with 1 whatever its ranks ended with.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from .children import die_with_parent, hold_signals, next_signal, shell_code, start

CODE_FILE_PREFIX = ".exit-code-"
"""Followed by the nonce of the start."""
_USAGE = "usage: python -m prottrans_hpc.launch.tether [--codes DIR] CMD..."


def main(arguments: list[str]) -> int:
    """Set the tether, then turn into the command, or watch it."""
    codes = arguments[1:2] if arguments[:1] == ["--codes"] else []
    command = arguments[2 if codes else 0 :]
    if not command:
        raise SystemExit(_USAGE)
    die_with_parent(os.getppid())
    if codes:
        return _watch(command, Path(codes[0], CODE_FILE_PREFIX + os.environ["PROTTRANS_NONCE"]))
    os.execvp(command[0], command)


def _watch(command: Sequence[str], code_file: Path) -> int:
    hold_signals()
    child = start(command, hold_stop_signals=True)
    while child.poll() is None:
        number = next_signal(None)
        if number is not None and number != signal.SIGCHLD:
            child.send_signal(number)
    code = shell_code(child.returncode)
    if code:
        with contextlib.suppress(OSError), open(code_file, "x", encoding="ascii") as file:
            file.write(f"{code}\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
