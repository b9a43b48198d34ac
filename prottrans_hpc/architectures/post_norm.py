"""The arithmetic of the post-norm encoder that BERT, ALBERT and ELECTRA share: of a layer, of the embeddings, of the head for residues.

Products are multiply-adds of one forward pass. Bytes are those that a token keeps for the backward pass, where
attention is one kernel a sequence or the plain products; weights and their bf16 copies are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ..errors import ConfigError

MASKED_FRACTION = 0.15
"""Share of the tokens that the head is counted for: the published objective's."""

_NORM = 8
"""Bytes of a norm's mean and deviation for a token."""


def check(hidden_size: int, num_heads: int, *counts: int) -> None:
    """Raises ValueError for a shape that cannot be."""
    if min(hidden_size, num_heads, *counts) < 1:
        raise ValueError("layers, sizes, heads, positions, vocabulary and token types must be at least 1")
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads}")


SPLIT: dict[str, Literal["column", "row"]] = {
    "query": "column",
    "key": "column",
    "value": "column",
    "attention_output": "row",
    "up": "column",
    "down": "row",
}
"""The matrices of a layer that a tensor group shares: whole heads and a part of the feed-forward width each."""


def layer_parameters(width: int, inner: int) -> int:
    """Four matrices of the attention, two of the feed-forward part, their biases, two norms."""
    return 4 * (width * width + width) + (width * inner + inner) + (inner * width + width) + 4 * width


def head_parameters(width: int, embedding_size: int, vocabulary_size: int) -> int:
    """Matrix, norm and bias; the last matrix is the word table."""
    return width * embedding_size + 3 * embedding_size + vocabulary_size


def layer_products(width: int, inner: int, lengths: Sequence[int]) -> float:
    """Of all tokens of sequences of these lengths."""
    num_tokens = float(sum(lengths))
    squares = float(sum(length * length for length in lengths))
    return num_tokens * (4 * width * width + 2 * width * inner) + 2 * squares * width


def head_products(width: int, embedding_size: int, vocabulary_size: int) -> float:
    """Of one target."""
    return float(width * embedding_size + embedding_size * vocabulary_size)


def layer_bytes(width: int, inner: int, num_heads: int, precision: str) -> int:
    """Of one token. Raises ConfigError for a precision other than fp32 and bf16 (autocast, fp32 weights)."""
    if _is_narrow(precision):
        # As below in half the bytes, but the norms' inputs are fp32 and the packed attention result is kept once.
        return 2 * (6 * width + 2 * inner) + 4 * (2 * width + num_heads) + 2 * _NORM
    # Inputs of the linear and norm layers (5), query, key, value and result of the attention; both sides of the GELU.
    return 4 * (9 * width + 2 * inner + num_heads) + 2 * _NORM


def head_bytes(width: int, embedding_size: int, vocabulary_size: int, precision: str) -> int:
    """Of one target. Raises as `layer_bytes` does."""
    each = 2 if _is_narrow(precision) else 4
    return each * (width + 3 * embedding_size) + 4 * vocabulary_size + _NORM


def embedding_bytes(width: int) -> int:
    """Of one token: the norm's input, and two index vectors of int64."""
    return 4 * width + _NORM + 2 * 8


def projection_bytes(width: int, precision: str) -> int:
    """Of one token: the input of the matrix from the embeddings to the hidden states, and in bf16 its narrow copy alone."""
    return (2 if _is_narrow(precision) else 4) * width


def _is_narrow(precision: str) -> bool:
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"no activation arithmetic for the precision {precision!r}; known are fp32 and bf16")
    return precision == "bf16"
