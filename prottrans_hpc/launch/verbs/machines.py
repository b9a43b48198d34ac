"""`prottrans machines`: the machine profiles that ship, and everything in one of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from ..demand import time_text
from ..options import as_json, examples, verbosity
from .machines_new import new

if TYPE_CHECKING:
    from ...machine import Machine


@click.group(
    invoke_without_command=True, epilog=examples("prottrans machines", "prottrans machines show summit", "prottrans machines new --out my_cluster.toml")
)
@as_json
@verbosity
@click.pass_context
def machines(context: click.Context, as_json: bool) -> None:
    """List the machine profiles that ship, or show one."""
    if context.invoked_subcommand is None:
        _print_list(as_json)
    elif as_json:
        context.obj = {"json": True}


machines.add_command(new)


@machines.command("list", epilog=examples("prottrans machines list", "prottrans machines list --json"))
@as_json
@verbosity
@click.pass_context
def list_(context: click.Context, as_json: bool) -> None:
    """List the machine profiles that ship."""
    _print_list(as_json or bool(context.obj))


@machines.command(epilog=examples("prottrans machines show summit", "prottrans machines show ./my_cluster.toml --json"))
@click.argument("name", metavar="NAME")
@as_json
@verbosity
@click.pass_context
def show(context: click.Context, name: str, as_json: bool) -> None:
    """Print everything in one machine profile: a name from hpc/, or a path that ends in .toml."""
    from ... import config
    from ...machine import read_machine

    machine = read_machine(name)
    if as_json or context.obj:
        click.echo(json.dumps(config.to_json(machine), indent=1))
        return
    for line in _describe(machine):
        click.echo(line)


def _print_list(as_json: bool) -> None:
    from ... import config
    from ...machine import read_machine

    profiles = [read_machine(name) for name in config.shipped_names("hpc")]
    if as_json:
        click.echo(json.dumps([config.to_json(profile) for profile in profiles], indent=1))
        return
    for profile in profiles:
        click.echo(f"{profile.name:<14} {profile.scheduler:<6} {profile.starter:<10} {profile.description}")


def _describe(machine: Machine) -> list[str]:
    lines = [f"{machine.name}: {machine.description}", f"jobs:     {machine.scheduler}, ranks started by {machine.starter}, {machine.ranks_per_node} a node"]
    lines.append(f"size:     {_size_text(machine)}")
    lines.append(f"node:     {_node_text(machine)}")
    lines += [f"network:  {_network_text(machine)}"] if machine.network else []
    for queue in machine.queues:
        lines.append(f"queue:    {queue.name}{_queue_marks(queue)}")
        lines += [
            f"  {row.min_nodes:>6,} to {row.max_nodes:>6,} nodes: {time_text(row.max_walltime_min)}{f'  (bin {row.name})' if row.name else ''}"
            for row in queue.bins
        ]
    lines += [f"licence:  {licence.name} for parallel.comm = {licence.comm!r}: at most {licence.max_nodes} nodes" for licence in machine.licences]
    if machine.account_required:
        lines.append("account:  required (--account)")
    if machine.queues:
        lines.append(f"warning:  {machine.warning_min} minutes before its walltime a job saves and stops")
    if machine.exclude_slow_nodes:
        lines.append("slow:     nodes that a run's history found slow are left out of its next start")
    if machine.starter == "jsrun":
        lines.append(f"jsrun:    one resource set a {machine.resource_set}")
    if machine.staging != "none":
        found = f"a copy that is there is believed by its {machine.staging_check}"
        after = {"keep": "stays for the next job", "remove": "is removed at the end"}[machine.staging_cleanup]
        lines.append(f"staging:  the corpus is copied to {machine.node.local_disk_path} of each node and {after}; {found}")
    lines += [f"python:   {machine.python}"] if machine.python else []
    lines += [f"prefix:   {' '.join(machine.launcher_prefix)}"] if machine.launcher_prefix else []
    lines += [f"header:   {line}" for line in machine.header_lines] + [f"set-up:   {line}" for line in machine.setup_lines]
    lines += [f"source:   {line}" for line in machine.sources]
    return [*lines, *(["retired:  the machine exists no more; the profile reproduces what ran there"] if machine.retired else [])]


def _size_text(machine: Machine) -> str:
    if machine.nodes_per_rack is None:
        return f"jobs of up to {machine.max_nodes:,} nodes"
    number = f"{machine.num_racks} racks" if machine.num_racks else "racks"
    how = f"jobs ask for whole racks ({machine.rack_placement})" if machine.rack_placement != "none" else "jobs cannot ask for whole racks"
    return f"jobs of up to {machine.max_nodes:,} nodes; {number} of {machine.nodes_per_rack}, {how}"


def _node_text(machine: Machine) -> str:
    node = machine.node
    parts = [f"{node.num_cpu_cores or 'all'} CPU cores"]
    if node.gpu is not None:
        peaks = ", ".join(f"{precision} {peak:g}" for precision, peak in node.gpu.peak_tflops.items())
        parts.append(f"{node.num_gpus} x {node.gpu.name} of {node.gpu.memory_gib:g} GiB ({peaks} TFLOP/s)")
    if node.host_memory_gib:
        parts.append(f"{node.host_memory_gib:g} GiB of memory")
    if node.local_disk_path:
        parts.append(f"{node.local_disk_gib or 0:,.0f} GiB at {node.local_disk_path}" if node.local_disk_gib else node.local_disk_path)
    return ", ".join(parts)


def _network_text(machine: Machine) -> str:
    links = {"within a node": machine.network and machine.network.within_node, "between nodes": machine.network and machine.network.between_nodes}
    return ", ".join(f"{link.bytes_per_s / 1e9:g} GB/s and {1e6 * link.latency_s:g} us {where}" for where, link in links.items() if link)


def _queue_marks(queue: Any) -> str:
    marks = [f"partition {queue.partition or 'chosen by the site'}"] if queue.partition is not None else []
    marks += [f"qos {queue.qos}"] if queue.qos else []
    marks += [f"preemptable after {queue.preemptable_after_min} minutes"] if queue.preemptable else []
    return f" ({', '.join(marks)})" if marks else ""
