"""Causal attention of Transformer-XL over packed sequences or lanes: relative distances, a memory in front, a window.

Every query sees keys at the distances 0, 1, 2, ...: those of its own sequence before it, then those of the memory. The
score of a pair is (q + content bias) . k + (q + distance bias) . r[distance] (Dai et al. 2019, section 3.3). What a query sees
is always one stretch of keys, so nothing is masked but the two edges of a block of queries.

Two back ends of one function: "blocks", plain products over blocks of queries, and "flex" for GPUs
(`causal_attention_flex`). Measured on one core of a Zen 4 server, see `_BLOCK`.

Shapes: S sequences, T queries of all of them, K keys, H heads, D width of a head, P distances, W width of hidden states, M tokens
of a memory; in a block Q queries and k keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..memory.keeping import kept

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(query [T, H, D], key [K, H, D], value [K, H, D], table of distances [P, H, D] from the largest to 0, content bias [H, D],
distance bias [H, D]) -> [T, H, D]; the scores are scaled by D ** -0.5."""

_BLOCK = 128
"""Queries at once. Fewer: more of the causal half is never computed; more: larger products."""


@dataclass(frozen=True)
class Sight:
    """Which queries and keys there are, and what may be seen."""

    cu_seqlens: Tensor
    """int32 [S + 1]: where the tokens of each sequence start."""
    max_length: int
    """Tokens of the longest sequence."""
    num_memory: int = 0
    """Tokens that the memory has in front of each sequence."""
    carried: Tensor | None = None
    """int64 [S]: how much of the memory, from its end, a sequence may see; None: all."""
    documents: Tensor | None = None
    """int64 [T]: tokens see one another only where these are equal, the memory only from the first of a sequence; None: everywhere."""
    window: int | None = None
    """Keys that a query may see, its own included; None: all before it."""


@dataclass(frozen=True)
class Attention:
    """What every layer of a forward pass does with one batch."""

    attend: Attend
    join: Callable[[Tensor, Tensor], Tensor]
    """(memory [S, M, W], hidden states [T, W]) -> what keys and values are made from, [K, W]."""
    num_distances: int
    """Rows of the table of distances."""


def prepare(sight: Sight, *, backend: str | None = None) -> Attention:
    """The attention of one batch. `backend` is a key of BACKENDS, None chooses."""
    if sight.max_length == 0:
        return Attention(_attend_nothing, lambda _memory, hidden: hidden, 0)
    return BACKENDS[backend or ("flex" if sight.cu_seqlens.device.type == "cuda" else "blocks")](sight)


def _attend_nothing(query: Tensor, key: Tensor, value: Tensor, table: Tensor, content: Tensor, distance: Tensor) -> Tensor:
    """For a batch without sequences: no rows, but connected to everything."""
    return query + key + value + table[:0] + content + distance


@dataclass(frozen=True)
class _Block:
    """Consecutive queries and the keys that one or more of them see; the last key is the last query's own."""

    first_query: int
    num_queries: int
    first_key: int
    num_keys: int


def _blocks_of(sight: Sight, visible: list[int]) -> Iterator[_Block]:
    """`visible` has the memory's tokens in front of each sequence that are keys."""
    borders = set() if sight.documents is None else set((torch.nonzero(sight.documents.diff()).flatten() + 1).tolist())
    key = 0
    for (start, end), num_memory in zip(pairwise(sight.cu_seqlens.tolist()), visible, strict=True):
        inner = sorted(border for border in borders if start < border < end) if borders else []
        for number, (first, last) in enumerate(pairwise([start, *inner, end])):
            to_keys = key + num_memory - start
            first_key = key if number == 0 else first + to_keys
            for query in range(first, last, _BLOCK):
                num_queries = min(_BLOCK, last - query)
                lowest = first_key if sight.window is None else max(first_key, query + to_keys - sight.window + 1)
                yield _Block(query, num_queries, lowest, query + num_queries + to_keys - lowest)
        key += num_memory + end - start


def _by_blocks(sight: Sight) -> Attention:
    num_sequences = len(sight.cu_seqlens) - 1
    visible = [sight.num_memory] * num_sequences if sight.carried is None else sight.carried.clamp(max=sight.num_memory).tolist()
    blocks = list(_blocks_of(sight, visible))
    lengths = sight.cu_seqlens.diff().tolist()

    def attend(query: Tensor, key: Tensor, value: Tensor, table: Tensor, content: Tensor, distance: Tensor) -> Tensor:
        result: Tensor = _Blocks.apply(query, key, value, table, content, distance, blocks, sight.window)  # type: ignore[no-untyped-call] # of torch
        return result

    def join(memory_SMW: Tensor, hidden_TW: Tensor) -> Tensor:
        seen = (memory_MW[sight.num_memory - number :] for memory_MW, number in zip(memory_SMW, visible, strict=True))
        return torch.cat([part for pair in zip(seen, torch.split(hidden_TW, lengths), strict=True) for part in pair])

    return Attention(attend, join, max(block.num_keys for block in blocks))


def _weights(block: _Block, query_HQD: Tensor, key_HkD: Tensor, table_HkD: Tensor, biases: tuple[Tensor, Tensor], window: int | None) -> Tensor:
    """Softmax of the scores, [H, Q, k]."""
    num_heads, (num_queries, num_keys) = len(query_HQD), (block.num_queries, block.num_keys)
    content, distance = biases
    rated = torch.bmm(query_HQD + distance, table_HkD.mT)
    # Row i has a column a distance, from num_keys - 1 down; for a column a key it moves by Q - 1 - i (appendix B there). Read through a
    # view: what it takes from the next row is behind the query, hence masked.
    shifted = rated.as_strided(rated.shape, (num_queries * num_keys, num_keys - 1, 1), num_queries - 1)
    scores = torch.baddbmm(shifted, query_HQD + content, key_HkD.mT).view(num_heads, num_queries, num_keys)
    return torch.softmax(scores.masked_fill_(_unseen(num_queries, num_keys, window, scores.device), -torch.inf), dim=-1)


def _unseen(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """bool [Q, k]: keys behind a query, and those before its window."""
    everything = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    behind = everything.triu(num_keys - num_queries + 1)
    return behind if window is None else behind | everything.tril(num_keys - num_queries - window)


class _Blocks(torch.autograd.Function):
    """Keeps inputs and results only; the weights are computed again for the gradient."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, table: Tensor, content: Tensor, distance: Tensor, *plan: Any) -> Tensor:
        result = kept(lambda: _products_of((query, key, value, table), (content, distance), *plan))
        ctx.save_for_backward(query, key, value, table, content, distance, result)
        ctx.plan = plan
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, table, content, distance, result = ctx.saved_tensors
        (gradient,), (blocks, window) = gradients, ctx.plan
        totals = [torch.zeros_like(part) for part in (query, key, value, table)]
        of_biases = [torch.zeros_like(bias, dtype=torch.promote_types(bias.dtype, torch.float32)) for bias in (content, distance)]
        scale = query.shape[-1] ** -0.5
        biases = tuple((bias * scale)[:, None] for bias in (content, distance))
        wide = torch.promote_types(result.dtype, torch.float32)
        inner_TH = (gradient.to(wide) * result.to(wide)).sum(-1).to(gradient.dtype)
        for block in blocks:
            _backward_block(block, (query, key, value, table), (gradient, inner_TH), biases, window, totals, of_biases)
        of_content, of_distance = (total.to(bias.dtype) for total, bias in zip(of_biases, (content, distance), strict=True))
        return *totals, of_content, of_distance, None, None


def _products_of(inputs: tuple[Tensor, ...], plain_biases: tuple[Tensor, Tensor], blocks: list[_Block], window: int | None) -> Tensor:
    query, key, value, table = inputs
    result, scale = torch.empty_like(query), query.shape[-1] ** -0.5
    content, distance = ((bias * scale)[:, None] for bias in plain_biases)
    for block in blocks:
        rows, columns = _rows(block)
        weights = _weights(block, query[rows].transpose(0, 1) * scale, *_keys(block, key, table), (content, distance), window)
        result[rows] = torch.bmm(weights, value[columns].transpose(0, 1)).transpose(0, 1)
    return result


def _backward_block(
    block: _Block,
    inputs: tuple[Tensor, ...],
    gradients: tuple[Tensor, Tensor],
    biases: tuple[Tensor, ...],
    window: int | None,
    totals: list[Tensor],
    of_biases: list[Tensor],
) -> None:
    query, key, value, table = inputs
    (rows, columns), scale = _rows(block), query.shape[-1] ** -0.5
    query_HQD, (key_HkD, table_HkD) = query[rows].transpose(0, 1) * scale, _keys(block, key, table)
    weights = _weights(block, query_HQD, key_HkD, table_HkD, (biases[0], biases[1]), window)
    gradient_HQD = gradients[0][rows].transpose(0, 1)
    totals[2][columns] += torch.bmm(weights.mT, gradient_HQD).transpose(0, 1)
    num_heads, num_queries, num_keys = weights.shape
    # The scores' gradient behind Q - 1 zeros: so its rows can be read moved back, by distance, without a copy.
    padded = torch.zeros(num_heads, num_queries * num_keys + num_queries - 1, dtype=weights.dtype, device=weights.device)
    by_key = padded[:, num_queries - 1 :].view(num_heads, num_queries, num_keys)
    torch.sub(torch.bmm(gradient_HQD, value[columns].permute(1, 2, 0)), gradients[1][rows].T[..., None], out=by_key)
    by_key.mul_(weights)
    by_distance = padded.as_strided(weights.shape, (padded.shape[1], num_keys + 1, 1))
    of_content, of_distance = torch.bmm(by_key, key_HkD), torch.bmm(by_distance, table_HkD)
    totals[0][rows] = (of_content + of_distance).mul_(scale).transpose(0, 1)
    totals[1][columns] += torch.bmm(by_key.mT, query_HQD + biases[0]).transpose(0, 1)
    totals[3][len(table) - num_keys :] += torch.bmm(by_distance.mT, query_HQD + biases[1]).transpose(0, 1)
    of_biases[0] += of_content.sum(1, dtype=of_biases[0].dtype) * scale
    of_biases[1] += of_distance.sum(1, dtype=of_biases[1].dtype) * scale


def _rows(block: _Block) -> tuple[slice, slice]:
    """Of the queries, and of keys and values."""
    return slice(block.first_query, block.first_query + block.num_queries), slice(block.first_key, block.first_key + block.num_keys)


def _keys(block: _Block, key: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and distances by head, [H, k, D] each."""
    return key[_rows(block)[1]].transpose(0, 1), table[len(table) - block.num_keys :].transpose(0, 1)


def _by_flex(sight: Sight) -> Attention:
    from .causal_attention_flex import prepare_flex

    return prepare_flex(sight)


BACKENDS: dict[str, Callable[[Sight], Attention]] = {"blocks": _by_blocks, "flex": _by_flex}
