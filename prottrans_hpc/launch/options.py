"""Options that several verbs share, and how a stage is run in the process of the command line itself."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import click

from .. import terminal
from ..errors import RequeueRequested
from ..stage import Request, run_stage

Command = Callable[..., Any]

INVALID = ("error", "x", "skip")
PRECISIONS = ("fp32", "bf16", "fp16")


def examples(*lines: str) -> str:
    """The epilog of a verb's help: commands to copy."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def verbosity(command: Command) -> Command:
    """Add ``-q/--quiet`` and ``-v/--verbose``."""

    @click.option("-q", "--quiet", is_flag=True, help="Show errors and warnings only.")
    @click.option("-v", "--verbose", is_flag=True, help="Show details, and the traceback of an error.")
    @functools.wraps(command)
    def wrapped(*args: Any, quiet: bool, verbose: bool, **kwargs: Any) -> Any:
        if quiet and verbose:
            raise click.UsageError("--quiet and --verbose contradict each other")
        if quiet or verbose:
            terminal.set_verbosity(terminal.QUIET if quiet else terminal.VERBOSE)
        return command(*args, **kwargs)

    return wrapped


def as_json(command: Command) -> Command:
    """Add ``--json``."""
    option = click.option("--json", "as_json", is_flag=True, help="Print data as JSON on standard output.")
    return option(command)


def path_argument(*declarations: str, **attributes: Any) -> Callable[[Command], Command]:
    """An argument that is a path of any kind; whether it exists is for the verb to say, with the exit code that fits."""
    return click.argument(*declarations, type=click.Path(path_type=Path), **attributes)


def path_option(*declarations: str, **attributes: Any) -> Callable[[Command], Command]:
    """An option that is a path of any kind."""
    return click.option(*declarations, type=click.Path(path_type=Path), **attributes)


def run_here(stage: str, request: Request) -> None:
    """Run a stage in this process; SIGTERM unwinds it in order, so that nothing half-made stays behind."""
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        run_stage(stage, request)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _stop(number: int, frame: FrameType | None) -> None:
    raise RequeueRequested("stopped by SIGTERM; the same command does what is left")
