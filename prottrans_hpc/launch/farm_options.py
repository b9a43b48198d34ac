"""The options by which a verb becomes a farm, and the plan that they come to."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import terminal
from ..errors import ConfigError
from .demand import Demand
from .options import account, machine_option, run_here, size
from .racks import largest_rack_count

if TYPE_CHECKING:
    from ..machine import Machine
    from .farm_plan import FarmPlan

Command = Callable[..., Any]
_ITEMS_PER_NODE = 4
"""Jobs that each node works off one after the other: a failed one costs a quarter of a node's work."""


@dataclass(frozen=True)
class FarmDemand:
    """What a command line asks for beside the work itself."""

    machine: str
    """Name or path of a profile."""
    demand: Demand = field(default_factory=Demand)
    account: str | None = None
    num_items: int | None = None
    """Jobs of one node; None: by the size."""
    dry_run: bool = False
    follow: bool = False


def farm_options(command: Command) -> Command:
    """Add ``--machine``, the size, ``--account``, ``--items``, ``--dry-run`` and ``--follow``; the verb gets them as `asked`, a FarmDemand."""

    @functools.wraps(command)
    def wrapped(*args: Any, machine: str, demand: Demand, account: str | None, items: int | None, dry_run: bool, follow: bool, **kwargs: Any) -> Any:
        return command(*args, asked=FarmDemand(machine, demand, account, items, dry_run, follow), **kwargs)

    whole: Command = wrapped
    for decorate in (
        click.option("--follow", is_flag=True, help="Print what the items print as they do."),
        click.option("--dry-run", is_flag=True, help="Print what would be submitted, and do nothing else."),
        click.option("--items", metavar="K", type=click.IntRange(1, 100_000), help="Cut the work into K jobs of one node each.  [default: by --nodes]"),
        account,
        size,
        machine_option,
    ):
        whole = decorate(whole)
    return whole


def plan_farm(stage: str, asked: FarmDemand, *, out: Path, one_a_gpu: bool) -> FarmPlan | None:
    """The farm that a command line asks for; None: the work is done in this process, as on a laptop. Raises ConfigError."""
    from ..machine import read_machine

    machine, demand, num_items = read_machine(asked.machine), asked.demand, asked.num_items
    sizes = (num_items, demand.num_nodes, demand.num_racks, demand.num_gpus)
    if machine.scheduler == "local" and not asked.dry_run and all(value is None for value in sizes):
        if asked.follow:
            raise click.UsageError("--follow is for work on other nodes; here everything is printed anyway")
        return None
    from . import queues
    from .farm_plan import FarmPlan

    if machine.account_required and asked.account is None:
        raise ConfigError(f"{machine.name} charges a project: give --account")
    slot = queues.choose(machine, 1, demand) if machine.scheduler != "local" else None
    nodes = wanted_nodes(machine, demand)
    check_size(machine, demand, nodes)
    num_at_once = nodes or min(num_items or 1, machine.max_nodes)
    waves = _ITEMS_PER_NODE if one_a_gpu and machine.scheduler != "local" else 1
    return FarmPlan(
        machine=machine,
        folder=folder_beside(out, machine),
        name=re.sub(r"[^A-Za-z0-9._-]", "_", f"{stage}-{out.stem}")[:64],
        num_jobs=num_items or num_at_once * waves,
        num_at_once=min(num_at_once, num_items or num_at_once),
        walltime_min=slot.walltime_min if slot else None,
        queue=slot.queue.name if slot else None,
        account=asked.account,
        shares_per_job=max(1, machine.node.num_gpus) if one_a_gpu else 1,
        flags=terminal.flags(),
        follow=asked.follow,
        ends_at_failure=not one_a_gpu,
    )


def wanted_nodes(machine: Machine, demand: Demand) -> int | None:
    """Nodes that may work at the same time; None: not said. Raises ConfigError for a size that does not fit the machine."""
    if demand.num_racks is not None:
        if machine.nodes_per_rack is None:
            raise ConfigError(f"{machine.name} has no racks: give --nodes")
        return demand.num_racks * machine.nodes_per_rack
    if demand.num_gpus is not None:
        if not machine.node.num_gpus or demand.num_gpus % machine.node.num_gpus:
            raise ConfigError(f"a node of {machine.name} has {machine.node.num_gpus} GPUs, and jobs take whole nodes: give --nodes")
        return demand.num_gpus // machine.node.num_gpus
    return demand.num_nodes


def check_size(machine: Machine, demand: Demand, num_nodes: int | None) -> None:
    """Raise ConfigError, with the nearest size, for more nodes than the machine has."""
    if demand.num_racks is not None and demand.num_racks > largest_rack_count(machine):
        raise ConfigError(
            f"{machine.name} has {largest_rack_count(machine):,} racks; {demand.num_racks:,} were asked for: take --racks {largest_rack_count(machine)}"
        )
    if num_nodes is not None and num_nodes > machine.max_nodes:
        gpus = f" ({machine.max_nodes * machine.node.num_gpus:,} GPUs)" if demand.num_gpus is not None else ""
        raise ConfigError(f"{machine.name} has {machine.max_nodes:,} nodes{gpus}; {num_nodes:,} were asked for: take --nodes {machine.max_nodes}")


def folder_beside(out: Path, machine: Machine) -> Path:
    """The farm's folder. Raises ConfigError for a path that batch systems would not take as it stands."""
    folder = out.absolute().with_name(f"{out.name}.farm")
    # submitit, Slurm and LSF put job ids in the place of %j, %A and %J; LSF has no way to write some others.
    strange = sorted(set(str(folder)) & set('%"\\$`' if machine.scheduler == "lsf" else "%"))
    if strange:
        raise ConfigError(
            f"work on several nodes takes no path with {' '.join(strange)}, which job scripts would misread: choose another --out; it is {out.absolute()}"
        )
    return folder


def run_on_farm(stage: str, request: dict[str, Any], plan: FarmPlan, *, first_round: str, dry_run: bool, fresh: bool) -> None:
    """Print what would be submitted first, or run the stage with its items on the farm."""
    from . import farm

    nodes = "1 node" if plan.num_at_once == 1 else f"{plan.num_at_once} nodes"
    terminal.note(f"machine: {plan.machine.name}, {plan.num_jobs} jobs of one node, {nodes} at a time; {plan.folder} holds their logs until all is done")
    if dry_run:
        sys.stdout.write(farm.preview(plan, first_round))
        if plan.num_rest:
            terminal.note(f"the first {plan.num_jobs - plan.num_rest:,} jobs; the other {plan.num_rest:,} follow in arrays of this size, one after the other")
        return
    if plan.machine.scheduler != "local":
        terminal.note("this command watches the jobs and puts the results together: keep it running (tmux, nohup), or run it again to go on")
    with farm.opened(plan, fresh=fresh) as handle:
        run_here(stage, request | {"farm": handle})


def absolute(paths: tuple[Path, ...]) -> list[str]:
    """Paths as every node finds them."""
    return [os.path.abspath(path) for path in paths]
