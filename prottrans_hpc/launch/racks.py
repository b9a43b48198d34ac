"""Racks, nodes and GPUs into a number of nodes: whole racks wherever a job can ask for them. Pure."""

from __future__ import annotations

from ..errors import ConfigError
from ..machine import Machine
from .demand import Demand


def count_nodes(machine: Machine, demand: Demand) -> tuple[int, int | None]:
    """Nodes, and the whole racks that they fill; None: any nodes. Raises ConfigError that names the nearest sizes."""
    num_nodes = _asked_nodes(machine, demand)
    if not 1 <= num_nodes <= machine.max_nodes:
        racks = f" ({machine.max_nodes // machine.nodes_per_rack} racks)" if machine.nodes_per_rack and machine.max_nodes >= machine.nodes_per_rack else ""
        raise ConfigError(f"a job on {machine.name} has 1 to {machine.max_nodes} nodes{racks}; {num_nodes} were asked for")
    if not has_whole_racks(machine) or demand.partial_rack:
        return num_nodes, None
    per_rack = machine.nodes_per_rack or 1
    if num_nodes % per_rack:
        raise ConfigError(_not_whole(machine, num_nodes))
    return num_nodes, num_nodes // per_rack


def has_whole_racks(machine: Machine) -> bool:
    """Whether jobs of this machine can ask for whole racks."""
    return machine.rack_placement != "none" and largest_rack_count(machine) > 0


def largest_rack_count(machine: Machine) -> int:
    """Racks that one job may have at most; 0 without racks."""
    if machine.nodes_per_rack is None:
        return 0
    fitting = machine.max_nodes // machine.nodes_per_rack
    return min(fitting, machine.num_racks) if machine.num_racks else fitting


def racks_text(num_racks: int, per_rack: int) -> str:
    """ "52 racks = 936 nodes"."""
    return f"{num_racks} {'rack' if num_racks == 1 else 'racks'} = {num_racks * per_rack} nodes"


def _asked_nodes(machine: Machine, demand: Demand) -> int:
    if demand.num_racks is not None:
        return _nodes_of_racks(machine, demand.num_racks)
    if demand.num_gpus is not None:
        return _nodes_of_gpus(machine, demand.num_gpus, whole_racks=has_whole_racks(machine) and not demand.partial_rack)
    if demand.num_nodes is None and has_whole_racks(machine) and not demand.partial_rack:
        raise ConfigError(f"say how large the job is: --racks R (1 to {largest_rack_count(machine)} of {machine.nodes_per_rack} nodes on {machine.name})")
    return 1 if demand.num_nodes is None else demand.num_nodes


def _nodes_of_racks(machine: Machine, num_racks: int) -> int:
    if machine.nodes_per_rack is None or not largest_rack_count(machine):
        raise ConfigError(f"{machine.name} has no racks that a job could ask for: give --nodes N (1 to {machine.max_nodes})")
    if not 1 <= num_racks <= largest_rack_count(machine):
        raise ConfigError(f"a job on {machine.name} has 1 to {largest_rack_count(machine)} racks of {machine.nodes_per_rack} nodes; {num_racks} were asked for")
    return num_racks * machine.nodes_per_rack


def _nodes_of_gpus(machine: Machine, num_gpus: int, *, whole_racks: bool) -> int:
    per_node = machine.node.num_gpus
    if not per_node:
        raise ConfigError(f"{machine.name} has no GPUs: give --nodes N (1 to {machine.max_nodes})")
    if num_gpus < 1 or num_gpus % per_node:
        per_rack = machine.nodes_per_rack or 1
        unit, what = (per_rack, f"whole racks of {per_rack} nodes x {per_node} GPUs") if whole_racks else (1, f"whole nodes of {per_node} GPUs")
        low, most = num_gpus // (per_node * unit), largest_rack_count(machine) if whole_racks else machine.max_nodes
        sizes = [count * unit for count in (low, low + 1) if 1 <= count <= most] or [most * unit]
        offers = " or ".join(f"{nodes * per_node:,} GPUs = {racks_text(nodes // unit, unit) if whole_racks else _nodes_text(nodes)}" for nodes in sizes)
        parts = ", or give --partial-rack for whole nodes" if whole_racks else ""
        raise ConfigError(f"jobs on {machine.name} get {what}; {num_gpus:,} GPUs were asked for: take {offers}{parts}")
    return num_gpus // per_node


def _nodes_text(num_nodes: int) -> str:
    return f"{num_nodes:,} {'node' if num_nodes == 1 else 'nodes'}"


def _not_whole(machine: Machine, num_nodes: int) -> str:
    per_rack = machine.nodes_per_rack or 1
    low = num_nodes // per_rack
    offers = [racks_text(count, per_rack) for count in (low, low + 1) if 1 <= count <= largest_rack_count(machine)]
    return (
        f"{num_nodes} nodes are not whole racks of {machine.name} ({per_rack} nodes each): take {' or '.join(offers)}, "
        "or give --partial-rack if parts of racks are meant"
    )
