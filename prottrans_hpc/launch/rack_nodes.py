"""Which nodes stand in which rack, and which racks a job should name (rack_placement = "node_list"). Pure.

A rack is a leaf switch of Slurm's tree topology, or a block of its block topology. Sites where --switches and
--segment do not work, but the topology is told, get whole racks in this way; the price is that the racks are fixed
when the job is submitted, and it waits for them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..errors import SubmitError
from . import hostlist

TOPOLOGY_ARGV = ("scontrol", "show", "topology")
_LINE = re.compile(r"(SwitchName|BlockName)=(\S+)\s+(.*)")
_UNUSABLE = ("down", "drain", "fail", "maint", "inval", "unknown", "planned_down", "reboot", "powered_down")


def node_states_argv(partition: str | None) -> list[str]:
    """The command that tells the state of every node."""
    return ["sinfo", "--noheader", "--Node", "--format=%N|%T", *([f"--partition={partition}"] if partition else [])]


def parse_topology(output: str) -> dict[str, list[str]]:
    """Rack -> its nodes, from `scontrol show topology`; empty where the site has told Slurm nothing."""
    racks: dict[str, list[str]] = {}
    for line in output.splitlines():
        match = _LINE.match(line.strip())
        if match is None:
            continue
        values = dict(pair.partition("=")[::2] for pair in match[3].split())
        if values.get("Level", "0") == "0" and values.get("Nodes"):
            racks[match[2]] = hostlist.expand(values["Nodes"])
    return racks


def parse_node_states(output: str) -> dict[str, str]:
    """Node -> state, in small letters and without Slurm's marks behind it."""
    found = re.findall(r"^\s*([^\s|]+)\|([a-zA-Z_]+)", output, re.MULTILINE)
    return {node: state.lower() for node, state in found}


def choose(racks: Mapping[str, Sequence[str]], states: Mapping[str, str], *, num_racks: int, nodes_per_rack: int) -> list[str]:
    """The nodes of so many whole racks: those with the most idle nodes first. Raises SubmitError when there are not so many.

    A node that is down or drained, or not in the partition, counts as not there; a rack that has more nodes than asked for gives its first idle ones.
    """
    whole: list[tuple[int, list[str]]] = []
    for nodes in racks.values():
        usable = [node for node in nodes if not _is_unusable(states.get(node, "unknown"))]
        if len(usable) >= nodes_per_rack:
            taken = sorted(usable, key=lambda node: states[node] != "idle")[:nodes_per_rack]
            chosen = [node for node in usable if node in taken]
            whole.append((sum(states[node] != "idle" for node in chosen), chosen))
    if len(whole) < num_racks:
        raise SubmitError(
            f"{num_racks} whole racks of {nodes_per_rack} nodes were asked for, but only {len(whole)} of {len(racks)} racks have so many usable nodes now: "
            "ask for fewer (--racks), or for any nodes (--partial-rack)"
        )
    whole.sort(key=lambda rack: rack[0])
    return [node for _, nodes in whole[:num_racks] for node in nodes]


def _is_unusable(state: str) -> bool:
    return any(word in state for word in _UNUSABLE)
