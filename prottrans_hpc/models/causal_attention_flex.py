"""The back end of `causal_attention` for GPUs: one compiled block-sparse kernel over all sequences or lanes.

The distance term is a product of every query with every distance, [H, T, P], that the kernel reads at the distance of a
pair. Each of its elements belongs to one pair at most, so its gradient is added up in no particular order without harm.

Shapes: those of `causal_attention`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .causal_attention import Attention, Sight


def prepare_flex(sight: Sight) -> Attention:
    """All of a memory is among the keys; what may not be seen of it is masked, so no number has to come back from the GPU."""
    num_distances = sight.max_length + sight.num_memory
    prepared = functools.cache(functools.partial(_prepare, sight))

    def attend(query: Tensor, key: Tensor, value: Tensor, table: Tensor, content: Tensor, distance: Tensor) -> Tensor:
        position_T, position_K, mask = prepared(len(query), len(key))
        scale = query.shape[-1] ** -0.5
        rated_HTP = torch.bmm(((query + distance) * scale).transpose(0, 1), table.permute(1, 2, 0))

        def add_distance(score: Tensor, _batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
            place = num_distances - 1 - position_T[row] + position_K[column]
            return score + rated_HTP[head, row, place.clamp(0, num_distances - 1)]

        parts = (part.transpose(0, 1)[None] for part in (query + content, key, value))
        result: Tensor = _kernel(query.device.type)(*parts, score_mod=add_distance, block_mask=mask, scale=scale)
        return result[0].transpose(0, 1)

    def join(memory_SMW: Tensor, hidden_TW: Tensor) -> Tensor:
        num_sequences, _, width = memory_SMW.shape
        return torch.cat([memory_SMW, hidden_TW.view(num_sequences, -1, width)], dim=1).flatten(0, 1)

    return Attention(attend, join, num_distances)


@functools.cache
def _kernel(device_type: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    kernel: Callable[..., Any] = flex_attention
    return torch.compile(kernel, dynamic=True) if device_type == "cuda" else kernel


def _prepare(sight: Sight, num_queries: int, num_keys: int) -> tuple[Tensor, Tensor, Any]:
    """Positions of queries and keys in their sequence, memory included, and the mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    index_K = torch.arange(num_keys, device=sight.cu_seqlens.device)
    tokens = sight.cu_seqlens.long()
    starts = tokens + sight.num_memory * torch.arange(len(tokens), device=index_K.device)
    sequence_K = torch.searchsorted(starts[1:], index_K, right=True)
    position_K = index_K - starts[sequence_K]
    index_T = torch.arange(num_queries, device=index_K.device)
    sequence_T = torch.searchsorted(tokens[1:], index_T, right=True)
    position_T = index_T - tokens[sequence_T] + sight.num_memory
    document_T, document_K = torch.zeros_like(index_T), torch.zeros_like(index_K)
    if sight.documents is not None:
        document_T = sight.documents
        document_K = sight.documents[tokens[sequence_K] + (position_K - sight.num_memory).clamp(min=0)]  # the memory: as the first token
    if sight.carried is not None:
        document_K = torch.where(sight.num_memory - position_K > sight.carried[sequence_K], -1, document_K)
    farthest = num_keys if sight.window is None else sight.window

    def may_see(_batch: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        distance = position_T[row] - position_K[column]
        same = (sequence_T[row] == sequence_K[column]) & (document_T[row] == document_K[column])
        return same & (distance >= 0) & (distance < farthest)

    mask = create_block_mask(may_see, None, None, num_queries, num_keys, device=str(index_K.device))
    return position_T, position_K, mask
