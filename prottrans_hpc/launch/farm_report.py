"""What a farm tells about its jobs: why one ended, the last words of its log, and the logs as they grow."""

from __future__ import annotations

from pathlib import Path

from .. import errors, terminal
from . import verdicts
from .farm_files import FarmFiles


def cause(code: int | None) -> str:
    """How a job ended, to go on after "job 3"; None is no exit code at all."""
    if code is None:
        return "ended without a word (killed, or its node was lost)"
    if code == errors.DONE:
        return "ended without its output"
    return f"ended with exit code {code} ({verdicts.describe_code(code)})"


def last_words(log: Path) -> str:
    """The last error in a log, or its last line."""
    try:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        return "it left no log"
    wanted = [line for line in lines if line.startswith("error: ")] or lines
    return terminal.printable(wanted[-1].removeprefix("error: "), 500) if wanted else "its log is empty"


class Follower:
    """Prints what the jobs print, line by line, on standard error."""

    def __init__(self, files: FarmFiles, num_jobs: int) -> None:
        self._logs = [files.log(number) for number in range(num_jobs)]
        self._shown = [log.stat().st_size if log.exists() else 0 for log in self._logs]

    def show(self) -> None:
        """Print the whole lines that are new."""
        for number, log in enumerate(self._logs):
            if not log.exists() or log.stat().st_size <= self._shown[number]:
                continue
            with log.open("rb") as file:
                file.seek(self._shown[number])
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._shown[number] += len(whole)
            for line in whole.splitlines():
                terminal.note(f"[{number}] {terminal.printable(line, 500)}")
