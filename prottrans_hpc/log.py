"""Logging of the ranks: one file a node, written by all its ranks with whole-record appends; rank 0 speaks to the terminal too.

Rank 0 and local rank 0 of each node (an MPI starter need not make them the same) log from INFO on, the others only
warnings and errors. No rank has a file of its own: thousands of small files hurt a shared file system. A full disk or
a closed terminal never stops training.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from pathlib import Path

from . import terminal
from .rank import RankContext
from .run_dir import RunDir


class RecordFormatter(logging.Formatter):
    """`time level host rank logger: message`; further lines are indented, so that no text can pass for a record of its own."""

    def __init__(self, context: RankContext) -> None:
        super().__init__()
        self._who = f"{terminal.printable(context.hostname)} rank {context.rank}"

    def format(self, record: logging.LogRecord) -> str:
        """One record, possibly several lines, each safe to show."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        text = record.getMessage() + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")
        return f"{when} {record.levelname} {self._who} {record.name}: {terminal.printable_lines(text)}"


class AppendHandler(logging.Handler):
    """Appends each record with one write, which the ranks of a node can do to one file without mixing lines."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; what the file system refuses is lost."""
        try:
            content = (self.format(record) + "\n").encode("utf-8", "backslashreplace")
        except Exception:
            self.handleError(record)
            return
        with contextlib.suppress(OSError):
            os.write(self._descriptor, content)

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            os.close(self._descriptor)
        super().close()


class TerminalHandler(logging.Handler):
    """Shows messages on standard error, as the terminal's verbosity says."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show one message; a closed terminal is no reason to stop."""
        if record.levelno < logging.WARNING and terminal.verbosity() < terminal.NORMAL:
            return
        message = terminal.printable_lines(record.getMessage())
        with contextlib.suppress(OSError, ValueError):
            print(f"{record.levelname.lower()}: {message}" if record.levelno >= logging.WARNING else message, file=sys.stderr, flush=True)


def setup(run_dir: RunDir, context: RankContext) -> None:
    """Send log records, and Python's warnings, where this rank's belong; a second call replaces the first."""
    path = run_dir.node_log(context.node_rank)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handlers: list[logging.Handler] = [AppendHandler(path)]
    handlers[0].setFormatter(RecordFormatter(context))
    handlers[0].setLevel(logging.INFO if context.is_node_main or context.is_main else logging.WARNING)
    if context.is_main:
        handlers.append(TerminalHandler())
    logging.captureWarnings(True)
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if isinstance(handler, (AppendHandler, TerminalHandler))]:
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.addFilter(_is_of_interest)
        root.addHandler(handler)
    root.setLevel(logging.INFO)


def _is_of_interest(record: logging.LogRecord) -> bool:
    """Other packages are heard when they warn."""
    return record.levelno >= logging.WARNING or record.name.partition(".")[0] in ("prottrans_hpc", "__main__")
