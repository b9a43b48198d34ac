"""Whether a model can be trained in the memory of a rank, before anything is queued. Pure arithmetic, no torch.

What is counted stands in `memory_need`; here it meets the machine's memory, of which a share is left to the runtime,
workspaces and fragmentation, and where it does not fit, what would.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..architecture import Architecture
from ..errors import ConfigError
from ..machine import Machine
from ..parallel_layout import ParallelLayout, layout_on
from ..precision_levels import LEVELS
from ..recipe import Recipe
from ..recipe_objectives import Denoising
from .batch_arithmetic import PhaseBatch
from .memory_need import MemoryNeed, Rank, need_of
from .recomputation import Tokens

GIB = 2**30
MARGIN = 0.10
"""Share of a GPU's, or a node's, memory that is not planned with."""

_STEP_RESIDUES = 256


def memory_gib(machine: Machine, num_ranks: int) -> float | None:
    """Memory of a rank: its GPU's, or its share of the host's; None where the profile does not say. Local ranks all share one computer."""
    if machine.node.gpu is not None:
        return machine.node.gpu.memory_gib
    sharing = num_ranks if machine.scheduler == "local" else machine.ranks_per_node
    return machine.node.host_memory_gib / sharing if machine.node.host_memory_gib else None


def memory_need(
    recipe: Recipe, chosen: Architecture, shape: Any, batches: list[PhaseBatch], *, on_gpu: bool, layout: ParallelLayout | None = None
) -> MemoryNeed:
    """What a rank needs for the fullest micro batch that is expected; without a layout every rank holds the whole model."""
    residues = [batch.fullest_micro_batch(recipe.phases[batch.phase].max_residues) for batch in batches]
    return _need(recipe, chosen, shape, residues, batches, Rank(on_gpu, layout or ParallelLayout(batches[0].num_ranks)))


def fitting_bins(recipe: Recipe, machine: Machine, chosen: Architecture, shape: Any, batches: list[PhaseBatch]) -> int | None:
    """The largest micro batches, residues, that the machine's memory has room for; None where the recipe's fit, or even the smallest do not."""
    memory = memory_gib(machine, batches[0].num_ranks)
    if memory is None:
        return None
    needed_with = _peak_by_bins(recipe, machine, chosen, shape, batches)
    return None if needed_with(recipe.loading.bin_residues) <= _usable(memory) else _largest_bins(recipe, _usable(memory), needed_with)


def check_memory(recipe: Recipe, machine: Machine, chosen: Architecture, shape: Any, batches: list[PhaseBatch]) -> MemoryNeed | None:
    """What a rank needs; None where the machine's memory is unknown. Raises ConfigError with the numbers when it cannot fit."""
    memory = memory_gib(machine, batches[0].num_ranks)
    if memory is None:
        return None
    need = memory_need(recipe, chosen, shape, batches, on_gpu=machine.node.gpu is not None, layout=_layout(recipe, machine, batches))
    if need.peak <= _usable(memory):
        return need
    place = f"{machine.node.gpu.name} of {machine.name} has" if machine.node.gpu else f"a rank on {machine.name} has"
    advice = _advice(recipe, _usable(memory), _peak_by_bins(recipe, machine, chosen, shape, batches), num_ranks=batches[0].num_ranks)
    raise ConfigError(
        f"{recipe.architecture.name} {recipe.architecture.size} in {recipe.precision} does not fit: {need_text(need)}; {place} {memory:.1f} GiB, "
        f"of which {100 * MARGIN:.0f} % are kept free. {advice}"
    )


def _layout(recipe: Recipe, machine: Machine, batches: list[PhaseBatch]) -> ParallelLayout:
    return layout_on(recipe.parallel, machine, batches[0].num_ranks)


def _usable(memory: float) -> float:
    return memory * (1.0 - MARGIN) * GIB


def _peak_by_bins(recipe: Recipe, machine: Machine, chosen: Architecture, shape: Any, batches: list[PhaseBatch]) -> Callable[[int], int]:
    """The peak of a rank as a function of `loading.bin_residues`."""

    rank = Rank(machine.node.gpu is not None, _layout(recipe, machine, batches))

    def needed_with(bin_residues: int) -> int:
        sizes = [min(bin_residues, batch.fullest_micro_batch(recipe.phases[batch.phase].max_residues)) for batch in batches]
        return _need(recipe, chosen, shape, sizes, batches, rank).peak

    return needed_with


def need_text(need: MemoryNeed) -> str:
    """The numbers, for people."""
    parts = {
        "parameters": need.parameters,
        "gradients": need.gradients,
        "fp32 masters": need.masters,
        "optimizer": need.optimizer,
        "cast weights": need.cast_weights,
        "activations": need.activations,
        "gathered weights": need.gathered,
        "memories of the lanes": need.lanes,
        "checkpoint": need.checkpoint,
    }
    said = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    update = f" (an update needs {need.update / GIB:.2f} in their place)" if need.update > need.activations + need.cast_weights + need.gathered else ""
    return f"a rank needs {need.peak / GIB:.1f} GiB: {said}{update}"


def _need(recipe: Recipe, chosen: Architecture, shape: Any, residues: list[int], batches: list[PhaseBatch], rank: Rank) -> MemoryNeed:
    tokens = [planned_tokens(recipe, sequence_lengths(chosen, number, recipe.phases[phase].max_residues)) for phase, number in enumerate(residues)]
    need = need_of(recipe, chosen, shape, tokens, rank)
    if chosen.lane_bytes is None:
        return need
    own = (math.ceil(batch.num_sequences / rank.layout.num_data_ranks) * chosen.lane_bytes(shape, recipe.phases[batch.phase].max_residues) for batch in batches)
    return replace(need, lanes=max(own))


def planned_tokens(recipe: Recipe, lengths: list[int]) -> Tokens:
    """What encoder and decoder read of sequences of so many tokens, under the recipe's objective."""
    objective = recipe.objective
    if not isinstance(objective, Denoising) or (objective.noise, objective.target) == ("single", "whole"):
        return Tokens(lengths)
    corrupted = objective.fraction / (objective.mean_span if objective.noise == "spans" else 1.0)  # sentinels a residue
    read = [math.ceil(length * (1.0 - objective.fraction + corrupted)) for length in lengths]
    written = sum(math.ceil(length * (objective.fraction + corrupted)) + 2 for length in lengths) if objective.target == "sentinels" else sum(lengths)
    return Tokens(read, written)


def sequence_lengths(chosen: Architecture, residues: int, max_residues: int) -> list[int]:
    """Tokens of the sequences of a micro batch, the longest that there may be: what costs most where attention is kept."""
    special = len(chosen.vocabulary.prefix) + len(chosen.vocabulary.suffix)
    whole, rest = divmod(residues, max_residues)
    return [max_residues + special] * whole + ([rest + special] if rest else [])


def _largest_bins(recipe: Recipe, usable: float, needed_with: Callable[[int], int]) -> int | None:
    longest = max(phase.max_residues for phase in recipe.phases)
    sizes = range(longest, max(longest, recipe.loading.bin_residues) + 1, _STEP_RESIDUES)
    return max((size for size in sizes if needed_with(size) <= usable), default=None)


def _advice(recipe: Recipe, usable: float, needed_with: Callable[[int], int], *, num_ranks: int) -> str:
    fitting, longest = _largest_bins(recipe, usable, needed_with), max(phase.max_residues for phase in recipe.phases)
    if fitting:
        return f"Take smaller micro batches: --set loading.bin_residues={fitting} is the largest that fits (the step stays the same)"
    ways = ["--set memory.recompute_every=1 computes layers again for the gradient instead of keeping them"] if not recipe.memory.recompute_every else []
    ways += ["--set precision=bf16 (or fp16) halves the activations, if the hardware has it"] if not LEVELS[recipe.precision].is_half else []
    may_cut = num_ranks > 1 and recipe.parallel.sharding == "none" and recipe.parallel.comm == "torch"
    ways += [f"--set parallel.sharding=full cuts the model over the {num_ranks} ranks"] if may_cut else []
    other = "".join(f"{way}; " for way in ways) + ("else " if ways else "")
    return (
        f"Smaller micro batches do not help: a sequence of {longest} residues alone needs {needed_with(longest) / GIB:.1f} GiB. "
        f"{other}take a machine with more memory a rank, a smaller model, or shorter sequences (phases.N.max_residues)"
    )
