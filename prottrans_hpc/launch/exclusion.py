"""Nodes that a job must not get: those named on the command line, and those that a run's history found slow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .. import config
from ..errors import ConfigError
from ..machine import Allocation, Machine
from ..run_dir import RunDir
from . import hostlist
from .run_files import read_records


def parse_nodes(text: str) -> tuple[str, ...]:
    """Nodes as Slurm writes them, `n[1-3],n7`; "none" is no node. Raises ConfigError."""
    try:
        names = hostlist.expand(text) if text != "none" else []
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return tuple(config.check_name(name, what="the node") for name in dict.fromkeys(names))


def leave_out(machine: Machine, allocation: Allocation, nodes: Sequence[str], run_dir: RunDir) -> Allocation:
    """The allocation without `nodes`, and, where the machine's profile says so, without those that the run's history found slow.

    Raises ConfigError where no scheduler could do that, or too few nodes would be left.
    """
    if machine.scheduler == "local":
        if nodes:
            raise ConfigError(f"--exclude is for batch systems: all ranks on {machine.name} run on this computer, so there is no other node to take instead")
        return replace(allocation, excluded_nodes=())
    room = machine.max_nodes - allocation.num_nodes
    if len(nodes) > room:
        raise ConfigError(
            f"{machine.name} gives a job at most {machine.max_nodes} nodes; without {hostlist.compress(nodes)} ({len(nodes)}) "
            f"{machine.max_nodes - len(nodes)} are left, and {allocation.num_nodes} were asked for: ask for fewer, or exclude fewer"
        )
    found = [node for node in slow_nodes(run_dir) if node not in nodes] if machine.exclude_slow_nodes else []
    # The newest are the likeliest to be slow still; and a run must not exclude itself out of the machine.
    return replace(allocation, excluded_nodes=(*nodes, *found[::-1][: room - len(nodes)]))


def slow_nodes(run_dir: RunDir) -> list[str]:
    """The hosts that a run's history found slow and not fast again, by their short names, the one found last at the end."""
    found: dict[str, None] = {}
    for event in read_records(run_dir.history):
        host = str(event.get("host", "")).partition(".")[0]
        if event.get("event") in ("slow node", "node recovered") and host:
            found.pop(host, None)
            if event["event"] == "slow node":
                found[host] = None
    return list(found)


def remarks(allocation: Allocation) -> list[str]:
    """What to say of it, one line each."""
    if not allocation.excluded_nodes:
        return []
    racks = ": a whole rack must do without them, so the job may wait longer" if allocation.num_racks else ""
    return [f"the job runs without {hostlist.compress(allocation.excluded_nodes)}{racks}"]
