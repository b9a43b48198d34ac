"""What a memory policy costs in time: operations that are made again, and bytes that travel to the host and back. Pure arithmetic, no torch.

Operations are those of the architecture's record, a third of them in the forward pass; a recomputed layer makes its own again, less what it keeps
(Korthikanti et al. 2022, Reducing Activation Recomputation in Large Transformer Models, counts alike). Copies run beside the computation
(Ren et al. 2021, ZeRO-Offload): those of the forward pass hide behind it, those back behind the backward pass, and only what is longer counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..architecture import Architecture
from ..machine import Gpu
from ..precision_levels import LEVELS
from ..recipe import Recipe
from .memory_need import MemoryNeed
from .rate import rate_of
from .recomputation import Tokens, attention_size

ASSUMED_HOST_BYTES_PER_S = 12e9
"""One way between a GPU and its host, where the machine profile does not say: what PCIe 3.0 with 16 lanes (15.75 GB/s) is left with."""
NARROWING = 0.04
"""Share of a step that saving in bf16 costs; measured on a CPU, 6 layers x 256 (benchmarks/results/memory_policies.md). On a GPU it is bound by memory, too."""
HOST_UPDATE_S = {"lamb": 1.39e-9, "adamw": 0.76e-9, "adam": 0.76e-9, "adafactor": 1.39e-9}
"""Seconds a parameter of an update on the host: LAMB's two-pass kernel and torch's fused AdamW on 98.7 M parameters, two cores of an AMD EPYC
(benchmarks/results/lamb.md); Adam and Adafactor, which were not measured, as these."""
_FORWARD = 1.0 / 3.0


@dataclass(frozen=True)
class Speed:
    """How fast a rank is."""

    flops_per_s: float | None
    """None: unknown, and then only operations are compared."""
    host_bytes_per_s: float = ASSUMED_HOST_BYTES_PER_S
    source: str = "a rate that nobody knows: times are only to be compared with one another"
    """Where it comes from, for people."""


def speed_of(gpu: Gpu | None, precision: str) -> Speed:
    """Of a machine's GPU, by its profile; of a CPU nothing is known."""
    rate = None if gpu is None else rate_of(gpu, precision)
    if gpu is None or rate is None:
        return Speed(None)
    return Speed(rate.flops_per_s, gpu.host_bytes_per_s or ASSUMED_HOST_BYTES_PER_S, rate.source)


@dataclass(frozen=True)
class MicroBatch:
    """What is computed at once, and how often before an update."""

    tokens: Tokens
    num_micro_batches: int = 1


def time_factor(recipe: Recipe, chosen: Architecture, shape: Any, batch: MicroBatch, need: MemoryNeed, speed: Speed) -> float:
    """A step's time over that of the same step with nothing given up."""
    again = recomputed_share(recipe, chosen, shape, batch.tokens.lengths)
    narrowing = NARROWING if recipe.memory.saved == "bf16" else 0.0
    if speed.flops_per_s is None:
        return 1.0 + again + narrowing
    plain_s = chosen.flops(shape, batch.tokens.lengths) / speed.flops_per_s
    copy_s = need.moved / speed.host_bytes_per_s
    forward_s, backward_s = _FORWARD * plain_s, (1.0 - _FORWARD + again + narrowing) * plain_s
    step_s = batch.num_micro_batches * (max(forward_s, copy_s) + max(backward_s, copy_s)) + _host_update_s(recipe, need, speed)
    return step_s / max(batch.num_micro_batches * plain_s, 1e-30)


def _host_update_s(recipe: Recipe, need: MemoryNeed, speed: Speed) -> float:
    """Gradients come, the CPU updates, weights leave: three stages of a pipeline, of which the slowest counts."""
    if recipe.memory.optimizer_on == "device":
        return 0.0
    count = need.parameters / LEVELS[recipe.precision].weight_bytes
    return max(need.gradients / speed.host_bytes_per_s, count * HOST_UPDATE_S[recipe.optimizer.name])


def recomputed_share(recipe: Recipe, chosen: Architecture, shape: Any, lengths: Sequence[int]) -> float:
    """Operations made again, as a share of all of a step."""
    every = recipe.memory.recompute_every
    total = chosen.flops(shape, lengths)
    if not every or not total:
        return 0.0
    again = 0.0
    for count, part, with_another in layer_kinds(shape):
        layer = _FORWARD * (chosen.flops(with_another, lengths) - total)
        again += -(-count // every) * max(0.0, layer - min(layer, _kept_operations(recipe.memory.recompute_keeps, part, lengths)))
    return again / total


def _kept_operations(keeps: str, part: Any, lengths: Sequence[int]) -> float:
    """Of one layer's forward pass, those whose results are kept."""
    if keeps == "nothing":
        return 0.0
    num_tokens, attention = float(sum(lengths)), attention_size(part)
    kept = 4.0 * attention * sum(length * length for length in lengths)
    narrow = 2.0 * num_tokens * part.hidden_size * part.intermediate_size
    kept += narrow if keeps in ("attention_and_narrow", "attention_and_half") else 0.0
    return kept + (2.0 * 2.0 * num_tokens * part.hidden_size * attention if keeps == "attention_and_half" else 0.0)


def layer_kinds(shape: Any) -> list[tuple[int, Any, Any]]:
    """For each stack of layers: how many, the shape that has them, and the whole shape with one more."""
    found: list[tuple[int, Any, Any]] = []
    for field in dataclasses.fields(shape):
        value = getattr(shape, field.name)
        if field.name in ("num_layers", "num_decoder_layers") and value:
            found.append((value, shape, replace(shape, **{field.name: value + 1})))
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            found += [(count, part, replace(shape, **{field.name: inner})) for count, part, inner in layer_kinds(value)]
    return found
