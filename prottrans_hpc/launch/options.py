"""Options that several verbs share, and how a stage is run in the process of the command line itself."""

from __future__ import annotations

import functools
import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import click

from .. import terminal
from ..errors import ConfigError, RequeueRequested
from ..stage import Request, run_stage
from .demand import Demand, parse_walltime

if TYPE_CHECKING:
    from ..run_dir import Preflight

Command = Callable[..., Any]

INVALID = ("error", "x", "skip")
PRECISIONS = ("fp32", "bf16", "fp16")
TYPED = "prottrans_hpc.typed"
"""Where a click context and all below it keep the command line."""


def command_line() -> str | None:
    """The command that runs, as a shell takes it; None outside of one. It holds no secret, for no option takes one."""
    context = click.get_current_context(silent=True)
    return context.meta.get(TYPED) if context else None


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


def positions(command: Command) -> Command:
    """Add ``--positions``."""
    help_text = "Give a learned position table so many rows: the first keep their weights, new ones are random. [default: as it is]"
    return click.option("--positions", type=click.IntRange(min=1), metavar="N", help=help_text)(command)


def as_minutes(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """The callback of an option that takes H:MM; "auto" is None."""
    try:
        return None if value is None else parse_walltime(value)
    except ConfigError as error:
        raise click.BadParameter(str(error), ctx, param) from error


def machine_option(command: Command) -> Command:
    """Add ``--machine``, the name or path of a profile."""
    help_text = "A machine profile of hpc/, or a path that ends in .toml."
    return click.option("--machine", metavar="NAME", default="laptop", show_default=True, help=help_text)(command)


def size(command: Command) -> Command:
    """Add ``--racks``, ``--nodes``, ``--gpus``, ``--partial-rack``, ``--walltime`` and ``--queue``; the verb gets them as `demand`, a Demand."""

    @click.option("--racks", "num_racks", metavar="R", type=click.IntRange(1), help="Whole racks.")
    @click.option("--nodes", "num_nodes", metavar="N", type=click.IntRange(1), help="On a laptop: groups of processes.  [default: 1]")
    @click.option("--gpus", "num_gpus", metavar="G", type=click.IntRange(1), help="All GPUs of so many nodes.")
    @click.option("--partial-rack", is_flag=True, help="Nodes that do not fill whole racks are meant.")
    @click.option(
        "--walltime", "walltime_min", metavar="H:MM|auto", callback=as_minutes, help="How long a job may run.  [default: auto, the longest for its size]"
    )
    @click.option("--queue", metavar="Q", help="A queue of the machine.  [default: its first]")
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        num_racks: int | None,
        num_nodes: int | None,
        num_gpus: int | None,
        partial_rack: bool,
        walltime_min: int | None,
        queue: str | None,
        **kwargs: Any,
    ) -> Any:
        return command(*args, demand=Demand(num_racks, num_nodes, num_gpus, partial_rack, walltime_min, queue), **kwargs)

    return wrapped


def exclude(command: Command) -> Command:
    """Add ``--exclude``; the verb gets the nodes as `excluded`, None when it is not given."""
    help_text = "Batch systems: nodes that the job must not get, as in n[1-3],n7; none: all may be used again."
    return click.option("--exclude", "excluded", metavar="NODE[,NODE]", callback=_as_nodes, help=help_text)(command)


def preflight(command: Command) -> Command:
    """Add ``--preflight``; the verb gets a Preflight, "none", or None when it is not given."""
    help_text = (
        "Measure the job's own nodes before the training starts, and end with 71 when one is slower than GATE times the median (3), or nothing could "
        "be measured within SECONDS (300); none: train at once."
    )
    return click.option("--preflight", metavar="comm[:GATE[:SECONDS]]|none", callback=_as_preflight, help=help_text)(command)


def _as_preflight(ctx: click.Context, param: click.Parameter, value: str | None) -> Preflight | Literal["none"] | None:
    from ..run_dir import Preflight

    match = re.fullmatch(r"none|comm(?::(\d+(?:\.\d+)?))?(?::(\d{1,5}))?", value or "none", re.ASCII)
    if match is None:
        raise click.BadParameter(f"{value!r} is neither none nor comm, comm:GATE or comm:GATE:SECONDS, as in comm:3:300", ctx, param)
    if value in (None, "none"):
        return "none" if value else None
    given = Preflight(float(match[1] or Preflight.gate), int(match[2] or Preflight.limit_s))
    if given.gate <= 1 or given.limit_s < 1:
        raise click.BadParameter("the gate is a factor above 1, and the limit at least a second", ctx, param)
    return given


def _as_nodes(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    from .exclusion import parse_nodes

    try:
        return None if value is None else parse_nodes(value)
    except ConfigError as error:
        raise click.BadParameter(str(error), ctx, param) from error


def account(command: Command) -> Command:
    """Add ``--account``."""
    return click.option("--account", metavar="A", help="The project that the machine charges.")(command)


def settings(command: Command) -> Command:
    """Add ``--set``."""
    return click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, help="Change the recipe: section.key=value; may be repeated.")(command)


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
