"""The back end of `relative_attention` for GPUs: one compiled kernel over all sequences, no matrix of all pairs.

The distance term is a product of every query with every distance, [H, N, P], that the kernel reads at the distance of a
pair. Block-sparse: pairs of blocks without a sequence in common are never looked at.

Shapes: those of `relative_attention`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .relative_attention import Attend, Keys, Sight, Streams, attend_nothing, whole

_BLOCK = 128


@dataclass(frozen=True)
class _Places:
    """Where each row of queries or keys stands."""

    sequence: Tensor
    position: Tensor
    """Within its sequence, memory included."""
    order: Tensor
    document: Tensor


def attend_by_flex(sight: Sight, dropout: float) -> Streams:
    """Both streams. Attention weights cannot be dropped here: `dropout` must be 0."""
    assert dropout == 0.0, "without gradients nothing is dropped"
    return Streams(whole, _stream(sight, strictly=False), _stream(sight, strictly=True) if len(sight.targets) else attend_nothing)


def _stream(sight: Sight, *, strictly: bool) -> Attend:
    # A target must not see its own place in the order, a token may.
    prepared = functools.cache(functools.partial(_prepare, sight, strictly=strictly))

    def attend(query: Tensor, query_distance: Tensor, keys: Keys, table: Tensor) -> Tensor:
        ((key, value),) = keys.parts
        own_N, distance_K, mask = prepared(len(key))
        products_HNP = torch.bmm(query_distance.transpose(0, 1), table.permute(1, 2, 0))

        def add_distance(score: Tensor, _batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
            return score + products_HNP[head, row, distance_K[column] - own_N[row]]

        parts = (part.transpose(0, 1)[None] for part in (query, key, value))
        result: Tensor = _kernel(query.device.type)(*parts, score_mod=add_distance, block_mask=mask, scale=1.0)
        return result[0].transpose(0, 1)

    return attend


@functools.cache
def _kernel(device_type: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    kernel: Callable[..., Any] = flex_attention
    return torch.compile(kernel, dynamic=True) if device_type == "cuda" else kernel


def _prepare(sight: Sight, num_keys: int, *, strictly: bool) -> tuple[Tensor, Tensor, Any]:
    """Two tensors whose difference is the column of a pair's distance (no number is compiled in), and the mask."""
    columns = _keys(sight, num_keys)
    is_token = columns.position >= sight.num_memory
    of_tokens = _Places(*(part[is_token] for part in vars(columns).values()))
    rows = _Places(*(part[sight.targets] for part in vars(of_tokens).values())) if strictly else of_tokens
    last_seen_N = rows.order - 1 if strictly else rows.order

    def may_see(_batch: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        same = (rows.sequence[row] == columns.sequence[column]) & (rows.document[row] == columns.document[column])
        return same & (columns.order[column] <= last_seen_N[row])

    farthest = sight.max_length + sight.num_memory
    return rows.position, columns.position + farthest, _block_mask(rows.sequence, columns.sequence, may_see)


def _keys(sight: Sight, num_keys: int) -> _Places:
    index = torch.arange(num_keys, device=sight.cu_seqlens.device)
    starts = sight.cu_seqlens.long() + sight.num_memory * torch.arange(len(sight.cu_seqlens), device=index.device)
    sequence = torch.searchsorted(starts[1:], index, right=True)
    position = index - starts[sequence]
    order, document = torch.full_like(index, -1), torch.zeros_like(index)
    # A key of the memory counts as of the first token's document.
    token = sight.cu_seqlens.long()[sequence] + (position - sight.num_memory).clamp(min=0)
    if sight.order is not None:
        order = torch.where(position >= sight.num_memory, sight.order[token], order)
    if sight.documents is not None:
        document = sight.documents[token]
    if sight.carried is not None:
        document = torch.where(sight.num_memory - position > sight.carried[sequence], -1, document)
    return _Places(sequence, position, order, document)


def _block_mask(sequence_N: Tensor, sequence_K: Tensor, may_see: Callable[..., Tensor]) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    (first_B, last_B), (first_C, last_C) = _ends(sequence_N), _ends(sequence_K)
    live_BC = (first_B[:, None] <= last_C[None, :]) & (first_C[None, :] <= last_B[:, None])
    num_live_B = live_BC.sum(dim=-1, dtype=torch.int32)
    live_first_BC = live_BC.int().argsort(dim=-1, descending=True, stable=True).int()
    lengths = (len(sequence_N), len(sequence_K))
    return BlockMask.from_kv_blocks(num_live_B[None, None], live_first_BC[None, None], BLOCK_SIZE=_BLOCK, mask_mod=may_see, seq_lengths=lengths)


def _ends(sequence: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last sequence of each block."""
    index = torch.arange(0, len(sequence), _BLOCK, device=sequence.device)
    return sequence[index], sequence[(index + _BLOCK - 1).clamp(max=len(sequence) - 1)]
