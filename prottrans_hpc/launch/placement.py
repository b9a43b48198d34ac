"""Naming the nodes of a job where Slurm cannot be asked for whole racks otherwise (rack_placement = "node_list")."""

from __future__ import annotations

from dataclasses import replace

from .. import terminal
from ..errors import SubmitError
from ..machine import Allocation, Machine
from . import rack_nodes, submission


def name_nodes(machine: Machine, allocation: Allocation, *, required: bool) -> Allocation:
    """The allocation with the nodes of whole racks named, where the machine wants that. Raises SubmitError.

    Which nodes are free only the machine itself knows, and only now: on another computer a dry run (`required` False) is told so.
    """
    if machine.rack_placement != "node_list" or allocation.num_racks is None or machine.nodes_per_rack is None:
        return allocation
    queue = machine.queue(allocation.queue)
    partition = queue.name if queue.partition is None else queue.partition or None
    try:
        racks = rack_nodes.parse_topology(submission.ask(machine.scheduler, rack_nodes.TOPOLOGY_ARGV, "learn which nodes share a rack"))
        states = rack_nodes.parse_node_states(submission.ask(machine.scheduler, rack_nodes.node_states_argv(partition), "learn which nodes are free"))
        states |= dict.fromkeys(allocation.excluded_nodes, "down")
        names = rack_nodes.choose(racks, states, num_racks=allocation.num_racks, nodes_per_rack=machine.nodes_per_rack)
    except SubmitError as error:
        if required:
            raise
        terminal.note(f"note: the script names no nodes yet; they are chosen on {machine.name} when the job is submitted ({error})")
        return allocation
    return replace(allocation, node_names=tuple(names))
