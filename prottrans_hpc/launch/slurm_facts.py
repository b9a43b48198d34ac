"""What `scontrol show` prints, as plain values: nodes, partitions, configuration. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from . import hostlist
from .rack_nodes import TOPOLOGY_ARGV, parse_topology

_PAIR = re.compile(r"(\S+?)=(.*?)(?=\s+[A-Za-z][\w/:-]*=|\s*$)")
_TIME = re.compile(r"(?:(\d+)-)?(\d+):(\d+):(\d+)")
_GPU = re.compile(r"\bgpu(?::([A-Za-z][\w.-]*))?:(\d+)")

CONFIG_ARGV = ("scontrol", "show", "config")
PARTITIONS_ARGV = ("scontrol", "--oneliner", "show", "partition")
NODES_ARGV = ("scontrol", "--oneliner", "show", "node")
QUESTIONS = (CONFIG_ARGV, PARTITIONS_ARGV, NODES_ARGV, TOPOLOGY_ARGV)
"""Everything that is asked, in the order in which `parse` wants the answers."""


@dataclass(frozen=True)
class NodeShape:
    """What nodes that are alike have."""

    num_cpus: int
    """That jobs may use, as Slurm counts: hardware threads where it is told of them."""
    threads_per_core: int
    num_sockets: int
    memory_mib: int
    gpu: str
    """Type of the GPUs as the site calls it; "" without a type or GPUs."""
    num_gpus: int
    tmp_disk_mib: int

    @property
    def num_cores(self) -> int:
        """Cores that jobs may use."""
        return max(1, self.num_cpus // max(1, self.threads_per_core))


@dataclass(frozen=True)
class Partition:
    """A partition that takes jobs."""

    name: str
    nodes: tuple[str, ...]
    is_default: bool
    min_nodes: int
    max_nodes: int
    max_time_min: int | None
    """None: without a limit."""
    preempt_mode: str
    priority_tier: int
    grace_s: int


@dataclass(frozen=True)
class SlurmFacts:
    """A cluster, as its controller tells of it."""

    config: Mapping[str, str]
    partitions: tuple[Partition, ...]
    shapes: Mapping[str, NodeShape]
    """By node."""
    racks: Mapping[str, list[str]]


def parse(config: str, partitions: str, nodes: str, topology: str) -> SlurmFacts:
    """The answers to QUESTIONS."""
    pairs = (line.partition("=")[::2] for line in config.splitlines() if "=" in line)
    found = [_partition(values) for values in _lines(partitions) if values.get("State", "UP") == "UP" and values.get("Nodes", "(null)") != "(null)"]
    shapes = {values["NodeName"]: _shape(values) for values in _lines(nodes) if "NodeName" in values}
    return SlurmFacts({key.strip(): value.strip() for key, value in pairs}, tuple(found), shapes, parse_topology(topology))


def minutes(text: str) -> int | None:
    """Whole minutes of Slurm's D-HH:MM:SS; None for UNLIMITED and what is no time."""
    match = _TIME.fullmatch(text)
    return (int(match[1] or 0) * 24 + int(match[2])) * 60 + int(match[3]) if match else None


def _lines(output: str) -> Iterable[dict[str, str]]:
    return (dict(_PAIR.findall(line)) for line in output.splitlines() if "=" in line)


def _partition(values: Mapping[str, str]) -> Partition:
    nodes = tuple(hostlist.expand(values["Nodes"]))
    return Partition(
        values["PartitionName"],
        nodes,
        values.get("Default") == "YES",
        max(1, _number(values.get("MinNodes", ""), 1)),
        min(len(nodes), _number(values.get("MaxNodes", ""), len(nodes))),
        minutes(values.get("MaxTime", "")),
        values.get("PreemptMode", "OFF"),
        _number(values.get("PriorityTier", ""), 1),
        _number(values.get("GraceTime", ""), 0),
    )


def _shape(values: Mapping[str, str]) -> NodeShape:
    gpus = _GPU.findall(values.get("Gres", ""))
    return NodeShape(
        _number(values.get("CPUEfctv", values.get("CPUTot", "")), 1),
        _number(values.get("ThreadsPerCore", ""), 1),
        _number(values.get("Sockets", ""), 1),
        _number(values.get("RealMemory", ""), 0),
        gpus[0][0] if gpus else "",
        sum(int(number) for _, number in gpus),
        _number(values.get("TmpDisk", ""), 0),
    )


def _number(text: str, default: int) -> int:
    return int(text) if text.isdigit() else default
