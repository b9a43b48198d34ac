"""Whether a model can be trained in the memory of a rank, before anything is queued. Pure arithmetic, no torch.

What is counted stands in `memory_need`; here it meets the machine's memory (`memory_room`), of which a share is left to the
runtime, workspaces and fragmentation, and where it does not fit, what would.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..architecture import Architecture
from ..errors import ConfigError
from ..machine import Machine
from ..parallel_layout import ParallelLayout
from ..precision_levels import LEVELS
from ..recipe import Recipe
from ..recipe_objectives import Denoising
from .batch_arithmetic import PhaseBatch
from .memory_need import MemoryNeed, Rank, need_of
from .memory_room import GIB, MARGIN, Room, host_text, memory_gib, room_on
from .recomputation import Tokens
from .sharding_fit import check_sharding

_STEP_RESIDUES = 256


def memory_need(
    recipe: Recipe, chosen: Architecture, shape: Any, batches: list[PhaseBatch], *, on_gpu: bool, layout: ParallelLayout | None = None
) -> MemoryNeed:
    """What a rank needs for the fullest micro batch that is expected; without a layout every rank holds the whole model."""
    residues = [batch.fullest_micro_batch(recipe.phases[batch.phase].max_residues) for batch in batches]
    return _need(recipe, chosen, shape, residues, batches, Rank(on_gpu, layout or ParallelLayout(batches[0].num_ranks)))


def fitting_bins(recipe: Recipe, machine: Machine, chosen: Architecture, shape: Any, batches: list[PhaseBatch]) -> int | None:
    """The largest micro batches, residues, that the machine's memory has room for; None where the recipe's fit, or even the smallest do not."""
    room = room_on(machine, batches[0].num_ranks)
    if room is None:
        return None
    needed_with = _need_by_bins(recipe, machine, chosen, shape, batches)
    return None if room.holds(needed_with(recipe.loading.bin_residues)) else _largest_bins(recipe, room, needed_with)


def check_memory(recipe: Recipe, machine: Machine, chosen: Architecture, shape: Any, batches: list[PhaseBatch]) -> MemoryNeed | None:
    """What a rank needs; None where the machine's memory is unknown. Raises ConfigError with the numbers when it cannot fit."""
    num_ranks = batches[0].num_ranks
    room, memory = room_on(machine, num_ranks), memory_gib(machine, num_ranks)
    if room is None or memory is None:
        return None
    need = memory_need(
        recipe, chosen, shape, batches, on_gpu=machine.node.gpu is not None, layout=check_sharding(recipe, machine, chosen, shape, num_ranks=num_ranks)
    )
    if room.holds(need):
        return need
    place = f"{machine.node.gpu.name} of {machine.name} has" if machine.node.gpu else f"a rank on {machine.name} has"
    on_host = host_text(need, machine, num_ranks)
    advice = _advice(recipe, room, _need_by_bins(recipe, machine, chosen, shape, batches), num_ranks=num_ranks)
    raise ConfigError(
        f"{recipe.architecture.name} {recipe.architecture.size} in {recipe.precision} does not fit: {need_text(need)}; {place} {memory:.1f} GiB, "
        f"of which {100 * MARGIN:.0f} % are kept free{f'; {on_host}, as much of it kept free' if on_host else ''}. {advice}"
    )


def _need_by_bins(recipe: Recipe, machine: Machine, chosen: Architecture, shape: Any, batches: list[PhaseBatch]) -> Callable[[int], MemoryNeed]:
    """What a rank needs as a function of `loading.bin_residues`."""

    rank = Rank(machine.node.gpu is not None, check_sharding(recipe, machine, chosen, shape, num_ranks=batches[0].num_ranks))

    def needed_with(bin_residues: int) -> MemoryNeed:
        sizes = [min(bin_residues, batch.fullest_micro_batch(recipe.phases[batch.phase].max_residues)) for batch in batches]
        return _need(recipe, chosen, shape, sizes, batches, rank)

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


def _largest_bins(recipe: Recipe, room: Room, needed_with: Callable[[int], MemoryNeed]) -> int | None:
    longest = max(phase.max_residues for phase in recipe.phases)
    sizes = range(longest, max(longest, recipe.loading.bin_residues) + 1, _STEP_RESIDUES)
    return max((size for size in sizes if room.holds(needed_with(size))), default=None)


def _advice(recipe: Recipe, room: Room, needed_with: Callable[[int], MemoryNeed], *, num_ranks: int) -> str:
    fitting, longest = _largest_bins(recipe, room, needed_with), max(phase.max_residues for phase in recipe.phases)
    if fitting:
        return f"Take smaller micro batches: --set loading.bin_residues={fitting} is the largest that fits (the step stays the same)"
    alone = needed_with(longest)
    on_device = not room.holds_on_device(alone)
    ways = ["--set memory.recompute_every=1 computes layers again for the gradient instead of keeping them"] if not recipe.memory.recompute_every else []
    ways += ["--set precision=bf16 (or fp16) halves the activations, if the hardware has it"] if not LEVELS[recipe.precision].is_half and on_device else []
    if not room.holds_on_host(alone) and recipe.memory.optimizer_on == "host":
        ways += ["--set memory.optimizer_on=device keeps the optimizer's state off the host"]
    may_cut = num_ranks > 1 and recipe.parallel.sharding == "none" and recipe.parallel.comm == "torch"
    ways += [f"--set parallel.sharding=full cuts the model over the {num_ranks} ranks"] if may_cut else []
    other = "".join(f"{way}; " for way in ways) + ("else " if ways else "")
    needs = f"{alone.peak / GIB:.1f} GiB" if on_device else f"{alone.in_host / GIB:.1f} GiB of host memory"
    return (
        f"Smaller micro batches do not help: a sequence of {longest} residues alone needs {needs}. "
        f"{other}take a machine with more memory a rank, a smaller model, or shorter sequences (phases.N.max_residues)"
    )
