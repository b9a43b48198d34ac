"""How much memory a rank may plan with: its GPU's, and its share of the host's. Pure, no torch.

What large model support moves, and what an optimizer on the host has, lies in the memory of the node, which all of its
ranks share. Where ranks compute on CPUs both are the same memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..machine import Machine
from .memory_need import MemoryNeed

GIB = 2**30
MARGIN = 0.10
"""Share of a GPU's, or a node's, memory that is not planned with."""


@dataclass(frozen=True)
class Room:
    """What a rank's training may take; bytes, the margin taken off."""

    device: int
    """Where the rank computes."""
    host: int | None
    """A GPU's rank's share of its node's memory; None: the profile does not say, and nothing is checked."""
    is_shared: bool = False
    """Whether what is put aside stays in the same memory, as where ranks compute on CPUs."""

    def holds(self, need: MemoryNeed) -> bool:
        """Whether all of it fits."""
        return self.holds_on_device(need) and self.holds_on_host(need)

    def holds_on_device(self, need: MemoryNeed) -> bool:
        """Where the rank computes."""
        return need.peak + (need.in_host if self.is_shared else 0) <= self.device

    def holds_on_host(self, need: MemoryNeed) -> bool:
        """What a GPU's rank puts into the memory of its node."""
        return self.is_shared or self.host is None or need.in_host <= self.host


def room_on(machine: Machine, num_ranks: int) -> Room | None:
    """Of one of so many ranks; None where the profile does not say how much memory there is."""
    there, host = memory_gib(machine, num_ranks), host_memory_gib(machine, num_ranks)
    if there is None:
        return None
    if machine.node.gpu is None:
        return Room(_planned(there), None, is_shared=True)
    return Room(_planned(there), _planned(host) if host else None)


def budget_on(machine: Machine, num_ranks: int, device: int) -> Room:
    """So many bytes in place of the device's memory, on CPUs, too: what is put aside is then not counted there."""
    host = host_memory_gib(machine, num_ranks) if machine.node.gpu else None
    return Room(device, _planned(host) if host else None)


def _planned(gib: float) -> int:
    return int(gib * (1.0 - MARGIN) * GIB)


def memory_gib(machine: Machine, num_ranks: int) -> float | None:
    """Memory of a rank: its GPU's, or its share of the host's; None where the profile does not say."""
    return machine.node.gpu.memory_gib if machine.node.gpu is not None else host_memory_gib(machine, num_ranks)


def host_memory_gib(machine: Machine, num_ranks: int) -> float | None:
    """A rank's share of its node's memory; None where the profile does not say. Local ranks all share one computer."""
    sharing = num_ranks if machine.scheduler == "local" else machine.ranks_per_node
    return machine.node.host_memory_gib / sharing if machine.node.host_memory_gib else None


def host_text(need: MemoryNeed, machine: Machine, num_ranks: int) -> str:
    """What lies in host memory beside a GPU's, and how much there is; "" where nothing does."""
    if not need.in_host or machine.node.gpu is None:
        return ""
    there = host_memory_gib(machine, num_ranks)
    share = f"{there:,.1f} GiB are a rank's share of its node" if there else f"the profile of {machine.name} does not say how much there is: not checked"
    return f"{need.in_host / GIB:,.1f} GiB in host memory; {share}"
