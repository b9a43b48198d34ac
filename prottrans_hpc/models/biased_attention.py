"""Attention with a bias for the distance of two tokens, and attention from one packed text to another: T5's.

T5 does not scale its scores. All layers of a stack share one bias, so it is given when a batch is prepared: a number
for each head and distance, never a matrix. A decoder's hidden future is a bias of minus infinity.

Shapes: T tokens of all sequences, H heads, D width of a head, R distances: column d + (R - 1) / 2 is distance d of the key from
the query; L tokens of one sequence, I its queries from the last to the first, J its keys: row I and column J of the
bias then add up to the distance, which makes the matrix a view of the vector (`unfold`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..memory.keeping import kept
from . import attention
from .attention import Attend


def prepare_biased(cu_seqlens: Tensor, bias_HR: Tensor, *, causal: bool, dropout: float = 0.0, backend: str | None = None) -> Attend:
    """The self-attention of one packed batch, scores not scaled. `backend` is a key of BACKENDS, None chooses.

    `bias_HR` must reach as far as the longest sequence. With `dropout` that share of the attention weights is set to
    0, others at every call; the plain products alone have that.
    """
    reach = bias_HR.shape[1] // 2
    if cu_seqlens.shape[0] == 1:
        return lambda query, key, value: query + key + value + bias_HR.sum()
    if causal:
        future_R = torch.arange(-reach, reach + 1, device=bias_HR.device) > 0
        bias_HR = bias_HR.masked_fill(future_R, -math.inf)
    if dropout > 0.0:
        return _products(cu_seqlens, bias_HR, causal, dropout)
    return BACKENDS[backend or choose(cu_seqlens.device.type, trains=bias_HR.requires_grad)](cu_seqlens, bias_HR, causal)


def choose(device_type: str, *, trains: bool) -> str:
    """The fastest back end that exists for a device: torch's fused CPU kernel has no gradient for a bias."""
    if device_type == "cuda":
        return "flex"
    return "products" if trains else "per_sequence"


def prepare_cross(
    cu_queries: Tensor, cu_keys: Tensor, longest: tuple[int, int], *, dtype: torch.dtype, dropout: float = 0.0, backend: str | None = None
) -> Attend:
    """Attention from each sequence of one packed text to that of the same number in another, scores not scaled.

    `longest` has the tokens of the longest sequence of either; `dtype` is that of the queries. Of the back ends that
    have names, "dense" makes a difference here: it is the definition, as everywhere.
    """
    if cu_queries.shape[0] == 1:
        return lambda query, key, value: query + key + value
    if cu_queries.device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and dropout == 0.0 and not backend and attention.has_varlen():
        return _cross_varlen(cu_queries, cu_keys, longest)
    num_queries, num_keys = cu_queries.diff().tolist(), cu_keys.diff().tolist()

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        results = []
        for parts in zip(torch.split(query, num_queries), torch.split(key, num_keys), torch.split(value, num_keys), strict=True):
            q, k, v = (part.transpose(0, 1)[None] for part in parts)
            results.append(_plain(q, k, v) if backend == "dense" else _fused(q, k, v, dropout))
        return torch.cat([result[0].transpose(0, 1) for result in results])

    return attend


def _fused(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=1.0)


def _plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT).softmax(dim=-1) @ value


def _cross_varlen(cu_queries: Tensor, cu_keys: Tensor, longest: tuple[int, int]) -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    borders: dict[str, Any] = {"cu_seq_q": cu_queries, "cu_seq_k": cu_keys, "max_q": longest[0], "max_k": longest[1]}

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Not every torch that has this function lets its scale be chosen: the queries undo it.
        result = varlen_attn(query=query * query.shape[-1] ** 0.5, key=key, value=value, **borders)
        assert isinstance(result, Tensor)
        return result

    return attend


def bias_of(bias_HR: Tensor, length: int) -> Tensor:
    """A view [H, I, J] of the biases between the tokens of one sequence, its queries from the last to the first."""
    middle = bias_HR.shape[1] // 2
    return bias_HR[:, middle - length + 1 : middle + length].unfold(-1, length, 1)


def sum_of_distances(matrix_HIJ: Tensor) -> Tensor:
    """[H, I + J - 1]: the sums of a matrix over all pairs whose row and column add up to the same; the transpose of `bias_of`."""
    num_heads, num_rows, num_columns = matrix_HIJ.shape
    width = num_columns + num_rows - 1
    # In rows one shorter than they are padded to, each starts one column later than the one before: equal sums meet.
    skewed = functional.pad(matrix_HIJ, (0, num_rows)).flatten(1)[:, : num_rows * width].view(num_heads, num_rows, width)
    return skewed.sum(dim=1)


_ROOM = 1 << 18
"""Numbers of a block of scores: 1 MiB, which stays in a core's cache."""


def _blocks(length: int, num_heads: int) -> Iterator[tuple[slice, slice]]:
    """Heads and query rows of each block of one sequence's scores: some heads whole, or rows of one head where that is too large."""
    rows = min(length, max(1, _ROOM // length))
    heads = max(1, _ROOM // (rows * length))
    for head in range(0, num_heads, heads):
        for row in range(0, length, rows):
            yield slice(head, head + heads), slice(row, row + rows)


class _Products(torch.autograd.Function):
    """Plain matrix products, a block of scores at a time; the weights are computed again for the gradient, which the bias gets too.

    So its memory is linear in L. Gradients: Dao et al. 2022, appendix B.2. What is dropped is drawn again from the same seed.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias_HR: Tensor, lengths: list[int], dropout: float) -> Tensor:
        seed = int(torch.randint(1 << 62, ()).item()) if dropout else 0
        result = kept(lambda: _products_of((query, key, value), bias_HR, lengths, dropout, seed))
        ctx.save_for_backward(query, key, value, bias_HR, result)
        ctx.settings = lengths, dropout, seed
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
        query, key, value, bias_HR, result = ctx.saved_tensors
        (gradient,) = gradients
        lengths, dropout, seed = ctx.settings
        wide = torch.promote_types(result.dtype, torch.float32)
        inner = (gradient.to(wide) * result.to(wide)).sum(-1, keepdim=True).to(gradient.dtype)
        totals = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        bias_total = torch.zeros_like(bias_HR)
        seeds = itertools.count(seed)
        for q, k, v, g, i, q_total, k_total, v_total in _sequences(lengths, query, key, value, gradient, inner, *totals):
            length, q_IHD, g_IHD, inner_IH1, q_total_IHD = len(q), q.flip(0), g.flip(0), i.flip(0), torch.empty_like(q)
            first = bias_HR.shape[1] // 2 - length + 1
            for heads, rows in _blocks(length, q.shape[1]):
                weights_HIJ = _weights(q_IHD[rows, heads], k[:, heads], bias_of(bias_HR, length)[heads, rows])
                g_HID = g_IHD[rows, heads].transpose(0, 1)
                scores_HIJ = torch.bmm(g_HID, v[:, heads].permute(1, 2, 0))
                kept_HIJ = _kept(weights_HIJ, dropout, next(seeds)) if dropout else None
                v_total[:, heads] += torch.bmm((weights_HIJ if kept_HIJ is None else weights_HIJ * kept_HIJ).mT, g_HID).transpose(0, 1)
                if kept_HIJ is not None:
                    scores_HIJ *= kept_HIJ
                scores_HIJ.sub_(inner_IH1[rows, heads].transpose(0, 1)).mul_(weights_HIJ)
                sums = sum_of_distances(scores_HIJ)
                bias_total[heads, first + rows.start : first + rows.start + sums.shape[1]] += sums
                q_total_IHD[rows, heads] = torch.bmm(scores_HIJ, k[:, heads].transpose(0, 1)).transpose(0, 1)
                k_total[:, heads] += torch.bmm(scores_HIJ.mT, q_IHD[rows, heads].transpose(0, 1)).transpose(0, 1)
            q_total.copy_(q_total_IHD.flip(0))
        return *totals, bias_total, None, None


def _products_of(parts: tuple[Tensor, ...], bias_HR: Tensor, lengths: list[int], dropout: float, seed: int) -> Tensor:
    result, seeds = torch.empty_like(parts[0]), itertools.count(seed)
    for q, k, v, out in _sequences(lengths, *parts, result):
        q_IHD, out_IHD = q.flip(0), torch.empty_like(out)
        for heads, rows in _blocks(len(q), q.shape[1]):
            weights_HIJ = _weights(q_IHD[rows, heads], k[:, heads], bias_of(bias_HR, len(q))[heads, rows])
            if dropout:
                weights_HIJ *= _kept(weights_HIJ, dropout, next(seeds))
            out_IHD[rows, heads] = torch.bmm(weights_HIJ, v[:, heads].transpose(0, 1)).transpose(0, 1)
        out.copy_(out_IHD.flip(0))
    return result


def _sequences(lengths: list[int], *parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(part, lengths) for part in parts), strict=True)


def _weights(query_IHD: Tensor, key_JHD: Tensor, bias_HIJ: Tensor) -> Tensor:
    scores_HIJ = torch.baddbmm(bias_HIJ.to(query_IHD.dtype), query_IHD.transpose(0, 1), key_JHD.permute(1, 2, 0))
    return torch.softmax(scores_HIJ, dim=-1)


def _kept(like: Tensor, dropout: float, seed: int) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.empty_like(like).bernoulli_(1.0 - dropout, generator=generator).div_(1.0 - dropout)


def _products(cu_seqlens: Tensor, bias_HR: Tensor, _causal: bool, dropout: float = 0.0) -> Attend:
    """Plain matrix products, one sequence at a time: what trains on a CPU."""
    lengths = cu_seqlens.diff().tolist()

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result: Tensor = _Products.apply(query, key, value, bias_HR, lengths, dropout)  # type: ignore[no-untyped-call] # torch gives apply no type
        return result

    return attend


def _per_sequence(cu_seqlens: Tensor, bias_HR: Tensor, _causal: bool) -> Attend:
    """The fused kernel of torch, one call a sequence, without a gradient for the bias."""
    lengths = cu_seqlens.diff().tolist()

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        bias = bias_HR.to(query.dtype)
        results = []
        for q, k, v in _sequences(lengths, query, key, value):
            q_1HID, k_1HJD, v_1HJD = (part.transpose(0, 1)[None] for part in (q.flip(0), k, v))
            result_1HID = functional.scaled_dot_product_attention(q_1HID, k_1HJD, v_1HJD, attn_mask=bias_of(bias, len(q))[None], scale=1.0)
            results.append(result_1HID[0].transpose(0, 1).flip(0))
        return torch.cat(results)

    return attend


def _flex(cu_seqlens: Tensor, bias_HR: Tensor, causal: bool) -> Attend:
    """Compiled block-sparse attention, CUDA, any precision."""
    mask: Any = None
    score_mod = biased_score(bias_HR)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        nonlocal mask
        if mask is None:
            mask = attention.flex_block_mask(cu_seqlens, len(query), causal=causal)
        rows = (part.transpose(0, 1)[None] for part in (query, key, value))
        result: Tensor = attention.compiled_flex()(*rows, score_mod=score_mod, block_mask=mask, scale=1.0)
        return result[0].transpose(0, 1)

    return attend


def biased_score(bias_HR: Tensor) -> Callable[..., Tensor]:
    """The score modification of flex_attention that adds the bias."""
    # Tensors, not numbers, so that a batch of another length does not compile anew.
    last = torch.tensor(bias_HR.shape[1] - 1, device=bias_HR.device)
    reach, nearest = last // 2, torch.zeros_like(last)

    def score_mod(score: Tensor, _batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        # Farther than the reach are only tokens of other sequences, which the mask hides.
        place = torch.minimum(torch.maximum(column - row + reach, nearest), last)
        return score + bias_HR[head, place]

    return score_mod


def _dense(cu_seqlens: Tensor, bias_HR: Tensor, _causal: bool) -> Attend:
    """The definition, with a T x T mask: slow, for tests."""
    lengths = cu_seqlens.diff().long()
    sequence_T = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    token_T, reach = torch.arange(len(sequence_T), device=lengths.device), bias_HR.shape[1] // 2
    apart_TT = sequence_T[:, None] != sequence_T[None, :]
    bias_HTT = bias_HR[:, (token_T[None, :] - token_T[:, None] + reach).clamp(0, 2 * reach)]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (part.transpose(0, 1) for part in (query, key, value))
        scores_HTT = (q @ k.mT + bias_HTT).masked_fill(apart_TT, -torch.inf)
        result: Tensor = (scores_HTT.softmax(dim=-1) @ v).transpose(0, 1)
        return result

    return attend


BACKENDS: dict[str, Callable[[Tensor, Tensor, bool], Attend]] = {
    "flex": _flex,
    "products": _products,
    "per_sequence": _per_sequence,
    "dense": _dense,
}
