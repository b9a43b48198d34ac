"""Self-attention over packed sequences: several back ends of one function, and which one fits where.

Packed means that S sequences lie end to end in T rows; no row attends across a border. A back end is prepared
once a forward pass, from the borders alone, and then called by every layer.

Shapes: T tokens of all sequences, S sequences, H heads, D width of a head, L tokens of one sequence.
Measured on one core of a Zen 4 server, forward and backward of one layer over 30 real proteins (8,000 tokens,
8 heads x 32): fp32 per_sequence 155 ms, bucketed 210, products 200; bf16 products 150, per_sequence 225,
bucketed 260. Real bins hold few sequences of equal length, so buckets cost their gathers and gain nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..memory.keeping import kept

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query, key, value), each [T, H, D] -> [T, H, D]; the scores are scaled by D ** -0.5."""

Prepare = Callable[[Tensor, int], Attend]
"""(cu_seqlens int32 [S + 1], tokens of the longest sequence) -> Attend."""

_FLEX_BLOCK = 128


def prepare(cu_seqlens: Tensor, max_length: int, *, dtype: torch.dtype, backend: str | None = None, dropout: float = 0.0) -> Attend:
    """The attention of one packed batch. `dtype` is that of the queries; `backend` is a key of BACKENDS, None chooses.

    With `dropout` that share of the attention weights is set to 0, others at every call; one back end alone has that.
    """
    if max_length == 0:
        return _attend_nothing
    if dropout > 0.0:
        return _per_sequence(cu_seqlens, max_length, dropout)
    return BACKENDS[backend or choose(cu_seqlens.device.type, dtype)](cu_seqlens, max_length)


def choose(device_type: str, dtype: torch.dtype) -> str:
    """The fastest back end that exists for a device and the type of the queries."""
    if device_type == "cuda":
        return "varlen" if dtype in (torch.bfloat16, torch.float16) and has_varlen() else "flex"
    # oneDNN multiplies bf16 matrices twice as fast as fp32 ones; torch's fused CPU kernel gains nothing from bf16.
    return "products" if dtype == torch.bfloat16 else "per_sequence"


@functools.cache
def has_varlen() -> bool:
    """Whether this torch has `torch.nn.attention.varlen` (2.10 and later)."""
    try:
        import torch.nn.attention.varlen  # noqa: F401
    except ImportError:
        return False
    return True


def _attend_nothing(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """For a batch without sequences: no rows, but connected to all three inputs."""
    return query + key + value


def _varlen(cu_seqlens: Tensor, max_length: int) -> Attend:
    """Flash attention for packed rows, CUDA and half precision only."""
    from torch.nn.attention.varlen import varlen_attn

    # The arguments that torch 2.10 to 2.13 share; the order and the rest of the signature changed in between.
    borders: dict[str, Any] = {"cu_seq_q": cu_seqlens, "cu_seq_k": cu_seqlens, "max_q": max_length, "max_k": max_length}

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = varlen_attn(query=query, key=key, value=value, **borders)
        assert isinstance(result, Tensor)  # a pair only where the log-sum-exp is asked for
        return result

    return attend


def flex_block_mask(cu_seqlens: Tensor, num_tokens: int, *, causal: bool = False) -> Any:
    """The BlockMask of packed sequences, from the borders: no T x T matrix is ever made. `causal` hides the tokens behind one."""
    from torch.nn.attention.flex_attention import BlockMask

    token = torch.arange(num_tokens, device=cu_seqlens.device)
    sequence_T = torch.searchsorted(cu_seqlens[1:], token, right=True)
    first_B = sequence_T[::_FLEX_BLOCK]
    last_B = sequence_T[(token[::_FLEX_BLOCK] + _FLEX_BLOCK - 1).clamp(max=num_tokens - 1)]
    live_BB = (first_B[:, None] <= last_B[None, :]) & (first_B[None, :] <= last_B[:, None])
    if causal:
        live_BB = live_BB.tril()
    num_live_B = live_BB.sum(dim=-1, dtype=torch.int32)
    live_first_BB = live_BB.int().argsort(dim=-1, descending=True, stable=True).int()

    def same_sequence(_batch: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return sequence_T[row] == sequence_T[column]

    def same_sequence_before(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return same_sequence(batch, head, row, column) & (row >= column)

    visible, size = same_sequence_before if causal else same_sequence, (num_tokens, num_tokens)
    return BlockMask.from_kv_blocks(num_live_B[None, None], live_first_BB[None, None], BLOCK_SIZE=_FLEX_BLOCK, mask_mod=visible, seq_lengths=size)


@functools.cache
def compiled_flex() -> Callable[..., Any]:
    """flex_attention, compiled once for all lengths."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex(cu_seqlens: Tensor, _max_length: int) -> Attend:
    """Compiled block-sparse attention, CUDA, any precision."""
    mask_of = functools.cache(functools.partial(flex_block_mask, cu_seqlens))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = mask_of(len(query))
        result: Tensor = compiled_flex()(*(part.transpose(0, 1)[None] for part in (query, key, value)), block_mask=mask)
        return result[0].transpose(0, 1)

    return attend


def _per_sequence(cu_seqlens: Tensor, _max_length: int, dropout: float = 0.0) -> Attend:
    """The fused kernel of torch, one call a sequence: no padding, nothing computed twice."""
    lengths = cu_seqlens.diff().tolist()

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = zip(*(torch.split(part, lengths) for part in (query, key, value)), strict=True)
        return torch.cat([_attend_rows(q[None], k[None], v[None], dropout)[0] for q, k, v in parts])

    return attend


def _attend_rows(query_SLHD: Tensor, key_SLHD: Tensor, value_SLHD: Tensor, dropout: float = 0.0) -> Tensor:
    query, key, value = (part.transpose(1, 2) for part in (query_SLHD, key_SLHD, value_SLHD))
    return functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout).transpose(1, 2)


def _bucketed(cu_seqlens: Tensor, _max_length: int) -> Attend:
    """The fused kernel, one call for all sequences of equal length; still no padding."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    buckets = [(int(length), starts[lengths == length]) for length in torch.unique(lengths)]
    rows = [(start[:, None] + torch.arange(length, device=start.device)).flatten() for length, start in buckets]
    place = torch.cat(rows).argsort()

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        results = []
        for (length, start), row in zip(buckets, rows, strict=True):
            q, k, v = (part.index_select(0, row).view(len(start), length, *part.shape[1:]) for part in (query, key, value))
            results.append(_attend_rows(q, k, v).flatten(0, 1))
        return torch.cat(results).index_select(0, place)

    return attend


class _Products(torch.autograd.Function):
    """Attention as plain matrix products, one sequence at a time; the weights are computed again for the gradient.

    So its memory is linear in L like the fused kernel's, at one product more. Gradients: Dao et al. 2022, appendix B.2.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        result = kept(lambda: _products_of(query, key, value, lengths))
        ctx.save_for_backward(query, key, value, result)
        ctx.lengths = lengths
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, result = ctx.saved_tensors
        (gradient,) = gradients
        wide = torch.promote_types(result.dtype, torch.float32)
        inner = (gradient.to(wide) * result.to(wide)).sum(-1, keepdim=True).to(gradient.dtype)
        totals = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        parts = (torch.split(part, ctx.lengths) for part in (query, key, value, gradient, inner, *totals))
        for q, k, v, g, i, q_total, k_total, v_total in zip(*parts, strict=True):
            weights_HLL, g_HLD, scale = _weights(q, k), g.transpose(0, 1), q.shape[-1] ** -0.5
            v_total.copy_(torch.bmm(weights_HLL.mT, g_HLD).transpose(0, 1))
            scores_HLL = torch.bmm(g_HLD, v.permute(1, 2, 0)).sub_(i.transpose(0, 1)).mul_(weights_HLL).mul_(scale)
            q_total.copy_(torch.bmm(scores_HLL, k.transpose(0, 1)).transpose(0, 1))
            k_total.copy_(torch.bmm(scores_HLL.mT, q.transpose(0, 1)).transpose(0, 1))
        return *totals, None


def _products_of(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    result = torch.empty_like(query)
    for q, k, v, out in zip(*(torch.split(part, lengths) for part in (query, key, value, result)), strict=True):
        out.copy_(torch.bmm(_weights(q, k), v.transpose(0, 1)).transpose(0, 1))
    return result


def _weights(query_LHD: Tensor, key_LHD: Tensor) -> Tensor:
    scores_HLL = torch.bmm(query_LHD.transpose(0, 1) * query_LHD.shape[-1] ** -0.5, key_LHD.permute(1, 2, 0))
    return torch.softmax(scores_HLL, dim=-1)


def _products(cu_seqlens: Tensor, _max_length: int) -> Attend:
    """Plain matrix products, one sequence at a time: the fastest in bf16 on CPUs."""
    lengths = cu_seqlens.diff().tolist()

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result: Tensor = _Products.apply(query, key, value, lengths)  # type: ignore[no-untyped-call] # torch gives apply no type
        return result

    return attend


def _dense(cu_seqlens: Tensor, _max_length: int) -> Attend:
    """The definition, with a T x T mask: slow, for tests."""
    lengths = cu_seqlens.diff().long()
    sequence_T = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    apart_TT = sequence_T[:, None] != sequence_T[None, :]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (part.transpose(0, 1) for part in (query, key, value))
        scores_HTT = (q @ k.mT * query.shape[-1] ** -0.5).masked_fill(apart_TT, -torch.inf)
        result: Tensor = (scores_HTT.softmax(dim=-1) @ v).transpose(0, 1)
        return result

    return attend


BACKENDS: dict[str, Prepare] = {
    "varlen": _varlen,
    "flex": _flex,
    "per_sequence": _per_sequence,
    "bucketed": _bucketed,
    "products": _products,
    "dense": _dense,
}
