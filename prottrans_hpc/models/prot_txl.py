"""Transformer-XL on packed protein sequences or lanes (Dai et al. 2019): post-norm, causal, relative distances, memory.

The function is that of `transformers.TransfoXLLMHeadModel` (4.35) without adaptive embeddings; the layout is not: T rows of all
sequences end to end. With lanes a batch continues the texts whose last hidden states are in its memory, in training over all
of it; when the model is evaluated, and wherever there are no lanes, a token sees the `memory_length` tokens up to its own
("same length"), so that reading a protein at once or piece by piece is the same function.

Shapes: T tokens, S lanes or sequences, N layers, M tokens of the memory, P distances, W width of the hidden states, H heads, D width
of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..architecture import Batch, LossSum
from ..architectures.prot_txl import TxlShape
from .causal_attention import Attention, Sight, prepare
from .layers import build_empty, compute_dtype, run_layer, table
from .tensor_group import copy_to_group, own_part, own_part_of_each

_SEGMENT_WINDOWS = 4
"""A longer protein than so many windows is read piece by piece, which bounds the memory that its layers take."""


Biases = tuple[Tensor, Tensor]
"""Of contents and of distances, [H, D] each; all layers share them."""


class Layer(nn.Module):
    """Attention and feed-forward part, each added to its input and then normalised."""

    def __init__(self, shape: TxlShape) -> None:
        super().__init__()
        width, inner, heads = shape.hidden_size, shape.intermediate_size, shape.inner_size
        self.head_size, self.dropout = shape.head_size, shape.dropout
        self.query_key_value = nn.Linear(width, 3 * heads, bias=False)
        self.distance = nn.Linear(width, heads, bias=False)
        self.attention_output = nn.Linear(heads, width, bias=False)
        self.attention_norm = nn.LayerNorm(width, eps=shape.layer_norm_epsilon)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.output_norm = nn.LayerNorm(width, eps=shape.layer_norm_epsilon)

    def forward(self, hidden_TW: Tensor, memory_SMW: Tensor | None, distances_PW: Tensor, biases: Biases, attention: Attention, dtype: torch.dtype) -> Tensor:
        """Hidden states in, hidden states out, [T, W]; `dtype` is that of the matrix products."""
        shared = self.query_key_value.weight
        narrow_TW, weight = copy_to_group(hidden_TW.to(dtype), shared), own_part_of_each(shared, 3)
        heads = len(weight) // 3
        if memory_SMW is None:
            query, key, value = functional.linear(narrow_TW, weight).chunk(3, dim=-1)
        else:
            query = functional.linear(narrow_TW, weight[:heads])
            key, value = functional.linear(attention.join(memory_SMW.to(dtype), narrow_TW), weight[heads:]).chunk(2, dim=-1)
        rows = [part.unflatten(-1, (-1, self.head_size)) for part in (query, key, value, self.distance(distances_PW))]
        attended_TW = attention.attend(*rows, *(bias.to(query.dtype) for bias in biases)).flatten(1)
        hidden_TW = self.attention_norm(self._dropped(self.attention_output(attended_TW)) + hidden_TW)
        added_TW = self.down(self._dropped(functional.relu(self.up(hidden_TW))))
        result: Tensor = self.output_norm(self._dropped(added_TW) + hidden_TW)
        return result

    def _dropped(self, values: Tensor) -> Tensor:
        return functional.dropout(values, self.dropout, self.training)


class ProtTxl(nn.Module):
    """The model with its prediction head.

    `backend` (a key of `causal_attention.BACKENDS`) overrules the choice of attention; every `recompute_every`-th layer is
    computed again for the gradient instead of being kept (0: none).
    """

    def __init__(self, shape: TxlShape) -> None:
        super().__init__()
        self.shape = shape
        self.backend: str | None = None
        self.recompute_every = 0
        self.words = table(shape.vocabulary_size, shape.hidden_size)
        self.content_bias = nn.Parameter(torch.empty(shape.num_heads, shape.head_size))
        self.distance_bias = nn.Parameter(torch.empty(shape.num_heads, shape.head_size))
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.head_bias = nn.Parameter(torch.empty(shape.vocabulary_size))

    def forward(self, batch: Batch) -> LossSum:
        """Summed negative log likelihood of the targets, nats, and with lanes their new memory."""
        inputs: list[Tensor] = []
        for hidden_TW in self._states(batch):
            inputs.append(hidden_TW)
        last_TW = inputs.pop()
        logits_MV = self.logits(last_TW.index_select(0, batch.target_positions)).float()
        loss = functional.cross_entropy(logits_MV, batch.targets, reduction="sum")
        num_correct = (logits_MV.argmax(dim=-1) == batch.targets).sum()
        return LossSum(loss=loss, num_correct=num_correct, memory=None if batch.lanes is None else self._remember(inputs, batch))

    def hidden(self, batch: Batch) -> Tensor:
        """The last hidden states, [T, W]; without gradients, proteins of any length take bounded memory beside the result."""
        if not torch.is_grad_enabled() and batch.lanes is None and batch.max_length > self._segment:
            return self._piece_by_piece(batch)
        for hidden_TW in self._states(batch):
            last_TW = hidden_TW
        return last_TW

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, [N, V], for hidden states [N, W]."""
        return functional.linear(hidden, self.words.weight, self.head_bias)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw the starting weights: normal matrices, tables and attention biases, norms around 1; equal on every device type."""
        generator, deviation = torch.Generator().manual_seed(seed), self.shape.initializer_range
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, deviation, generator=generator))
            elif name.endswith("norm.weight"):
                parameter.copy_(torch.empty(parameter.shape).normal_(1.0, deviation, generator=generator))
            else:
                parameter.fill_(0.0)

    @property
    def _segment(self) -> int:
        return _SEGMENT_WINDOWS * self.shape.memory_length

    def _states(self, batch: Batch) -> Iterator[Tensor]:
        """The input of each layer, then the output of the last."""
        trains_lanes = self.training and batch.lanes is not None
        memory_NSMW = None if batch.memory is None or batch.max_length == 0 else batch.memory.unbind(1)
        sight = Sight(
            batch.cu_seqlens,
            batch.max_length,
            num_memory=0 if memory_NSMW is None else memory_NSMW[0].shape[1],
            carried=batch.carried,
            documents=batch.documents,
            window=None if trains_lanes else self.shape.memory_length,
        )
        attention = prepare(sight, backend=self.backend)
        hidden_TW = self._dropped(self.words(batch.tokens) * self.shape.hidden_size**0.5)
        yield hidden_TW
        dtype = compute_dtype(hidden_TW)
        distances_PW = self._dropped(encode_distances(attention.num_distances, self.shape.hidden_size, hidden_TW)).to(dtype)
        biases = (own_part(self.content_bias), own_part(self.distance_bias))
        for index, layer in enumerate(self.layers):
            memory_SMW = None if memory_NSMW is None else memory_NSMW[index]
            hidden_TW = run_layer(index, self.recompute_every, layer, hidden_TW, memory_SMW, distances_PW, biases, attention, dtype)
            yield hidden_TW if index + 1 < len(self.layers) else self._dropped(hidden_TW)

    def _dropped(self, values: Tensor) -> Tensor:
        return functional.dropout(values, self.shape.dropout, self.training)

    @torch.no_grad()
    def _remember(self, inputs: list[Tensor], batch: Batch) -> Tensor:
        """The last `memory_length` inputs of every layer, [S, N, M, W]."""
        num_lanes, length = len(batch.cu_seqlens) - 1, self.shape.memory_length
        new_SNLW = torch.stack([hidden_TW.view(num_lanes, -1, hidden_TW.shape[-1]) for hidden_TW in inputs], dim=1)
        if batch.memory is not None and new_SNLW.shape[2] < length:
            new_SNLW = torch.cat([batch.memory, new_SNLW], dim=2)
        return new_SNLW[:, :, -length:].contiguous()

    def _piece_by_piece(self, batch: Batch) -> Tensor:
        """The last hidden states where some sequences are long: those one after the other, in pieces that a memory connects."""
        borders = batch.cu_seqlens.tolist()
        results, first = [], 0
        for start, end in [*pairwise(borders), (borders[-1], borders[-1] + self._segment + 1)]:
            if end - start > self._segment:
                if first < start:
                    results.append(self.hidden(_part(batch, first, start)))
                results.extend(self._pieces(_part(batch, start, min(end, borders[-1]))))
                first = end
        return torch.cat(results)

    def _pieces(self, batch: Batch) -> Iterator[Tensor]:
        memory_1NMW = None
        for start in range(0, len(batch.tokens), self._segment):
            piece = replace(_part(batch, start, min(start + self._segment, len(batch.tokens))), memory=memory_1NMW)
            *inputs, last_TW = self._states(piece)
            memory_1NMW = self._remember(inputs, piece)
            yield last_TW


def _part(batch: Batch, start: int, end: int) -> Batch:
    """Some whole sequences of a packed batch, or a part of one, to be read without targets."""
    inner = batch.cu_seqlens[(batch.cu_seqlens > start) & (batch.cu_seqlens < end)] - start
    edges = batch.cu_seqlens.new_tensor([0, end - start])
    cu_seqlens = torch.cat([edges[:1], inner, edges[1:]])
    longest = int(cu_seqlens.diff().max()) if end > start else 0
    return replace(batch, tokens=batch.tokens[start:end], positions=batch.positions[start:end], cu_seqlens=cu_seqlens, max_length=longest)


def encode_distances(num_distances: int, width: int, like: Tensor) -> Tensor:
    """Sines and cosines of the distances from the largest to 0, [P, W], on the device and in the type of `like`."""
    distance_P = torch.arange(num_distances - 1, -1, -1.0, device=like.device, dtype=like.dtype)
    frequencies = 1.0 / (10000.0 ** (torch.arange(0.0, width, 2.0, device=like.device) / width))
    angles = torch.outer(distance_P, frequencies.to(like.dtype))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def build(shape: TxlShape) -> ProtTxl:
    """The modules on torch's default device; the weights are undefined until `initialise` or `load_state_dict`."""
    return build_empty(lambda: ProtTxl(shape))
