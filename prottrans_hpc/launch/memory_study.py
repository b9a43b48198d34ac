"""Figure 3 of the ProtTrans paper by arithmetic: how large a model and a batch each memory policy makes possible, and what an epoch takes.

Every number is found by search over `memory_need`. Models grow by layers, at a micro batch of one longest sequence; batches grow by longest
sequences, for the recipe's model. An epoch's time is that of its sequences at the largest batch: each step computes (with what the policy computes
again, and copies that do not hide), sums the gradients over the nodes and updates, so that larger batches pay for the last two less often.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import architecture
from ..architecture import Architecture
from ..architectures.growth import grown
from ..errors import ConfigError
from ..machine import Machine
from ..parallel_layout import ParallelLayout
from ..precision_levels import LEVELS
from ..recipe import Recipe
from .memory_fit import planned_tokens, sequence_lengths
from .memory_need import MemoryNeed, Rank, need_of
from .memory_policies import Policy
from .memory_room import GIB, Room, budget_on, room_on
from .memory_table import policies_of
from .memory_time import MicroBatch, Speed, speed_of, time_factor
from .recomputation import Tokens
from .sharding_fit import check_sharding

MOST_LAYERS, MOST_SEQUENCES = 100_000, 1_000_000
EPOCH_RESIDUES = 88e9
"""Of UniRef100, which ProtTXL and ProtBert were trained on."""
_ASSUMED_FLOPS_PER_S = 1e11
"""Of a rank whose speed nobody knows: hours are then only to be compared with one another."""


@dataclass(frozen=True)
class Setting:
    """What is studied, and on what."""

    recipe: Recipe
    record: Architecture
    """Of the recipe's model."""
    shape: Any
    """Of the recipe's size."""
    num_ranks: int
    layout: ParallelLayout
    room: Room
    on_gpu: bool
    speed: Speed
    reduction_bytes_per_s: float | None
    """What a rank's gradients are summed at over all nodes; None: one node, or unknown."""
    epoch_residues: float = EPOCH_RESIDUES

    @property
    def longest(self) -> int:
        """Residues of the longest sequence of any phase."""
        return max(phase.max_residues for phase in self.recipe.phases)

    @property
    def rank(self) -> Rank:
        """What the arithmetic needs."""
        return Rank(self.on_gpu, self.layout)


@dataclass(frozen=True)
class Finding:
    """What a policy makes possible; numbers of layers and sequences are 0 where not even one fits."""

    policy: str
    num_layers: int
    parameters: int
    local_batch: int
    """Sequences of the longest kind."""
    global_batch: int
    epoch_hours: float | None
    """At that batch; None where no batch fits."""
    is_measured: bool = False


def setting_on(recipe: Recipe, machine: Machine, *, num_ranks: int, usable_bytes: int | None = None) -> Setting:
    """A machine's ranks. Raises ConfigError where neither the profile nor `usable_bytes` says how much memory one has."""
    room = room_on(machine, num_ranks) if usable_bytes is None else budget_on(machine, num_ranks, usable_bytes)
    if room is None:
        raise ConfigError(f"the profile {machine.name} does not say how much memory a rank has: name a machine that does (--machine), or give --budget-mib")
    network = machine.network
    crosses = network is not None and num_ranks > machine.ranks_per_node
    record = architecture.get(recipe.architecture.name)
    shape: Any = record.size(recipe.architecture.size).shape
    return Setting(
        recipe,
        record,
        shape,
        num_ranks,
        check_sharding(recipe, machine, record, shape, num_ranks=num_ranks),
        room,
        machine.node.gpu is not None,
        speed_of(machine.node.gpu, recipe.precision),
        network.between_nodes.bytes_per_s if network is not None and crosses else None,
    )


def room_text(setting: Setting) -> str:
    """What a rank may take, for people."""
    room = setting.room
    host = "" if not setting.on_gpu else f", {room.host / GIB:.3f} GiB of host memory" if room.host else ", any amount of host memory (the profile has none)"
    return f"{room.device / GIB:.3f} GiB each{host}"


def choose_policies(recipe: Recipe, names: Sequence[str]) -> dict[str, Policy]:
    """Those of these names, "none" always first; without names all. Raises ConfigError that lists them."""
    known = policies_of(recipe)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"no policy is called {unknown[0]!r}; there are {', '.join(repr(name) for name in known)}")
    return {name: policy for name, policy in known.items() if not names or name in names or name == "none"}


def find(name: str, policy: Policy, setting: Setting) -> Finding:
    """The largest model and batch of one policy, and the time of an epoch at that batch."""
    recipe, shape = policy.of(setting.recipe), setting.shape
    num_layers = largest(lambda number: setting.room.holds(_need(recipe, grown(shape, number), setting, 1)), MOST_LAYERS)
    batch = largest(lambda number: setting.room.holds(_need(recipe, shape, setting, number)), MOST_SEQUENCES)
    return Finding(
        name,
        num_layers,
        setting.record.num_parameters(grown(shape, num_layers)) if num_layers else 0,
        batch,
        batch * setting.layout.num_data_ranks,
        _epoch_hours(recipe, setting, batch) if batch else None,
    )


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` that fits, where all below one that fits do, too; 0 where 1 does not."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def sequences(setting: Setting, number: int) -> Tokens:
    """So many of the longest."""
    return planned_tokens(setting.recipe, sequence_lengths(setting.record, number * setting.longest, setting.longest))


def _need(recipe: Recipe, shape: Any, setting: Setting, num_sequences: int) -> MemoryNeed:
    # The copy that a save is written from lies in host memory, and what is studied is a device's.
    need = replace(need_of(recipe, setting.record, shape, [sequences(setting, num_sequences)], setting.rank), checkpoint=0)
    lane_bytes = setting.record.lane_bytes
    return need if lane_bytes is None else replace(need, lanes=num_sequences * lane_bytes(shape, setting.longest))


def _epoch_hours(recipe: Recipe, setting: Setting, batch: int) -> float:
    tokens, record, shape = sequences(setting, batch), setting.record, setting.shape
    need = _need(recipe, shape, setting, batch)
    speed = setting.speed
    compute_s = record.flops(shape, tokens.lengths) / (speed.flops_per_s or _ASSUMED_FLOPS_PER_S)
    compute_s *= time_factor(recipe, record, shape, MicroBatch(tokens), need, speed)
    sum_s = 0.0
    if setting.reduction_bytes_per_s:
        gradient_bytes = LEVELS[recipe.precision].weight_bytes * record.num_parameters(shape)
        sum_s = 2.0 * gradient_bytes / setting.reduction_bytes_per_s  # a ring sends everything twice
    num_steps = setting.epoch_residues / (batch * setting.longest * setting.layout.num_data_ranks)
    return num_steps * (compute_s + sum_s) / 3600.0


def as_measured(setting: Setting, found: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """What `profile.memory_stage` found by real steps of one rank, each of `sequences` longest ones."""
    results = []
    for name, one in found.items():
        residues = one["sequences"] * setting.longest
        hours = None if one["step_s"] is None else setting.epoch_residues / residues * one["step_s"] / 3600.0
        results.append(Finding(name, one["layers"], one["parameters"], one["sequences"], one["sequences"], hours, is_measured=True))
    return results
