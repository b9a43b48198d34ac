"""What a person sees while a command works: notes, warnings and progress, all on standard error.

Standard output is left to the data that a command prints, so that it can be piped. Text that comes from
files (FASTA headers above all) passes through `printable` before it reaches a terminal.
"""

from __future__ import annotations

import contextlib
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator

QUIET, NORMAL, VERBOSE = 0, 1, 2
FLAGS: dict[int, tuple[str, ...]] = {QUIET: ("--quiet",), NORMAL: (), VERBOSE: ("--verbose",)}
"""How a level is said on the command line of a process that is started."""
LEVELS = {flag: level for level, flags in FLAGS.items() for flag in flags}
_PLAIN_LINE_EVERY_S = 10.0
_LONGEST_LINE = 4000
_state = {"verbosity": NORMAL}


def set_verbosity(level: int) -> None:
    """QUIET shows errors and warnings only, VERBOSE shows details too."""
    _state["verbosity"] = level


def verbosity() -> int:
    """The level that `set_verbosity` chose."""
    return _state["verbosity"]


def flags() -> tuple[str, ...]:
    """What makes a process that is started say as much as this one."""
    return FLAGS[verbosity()]


def printable(text: str | bytes, limit: int = 200) -> str:
    """`text` with control, bidirectional and unassigned characters escaped, cut to `limit` characters (CWE-150)."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    safe = "".join(c if unicodedata.category(c)[0] not in "CZ" or c == " " else c.encode("unicode_escape").decode() for c in text[: limit + 1])
    return safe if len(safe) <= limit else safe[: limit - 3] + "..."


def printable_lines(text: str, limit: int = _LONGEST_LINE) -> str:
    """Like `printable`, but with its line breaks, behind which it is indented, so that no text can pass for a message of its own."""
    return "\n  ".join(printable(line, limit) for line in text.rstrip("\n").split("\n"))


def note(message: str) -> None:
    """A line about what is happening."""
    if _state["verbosity"] >= NORMAL:
        print(message, file=sys.stderr, flush=True)


def detail(message: str) -> None:
    """A line that only ``--verbose`` shows."""
    if _state["verbosity"] >= VERBOSE:
        print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """A line that is always shown."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


Advance = Callable[[float], None]


@contextlib.contextmanager
def progress(label: str, *, total: float | None, unit: str) -> Iterator[Advance]:
    """Yield `advance(amount)`: a bar on a terminal, a plain line every ten seconds elsewhere, nothing when quiet."""
    if _state["verbosity"] < NORMAL:
        yield lambda amount: None
    elif sys.stderr.isatty():
        with _bar(label, total, unit) as advance:
            yield advance
    else:
        with _lines(label, total, unit) as advance:
            yield advance


@contextlib.contextmanager
def _bar(label: str, total: float | None, unit: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    amount = "{task.completed:,.0f}/{task.total:,.0f} " if total is not None else "{task.completed:,.0f} "
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn(amount + unit, markup=False), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=False) as bars:
        task = bars.add_task(label, total=total)
        yield lambda amount: bars.advance(task, amount)


@contextlib.contextmanager
def _lines(label: str, total: float | None, unit: str) -> Iterator[Advance]:
    done = 0.0
    started = shown = time.monotonic()

    def advance(amount: float) -> None:
        nonlocal done, shown
        done += amount
        if time.monotonic() - shown >= _PLAIN_LINE_EVERY_S:
            shown = time.monotonic()
            of = f" of {total:,.0f}" if total else ""
            note(f"{label}: {done:,.0f}{of} {unit}, {shown - started:.0f} s")

    yield advance
    note(f"{label}: {done:,.0f} {unit} in {time.monotonic() - started:.1f} s")
