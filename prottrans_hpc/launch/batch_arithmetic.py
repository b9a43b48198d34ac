"""What a recipe's global batch comes to on so many ranks. Pure, and without reading a corpus: lengths are estimated.

The recipe fixes which sequences a step sees; the number of ranks only decides where they are computed. Packed
architectures run on any world size. Lane-wise ones keep each lane on one rank, so their lanes must divide evenly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .. import architecture
from ..architecture import Architecture
from ..errors import ConfigError
from ..machine import Machine
from ..recipe import Phase, Recipe
from .racks import has_whole_racks, largest_rack_count, racks_text

ASSUMED_MEAN_RESIDUES = 300.0
"""Mean length where no corpus is given; UniRef50 has about 310, BFD 185, UniRef100 400."""
_SLACK = 1.25
"""How much fuller than the mean the fullest micro batch of an even distribution is taken to be."""


@dataclass(frozen=True)
class PhaseBatch:
    """One phase of a recipe on so many ranks."""

    phase: int
    num_sequences: int
    """Of a step, over all ranks."""
    mean_residues: float
    """Of a sequence, cut to the phase's limit."""
    num_ranks: int
    bin_residues: int
    """Most residues that a micro batch may have."""
    num_micro_batches: int
    """Of each rank and step: the accumulation steps."""
    fullest: int | None = None
    """Residues of the fullest micro batch, where they are known: with lanes."""
    tensor_ranks: int = 1
    """Ranks that see the same sequences."""

    @property
    def num_data_ranks(self) -> int:
        """Shares that a step is cut into."""
        return max(1, self.num_ranks // self.tensor_ranks)

    @property
    def sequences_per_rank(self) -> float:
        """The local batch."""
        return self.num_sequences / self.num_data_ranks

    @property
    def residues_per_micro_batch(self) -> float:
        """On the mean."""
        return self.num_sequences * self.mean_residues / (self.num_data_ranks * self.num_micro_batches)

    @property
    def num_idle_ranks(self) -> int:
        """Ranks for which a step has no sequence."""
        return max(0, self.num_data_ranks - self.num_sequences) * self.tensor_ranks

    def fullest_micro_batch(self, max_residues: int) -> int:
        """Residues that the fullest micro batch is expected to have: even packing, but a whole long sequence always fits."""
        if self.fullest is not None:
            return self.fullest
        return min(self.bin_residues, max(max_residues, math.ceil(_SLACK * self.residues_per_micro_batch)))


def plan_batches(recipe: Recipe, *, num_ranks: int, mean_residues: float | None = None) -> list[PhaseBatch]:
    """Every phase of a recipe on so many ranks; `mean_residues` is the corpus's mean length, if it is known."""
    return [_plan_phase(recipe, number, phase, num_ranks, mean_residues or ASSUMED_MEAN_RESIDUES) for number, phase in enumerate(recipe.phases)]


def _plan_phase(recipe: Recipe, number: int, phase: Phase, num_ranks: int, mean_residues: float) -> PhaseBatch:
    has_lanes = architecture.get(recipe.architecture.name).lanes  # each gives a piece of exactly so many tokens
    mean = float(phase.max_residues) if has_lanes else min(mean_residues, float(phase.max_residues))
    num_sequences = phase.global_batch_size or max(1, int((phase.global_batch_residues or 0) / mean))
    bin_residues = max(recipe.loading.bin_residues, phase.max_residues)
    tensor_ranks = recipe.parallel.tensor_ranks
    num_shares = max(1, num_ranks // tensor_ranks)
    if has_lanes:
        most = -(-num_sequences // num_shares)
        num_micro_batches = -(-most // (bin_residues // phase.max_residues))
        fullest = -(-most // num_micro_batches) * phase.max_residues
        return PhaseBatch(number, num_sequences, mean, num_ranks, bin_residues, num_micro_batches, fullest, tensor_ranks)
    # As the packing does: bins over 99 % full are hardly ever even enough.
    num_micro_batches = max(1, math.ceil(1.01 * num_sequences * mean / (num_shares * bin_residues)))
    return PhaseBatch(number, num_sequences, mean, num_ranks, bin_residues, num_micro_batches, tensor_ranks=tensor_ranks)


def mean_tokens(chosen: Architecture, batch: PhaseBatch) -> int:
    """Of a sequence; a lane's piece has the special tokens of its proteins in it."""
    special = 0 if chosen.lanes else len(chosen.vocabulary.prefix) + len(chosen.vocabulary.suffix)
    return round(batch.mean_residues) + special


def check_lanes(chosen: Architecture, recipe: Recipe, machine: Machine, *, num_nodes: int) -> None:
    """Raises ConfigError with the nearest sizes when the lanes of a lane-wise architecture do not divide over the ranks."""
    if not chosen.lanes:
        return
    tensor_ranks = recipe.parallel.tensor_ranks
    num_shares, unit = num_nodes * machine.ranks_per_node // tensor_ranks, "rank" if tensor_ranks == 1 else "tensor group"
    for number, phase in enumerate(recipe.phases):
        lanes = phase.global_batch_size
        if lanes is None:
            raise ConfigError(f"{chosen.name} trains in lanes, one a sequence of a step: give phases.{number}.global_batch_size, not global_batch_residues")
        if lanes < num_shares or (lanes % num_shares and not recipe.loading.uneven_lanes):
            more, fewer = lanes // num_shares + 1, lanes // num_shares
            uneven = f". Or some {unit}s have {more} lanes and the others, which wait, {fewer}: --set loading.uneven_lanes=true"
            raise ConfigError(
                f"{chosen.name} keeps each of the {lanes:,} lanes of phases.{number}.global_batch_size on one {unit}, and {num_nodes} nodes "
                f"have {num_shares:,} {unit}s, which do not divide them: {_nearest_sizes(recipe, machine, num_nodes)}{uneven if lanes > num_shares else ''}"
            )


def _nearest_sizes(recipe: Recipe, machine: Machine, num_nodes: int) -> str:
    whole = has_whole_racks(machine) and machine.nodes_per_rack is not None and num_nodes % machine.nodes_per_rack == 0
    unit = (machine.nodes_per_rack or 1) if whole else 1
    limit = largest_rack_count(machine) if whole else machine.max_nodes
    lanes = [phase.global_batch_size or 0 for phase in recipe.phases]
    tensor_ranks = recipe.parallel.tensor_ranks
    sizes = [count * unit for count in range(1, limit + 1) if count * unit * machine.ranks_per_node % tensor_ranks == 0]
    fitting = [size for size in sizes if all(number % (size * machine.ranks_per_node // tensor_ranks) == 0 for number in lanes)]
    below, above = [size for size in fitting if size < num_nodes], [size for size in fitting if size > num_nodes]
    offers = [_size_text(machine, size, lanes, whole, tensor_ranks) for size in (*below[-1:], *above[:1])]
    return f"the nearest sizes that do are {' and '.join(offers)}" if offers else "no size of this machine does; change the global batch"


def _size_text(machine: Machine, num_nodes: int, lanes: list[int], whole: bool, tensor_ranks: int) -> str:
    size = racks_text(num_nodes // (machine.nodes_per_rack or 1), machine.nodes_per_rack or 1) if whole else f"{num_nodes} nodes"
    local = ", ".join(f"{number * tensor_ranks // (num_nodes * machine.ranks_per_node):,}" for number in lanes)
    return f"{size} ({local} lanes a {'rank' if tensor_ranks == 1 else 'tensor group'})"
