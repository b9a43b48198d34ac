"""Whether a model can be trained in the memory of a rank, before anything is queued. Pure arithmetic, no torch.

What is counted: weights, gradients and fp32 masters as the precision has them, the optimizer's fp32 state; under
autocast the cast weights; the activations of the fullest micro batch as the architecture counts them, less those of layers that are recomputed; what an update
needs beside its state for a moment, when the activations are gone; where ranks compute on the host, the copy of the state that a save writes from. A share
of the memory is left to the runtime, workspaces and fragmentation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..architecture import Architecture
from ..errors import ConfigError
from ..machine import Machine
from ..precision_levels import LEVELS
from ..recipe import Recipe
from .batch_arithmetic import PhaseBatch
from .recomputation import activation_bytes

GIB = 2**30
MARGIN = 0.10
"""Share of a GPU's, or a node's, memory that is not planned with."""

_STATE = {"lamb": 8.0, "adamw": 8.0, "adam": 8.0, "adafactor": 0.2}
"""Bytes a parameter of an optimizer's state: two moments in fp32, or a number a row and a column of matrices at least 64 wide."""
_UPDATE = {"lamb": 12.0, "adamw": 0.0, "adam": 0.0, "adafactor": 1.0}
"""Bytes a parameter that an update on a GPU needs for a moment: LAMB's scaled gradients, denominators and directions; Adafactor's directions
of the largest tensor (a position table of ProtBert's has a tenth of all parameters, twice 4 bytes)."""
_GROUP = {"lamb": 1 << 26}
"""Parameters that are updated at once, where it is not all; tests hold it against the ranks' side."""
_CAST = 2
"""Bytes a parameter of the copies that autocast keeps of fp32 weights during a step."""
_FP32 = 4
"""Bytes a parameter of a master, of a gradient that a half one is widened to for an update, of a copy where there is no master."""
_MOST_WRITERS = 64
"""Ranks that write a checkpoint together, at most; tests hold it against the ranks' side."""
_STEP_RESIDUES = 256


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that one rank needs."""

    parameters: int
    gradients: int
    optimizer: int
    cast_weights: int
    activations: int
    """What the layers keep for the gradient, of the fullest micro batch of any phase."""
    update: int
    """For a moment, when the activations are gone."""
    masters: int = 0
    """The fp32 weights behind half ones."""
    lanes: int = 0
    """What a model with memory remembers of this rank's lanes."""
    checkpoint: int = 0
    """The copy that a save is written from, where it lies in the same memory."""

    @property
    def fixed(self) -> int:
        """What no choice of micro batch changes."""
        return self.parameters + self.gradients + self.masters + self.optimizer + self.lanes + self.checkpoint

    @property
    def peak(self) -> int:
        """At the end of a forward pass or in the update, whichever is more."""
        return self.fixed + max(self.cast_weights + self.activations, self.update)


def memory_gib(machine: Machine, num_ranks: int) -> float | None:
    """Memory of a rank: its GPU's, or its share of the host's; None where the profile does not say. Local ranks all share one computer."""
    if machine.node.gpu is not None:
        return machine.node.gpu.memory_gib
    sharing = num_ranks if machine.scheduler == "local" else machine.ranks_per_node
    return machine.node.host_memory_gib / sharing if machine.node.host_memory_gib else None


def memory_need(recipe: Recipe, chosen: Architecture, shape: Any, batches: list[PhaseBatch], *, on_gpu: bool) -> MemoryNeed:
    """What a rank needs for the fullest micro batch that is expected."""
    residues = [batch.fullest_micro_batch(recipe.phases[batch.phase].max_residues) for batch in batches]
    return _need(recipe, chosen, shape, residues, batches, on_gpu=on_gpu)


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
    need = memory_need(recipe, chosen, shape, batches, on_gpu=machine.node.gpu is not None)
    if need.peak <= _usable(memory):
        return need
    place = f"{machine.node.gpu.name} of {machine.name} has" if machine.node.gpu else f"a rank on {machine.name} has"
    raise ConfigError(
        f"{recipe.architecture.name} {recipe.architecture.size} in {recipe.precision} does not fit: {need_text(need)}; {place} {memory:.1f} GiB, "
        f"of which {100 * MARGIN:.0f} % are kept free. {_advice(recipe, _usable(memory), _peak_by_bins(recipe, machine, chosen, shape, batches))}"
    )


def _usable(memory: float) -> float:
    return memory * (1.0 - MARGIN) * GIB


def _peak_by_bins(recipe: Recipe, machine: Machine, chosen: Architecture, shape: Any, batches: list[PhaseBatch]) -> Callable[[int], int]:
    """The peak of a rank as a function of `loading.bin_residues`."""

    def needed_with(bin_residues: int) -> int:
        sizes = [min(bin_residues, batch.fullest_micro_batch(recipe.phases[batch.phase].max_residues)) for batch in batches]
        return _need(recipe, chosen, shape, sizes, batches, on_gpu=machine.node.gpu is not None).peak

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
        "memories of the lanes": need.lanes,
        "checkpoint": need.checkpoint,
    }
    said = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    update = f" (an update needs {need.update / GIB:.2f} in their place)" if need.update > need.activations + need.cast_weights else ""
    return f"a rank needs {need.peak / GIB:.1f} GiB: {said}{update}"


def _need(recipe: Recipe, chosen: Architecture, shape: Any, residues: list[int], batches: list[PhaseBatch], *, on_gpu: bool) -> MemoryNeed:
    count = chosen.num_parameters(shape)
    special = len(chosen.vocabulary.prefix) + len(chosen.vocabulary.suffix)
    level, kept_in = LEVELS[recipe.precision], "bf16" if LEVELS[recipe.precision].is_half else "fp32"
    activations = [
        activation_bytes(chosen, shape, _lengths(number, recipe.phases[phase].max_residues, special), kept_in, recipe.memory.recompute_every)
        for phase, number in enumerate(residues)
    ]
    lanes = 0
    if chosen.lane_bytes is not None:
        lanes = max(math.ceil(batch.sequences_per_rank) * chosen.lane_bytes(shape, recipe.phases[batch.phase].max_residues) for batch in batches)
    state = round(_STATE[recipe.optimizer.name] * count)
    masters = _FP32 * count if level.has_masters else 0
    widened = (_FP32 if level.has_masters else 2 * _FP32) * count if level.weight_bytes < _FP32 else 0
    return MemoryNeed(
        parameters=level.weight_bytes * count,
        gradients=level.weight_bytes * count,
        masters=masters,
        optimizer=state,
        cast_weights=_CAST * count if level.is_half and level.weight_bytes == _FP32 else 0,
        activations=max(activations),
        update=widened + (round(_UPDATE[recipe.optimizer.name] * min(count, _GROUP.get(recipe.optimizer.name, count))) if on_gpu else 0),
        lanes=lanes,
        checkpoint=0 if on_gpu else ((masters or level.weight_bytes * count) + state) // min(batches[0].num_ranks, _MOST_WRITERS),
    )


def _lengths(residues: int, max_residues: int, special: int) -> list[int]:
    """Tokens of the sequences of a micro batch, the longest that there may be: what costs most where attention is kept."""
    whole, rest = divmod(residues, max_residues)
    return [max_residues + special] * whole + ([rest + special] if rest else [])


def _largest_bins(recipe: Recipe, usable: float, needed_with: Callable[[int], int]) -> int | None:
    longest = max(phase.max_residues for phase in recipe.phases)
    sizes = range(longest, max(longest, recipe.loading.bin_residues) + 1, _STEP_RESIDUES)
    return max((size for size in sizes if needed_with(size) <= usable), default=None)


def _advice(recipe: Recipe, usable: float, needed_with: Callable[[int], int]) -> str:
    fitting, longest = _largest_bins(recipe, usable, needed_with), max(phase.max_residues for phase in recipe.phases)
    if fitting:
        return f"Take smaller micro batches: --set loading.bin_residues={fitting} is the largest that fits (the step stays the same)"
    ways = ["--set memory.recompute_every=1 computes layers again for the gradient instead of keeping them"] if not recipe.memory.recompute_every else []
    ways += ["--set precision=bf16 (or fp16) halves the activations, if the hardware has it"] if not LEVELS[recipe.precision].is_half else []
    other = "".join(f"{way}; " for way in ways) + ("else " if ways else "")
    return (
        f"Smaller micro batches do not help: a sequence of {longest} residues alone needs {needed_with(longest) / GIB:.1f} GiB. "
        f"{other}take a machine with more memory a rank, a smaller model, or shorter sequences (phases.N.max_residues)"
    )
