"""What a training takes of the memory of one rank, part by part. Pure arithmetic, no torch.

Weights, gradients and fp32 masters as the precision has them, the optimizer's fp32 state; under autocast the cast weights; the activations of one
micro batch under the recipe's policies, and what the backward pass, then an update, needs for a moment; where ranks compute on the host, the
copy of the state that a save writes from. Sharded models have their share of all that is cut, and gather a layer's weights while they compute it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from ..architecture import Architecture
from ..parallel_layout import ParallelLayout
from ..precision_levels import LEVELS
from ..recipe import Recipe
from .recomputation import Kept, Tokens, attention_size, kept_bytes

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
_GATHERED_LAYERS = 2
"""Layers whose weights a sharded model has whole at once: the one that is computed and the next, on its way."""
AHEAD_BYTES = 64 << 20
"""Large model support brings back so much before it is wanted, however small its limit is; tests hold it against the ranks' side."""


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that one rank needs."""

    parameters: int
    gradients: int
    optimizer: int
    cast_weights: int
    activations: int
    """What the layers keep for the gradient, of the fullest micro batch of any phase, and what the pass back through them needs for a moment."""
    update: int
    """For a moment, when the activations are gone."""
    masters: int = 0
    """The fp32 weights behind half ones."""
    lanes: int = 0
    """What a model with memory remembers of this rank's lanes."""
    checkpoint: int = 0
    """The copy that a save is written from, where it lies in the same memory."""
    gathered: int = 0
    """Whole weights, and gradients, of a sharded model's layers while they are computed."""
    on_host: int = 0
    """In host memory: masters, state and buffers of an optimizer there. Not a part of the peak."""
    kept: int = 0
    """Of the activations, those that the end of the forward pass leaves on the device."""
    moved: int = 0
    """Bytes that large model support moves to the host and back in a micro batch."""

    @property
    def in_host(self) -> int:
        """All that lies in host memory at once."""
        return self.on_host + self.moved

    @property
    def fixed(self) -> int:
        """What no choice of micro batch changes."""
        return self.parameters + self.gradients + self.masters + self.optimizer + self.lanes + self.checkpoint

    @property
    def peak(self) -> int:
        """In the forward or backward pass, or in the update, whichever is more."""
        return self.fixed + max(self.cast_weights + self.gathered + self.activations, self.update)


@dataclass(frozen=True)
class Rank:
    """What is to be known of a rank."""

    on_gpu: bool
    layout: ParallelLayout

    @property
    def num_ranks(self) -> int:
        """The world size."""
        return self.layout.num_ranks


def need_of(recipe: Recipe, chosen: Architecture, shape: Any, batches: Iterable[Tokens], rank: Rank) -> MemoryNeed:
    """What a rank needs for the largest of some micro batches; the memory of lanes is not in it."""
    level, whole = LEVELS[recipe.precision], chosen.num_parameters(shape)
    count = own_parameters(chosen, shape, rank.layout)
    layers = layer_parameters(chosen, shape)
    on_host = recipe.memory.optimizer_on == "host"
    kept_in = _kept_in(recipe)
    kept = [_under_layout(kept_bytes(chosen, shape, tokens, kept_in, recipe, packed=rank.on_gpu), shape, tokens, rank.layout, kept_in) for tokens in batches]
    device = [on_device(one, recipe) for one in kept]
    activations, left, _ = max(device, default=(0, 0, 0))
    state, masters = round(_STATE[recipe.optimizer.name] * count), _FP32 * count if level.has_masters else 0
    widened = (_FP32 if level.has_masters else 2 * _FP32) * count if level.weight_bytes < _FP32 else 0
    working = widened + (round(_UPDATE[recipe.optimizer.name] * min(count, _GROUP.get(recipe.optimizer.name, count))) if rank.on_gpu else 0)
    gathered = 0
    if rank.layout.num_shards > 1:
        outside = (whole - sum(layers)) * (_FP32 if not level.is_half else _CAST)
        gathered = round((_GATHERED_LAYERS + 1) * max(layers, default=0) / rank.layout.num_tensor * level.weight_bytes + outside)
    return MemoryNeed(
        parameters=level.weight_bytes * count,
        gradients=level.weight_bytes * count,
        masters=0 if on_host else masters,
        optimizer=0 if on_host else state,
        # Casts are made of gathered weights: they are not cut over shards.
        cast_weights=_cast_weights(recipe, count * rank.layout.num_shards, kept) if level.is_half and level.weight_bytes == _FP32 else 0,
        activations=activations,
        update=0 if on_host else working,
        checkpoint=0 if rank.on_gpu else ((masters or level.weight_bytes * count) + state) // min(rank.num_ranks, _MOST_WRITERS),
        gathered=gathered,
        on_host=state + _FP32 * count if on_host else 0,
        kept=left,
        moved=max((one[2] for one in device), default=0),
    )


def _kept_in(recipe: Recipe) -> str:
    level = LEVELS[recipe.precision]
    if level.is_half and level.weight_bytes < _FP32 and not level.has_masters:
        return "half"
    return "bf16" if level.is_half else "fp32"


def on_device(kept: Kept, recipe: Recipe) -> tuple[int, int, int]:
    """(most at once, left after the forward pass, moved to the host) of what a micro batch keeps, where its limit is heeded."""
    limit = recipe.memory.lms_limit_gib
    if limit is None:
        return kept.peak, kept.after_forward, 0
    movable = [max(0, held - small) for held, small in zip(kept.held, kept.small, strict=True)]
    in_all = kept.rest - kept.small_rest + sum(movable)
    moved = max(0, in_all - int(limit * 2**30))
    left, room = kept.after_forward - moved, max(int(limit * 2**30), AHEAD_BYTES)
    most, before, begun, there = left + kept.finish, in_all, kept.small_rest < kept.rest, kept.after_forward - in_all
    for place in reversed(range(len(movable))):
        held, whole, own = kept.held[place], kept.whole[place], movable[place]
        again = whole + kept.beside - held if held < whole else 0
        # What is moved comes back from the first layer on that wants any of it.
        begun = begun or own > 0
        brought = before if begun else in_all - moved
        most = max(most, there + again + min(brought + kept.working[place], room + kept.replaced[place]))
        before, there = before - own, there - (held - own)
    return min(kept.peak, most), left, moved


def _cast_weights(recipe: Recipe, count: int, kept: list[Kept]) -> int:
    """All of them at the end of the forward pass; of layers that are recomputed, those of one at a time."""
    every = recipe.memory.recompute_every
    num_layers = max((len(one.whole) for one in kept), default=1)
    gone = 0.0 if not every else -(-num_layers // every) / num_layers * (1.0 - 1.0 / num_layers)
    return round(_CAST * count * (1.0 - gone))


def layer_parameters(chosen: Architecture, shape: Any) -> list[int]:
    """Parameters of each layer, those of shapes within a shape, too; [] where layers share theirs."""
    counts: list[int] = []
    for field in dataclasses.fields(shape):
        value = getattr(shape, field.name)
        if field.name in ("num_layers", "num_decoder_layers") and value:
            another = chosen.num_parameters(replace(shape, **{field.name: value + 1})) - chosen.num_parameters(shape)
            counts += [another] * value if another else []
    return counts


def own_parameters(chosen: Architecture, shape: Any, layout: ParallelLayout) -> int:
    """Parameters that one rank holds: layers are cut over a tensor group, all is cut over shards."""
    whole, layers = chosen.num_parameters(shape), sum(layer_parameters(chosen, shape))
    return math.ceil((whole - layers + layers / layout.num_tensor) / layout.num_shards)


def _under_layout(kept: Kept, shape: Any, tokens: Tokens, layout: ParallelLayout, kept_in: str) -> Kept:
    """What ranks of a tensor group keep: heads and the feed-forward width are cut, hidden states are not."""
    if layout.num_tensor == 1:
        return kept
    size = 2 if kept_in == "bf16" else 4
    cut = round(tokens.num * size * (4 * attention_size(shape) + 2 * shape.intermediate_size) * (1.0 - 1.0 / layout.num_tensor))
    return replace(kept, whole=tuple(max(one // 4, one - cut) for one in kept.whole), held=tuple(max(one // 4, one - cut) for one in kept.held))
