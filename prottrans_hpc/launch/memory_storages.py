"""Which part of what a layer keeps lies in small storages, which large model support leaves where they are. Pure arithmetic, no torch.

A record says how many bytes a layer keeps, as a function of its shape. How much of that is as wide as the feed-forward part, the hidden states or the
heads is what it would keep more were they wider; a storage has one such row a token. Attention that is computed sequence by sequence, as on CPUs,
has storages of a sequence each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

SIZE_BYTES = 1 << 20
"""Large model support leaves smaller storages where they are; tests hold it against the ranks' side."""

Piece = tuple[float, float]
"""Bytes in all, and of one storage."""


@dataclass(frozen=True)
class Layer:
    """A layer, by what it keeps."""

    part: Any
    """The shape that it is of."""
    bytes_of: Callable[[Any], float]
    """What a layer of another such shape would keep."""
    num_tokens: int
    lengths: tuple[int, ...]
    """Tokens of each sequence where attention is computed one by one; empty where all are packed."""
    num_attentions: int
    number_bytes: int
    """Of a number of the type of the products."""
    has_scores: bool
    """Whether what is as wide as nothing else is scores of attention, and not statistics of a few numbers a token."""


def small_bytes(layer: Layer) -> int:
    """Of what it keeps, what lies in storages smaller than SIZE_BYTES."""
    return round(sum(total for total, storage in _pieces(layer) if storage < SIZE_BYTES))


def _pieces(layer: Layer) -> Iterator[Piece]:
    part, row = layer.part, layer.num_tokens * layer.number_bytes
    everything = layer.bytes_of(part)
    inner, hidden = _wider(layer, everything, "intermediate_size"), _wider(layer, everything, "hidden_size")
    heads = _wider(layer, everything, "head_size") if "head_size" in vars(part) else 0.0
    width = getattr(part, "head_size", part.hidden_size // part.num_heads) * part.num_heads
    yield inner, row * part.intermediate_size
    if layer.lengths:
        each = [length * layer.number_bytes * width for length in layer.lengths]
        # The results: queries, keys and values are cut from products of all tokens.
        in_sequences = min(float(layer.num_attentions * sum(each)), heads or hidden)
        yield from ((in_sequences * size / max(1, sum(each)), size) for size in each)
        hidden, heads = (hidden, heads - in_sequences) if heads else (hidden - in_sequences, heads)
    yield hidden, row * part.hidden_size
    if layer.lengths:
        yield heads, row * width
    else:  # keys and values lie side by side
        yield heads / 2, 2 * row * width
        yield heads / 2, row * width
    rest = _rest(layer, everything)
    yield rest, rest if layer.has_scores else 0.0


def dropped_bytes(layer: Layer) -> int:
    """Of the scores of attention that it keeps, what dropout made of them and where: gone when their gradients are there."""
    return round(_rest(layer, layer.bytes_of(layer.part)) * 2 / 3) if layer.has_scores and layer.part.dropout > 0.0 else 0


def _rest(layer: Layer, everything: float) -> float:
    """What is as wide as nothing else."""
    return everything - sum(_wider(layer, everything, field) for field in ("intermediate_size", "hidden_size", "head_size") if field in vars(layer.part))


def _wider(layer: Layer, everything: float, field: str) -> float:
    """Bytes that are in proportion to a field of the shape."""
    return layer.bytes_of(replace(layer.part, **{field: 2 * getattr(layer.part, field)})) - everything
