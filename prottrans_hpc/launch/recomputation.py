"""What a forward pass keeps when some layers are computed again for the gradient. Pure arithmetic over an architecture's record."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from ..architecture import Architecture

_LAYER_COUNTS = ("num_layers", "num_decoder_layers")
"""Fields of a shape, or of a shape within it, that say how often a layer is applied; every n-th application is recomputed."""


def activation_bytes(chosen: Architecture, shape: Any, lengths: Sequence[int], kept_in: str, recompute_every: int) -> int:
    """Bytes kept for the backward pass by a micro batch of sequences of `lengths` tokens, at the worst moment.

    A recomputed layer keeps its input, in fp32 at most; in the backward pass one such layer is there at a time. What a
    layer keeps is what one layer more would add, as bytes grow in proportion to layers.
    """
    everything = chosen.activation_bytes(shape, lengths, kept_in)
    if not recompute_every:
        return everything
    saved, largest = 0, 0
    for count, width, with_another in _stacks(shape):
        layer = chosen.activation_bytes(with_another, lengths, kept_in) - everything
        saved += -(-count // recompute_every) * max(0, layer - 4 * width * sum(lengths))
        largest = max(largest, layer)
    return everything - saved + largest if saved else everything


def _stacks(shape: Any) -> Iterator[tuple[int, int, Any]]:
    """For each stack of layers: how many, their width, and the whole shape with one more of them."""
    for field in dataclasses.fields(shape):
        value = getattr(shape, field.name)
        if field.name in _LAYER_COUNTS and value:
            yield value, shape.hidden_size, dataclasses.replace(shape, **{field.name: value + 1})
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            for count, width, inner in _stacks(value):
                yield count, width, dataclasses.replace(shape, **{field.name: inner})
