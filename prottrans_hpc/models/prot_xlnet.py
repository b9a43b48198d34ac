"""XLNet on packed protein sequences or on lanes with a memory: two-stream attention with relative positions.

The function is that of `transformers.XLNetLMHeadModel`; the layout is not: T rows of all sequences end to end, no
padding, a query row for each of the M targets only, and a last layer whose content stream nobody needs and nobody
computes. Residues are not corrupted: the order of factorisation says what each query may see, so that the content
stream of a training step is not the one that `hidden` gives, where all see all.

Sequences have one segment, so the segment terms of the published weights (a table and a bias a layer) are parameters
with requires_grad False that start at zero: an exported model gives the same numbers with and without token types.

Shapes: T tokens, M targets, K keys (with those of the memory), S sequences, N layers, W width of the hidden states,
H heads, D width of a head, P distances.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..architecture import Batch, LossSum
from ..architectures.prot_xlnet import XLNetShape
from ..errors import ConfigError
from . import relative_attention
from .layers import build_empty, compute_dtype, run_layer, table
from .relative_attention import Attend, Keys, Sight
from .tensor_group import copy_to_group, own_part, sum_over_group

Arrange = Callable[[Tensor, Tensor], Keys]


class ScoreBias(nn.Module):
    """A vector a head that is added to every query before one kind of scores."""

    def __init__(self, shape: XLNetShape) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(shape.num_heads, shape.head_size))


class Attention(nn.Module):
    """Relative attention of both streams, each added to its input and then normalised. Matrices are [W, H, D], as published."""

    def __init__(self, shape: XLNetShape) -> None:
        super().__init__()
        matrix = (shape.hidden_size, shape.num_heads, shape.head_size)
        self.dropout = shape.dropout
        self.query, self.key, self.value, self.output, self.distance = (nn.Parameter(torch.empty(matrix)) for _ in range(5))
        self.content, self.position = ScoreBias(shape), ScoreBias(shape)
        self.segment = ScoreBias(shape).requires_grad_(False)
        self.segments = nn.Parameter(torch.empty(2, shape.num_heads, shape.head_size), requires_grad=False)
        self.norm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_epsilon)

    def forward(self, streams: list[tuple[Tensor, Attend]], keys_KW: Tensor, distances_PW: Tensor, arrange: Arrange, dtype: torch.dtype) -> list[Tensor]:
        """The new hidden states of each stream, given its hidden states and its attention."""
        keys_KW = copy_to_group(keys_KW.to(dtype), self.key)
        keys, rows = arrange(_project(keys_KW, self.key), _project(keys_KW, self.value)), _project(distances_PW, self.distance)
        results = []
        for hidden_NW, attend in streams:
            query_NHD = _project(copy_to_group(hidden_NW.to(dtype), self.query), self.query)
            scale = query_NHD.shape[-1] ** -0.5
            by_content, by_distance = ((query_NHD + own_part(part.bias)).to(dtype) * scale for part in (self.content, self.position))
            attended_NV = attend(by_content, by_distance, keys, rows).flatten(1)
            added_NW = sum_over_group(functional.linear(attended_NV, own_part(self.output).flatten(1)), self.output)
            added_NW = functional.dropout(added_NW, self.dropout, self.training)
            results.append(self.norm(added_NW + hidden_NW))
        return results


def _project(hidden: Tensor, matrix_WHD: Tensor) -> Tensor:
    own_WHD = own_part(matrix_WHD)
    return torch.mm(hidden, own_WHD.flatten(1)).view(-1, *own_WHD.shape[1:])


class FeedForward(nn.Module):
    """Two dense layers, added to their input and then normalised."""

    def __init__(self, shape: XLNetShape) -> None:
        super().__init__()
        self.dropout = shape.dropout
        self.up = nn.Linear(shape.hidden_size, shape.intermediate_size)
        self.down = nn.Linear(shape.intermediate_size, shape.hidden_size)
        self.norm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_epsilon)

    def forward(self, hidden_NW: Tensor) -> Tensor:
        """Hidden states in, hidden states out."""
        inner = functional.dropout(functional.gelu(self.up(hidden_NW)), self.dropout, self.training)
        result: Tensor = self.norm(functional.dropout(self.down(inner), self.dropout, self.training) + hidden_NW)
        return result


class Layer(nn.Module):
    """Attention and feed-forward part, for both streams with the same weights."""

    def __init__(self, shape: XLNetShape) -> None:
        super().__init__()
        self.attention = Attention(shape)
        self.feed_forward = FeedForward(shape)

    def forward(self, streams: list[tuple[Tensor, Attend]], keys_KW: Tensor, distances_PW: Tensor, arrange: Arrange, dtype: torch.dtype) -> list[Tensor]:
        """The new hidden states of each stream."""
        return [self.feed_forward(hidden_NW) for hidden_NW in self.attention(streams, keys_KW, distances_PW, arrange, dtype)]


class ProtXLNet(nn.Module):
    """The two streams with their head.

    `backend` (a key of `relative_attention.BACKENDS`) overrules the choice of attention; every `recompute_every`-th
    layer is computed again for the gradient instead of being kept (0: none).
    """

    def __init__(self, shape: XLNetShape) -> None:
        super().__init__()
        self.shape = shape
        self.backend: str | None = None
        self.recompute_every = 0
        self.words = table(shape.vocabulary_size, shape.hidden_size)
        self.query_start = nn.Parameter(torch.empty(1, 1, shape.hidden_size))
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.head = nn.ParameterDict({"bias": nn.Parameter(torch.empty(shape.vocabulary_size))})

    def forward(self, batch: Batch) -> LossSum:
        """Summed negative log likelihood of the targets, nats, and the lanes' new memory.

        The loss is 0 and connected to every trained parameter without any target. Raises ConfigError for a batch
        without an order of factorisation.
        """
        if batch.permutation is None:
            raise ConfigError("XLNet predicts residues in an order of factorisation: its objective is 'permutation'")
        content_TW = self._drop(self.words(batch.tokens))
        query_MW = self._drop(self.query_start.view(1, -1).expand(len(batch.targets), -1))
        dtype, sight = compute_dtype(content_TW), self._sight(batch, batch.permutation)
        distances_PW = self._distances(batch).to(dtype)
        attention = relative_attention.prepare(sight, dropout=self._rate, backend=self.backend)
        inputs = []
        for index, layer in enumerate(self.layers):
            keys_KW = self._keys(content_TW, batch, index)
            inputs.append(content_TW)
            is_last = index == len(self.layers) - 1
            streams = [(query_MW, attention.query), *([] if is_last else [(content_TW, attention.content)])]
            query_MW, *rest = run_layer(index, self.recompute_every, layer, streams, keys_KW, distances_PW, attention.arrange, dtype)
            content_TW = rest[0] if rest else content_TW
        logits_MV = self.logits(self._drop(query_MW)).float()
        loss = functional.cross_entropy(logits_MV, batch.targets, reduction="sum")
        return LossSum(loss=loss, num_correct=(logits_MV.argmax(dim=-1) == batch.targets).sum(), memory=self._new_memory(inputs, batch))

    def hidden(self, batch: Batch) -> Tensor:
        """The last hidden states of the content stream where tokens see all of their sequence and its memory, [T, W]."""
        content_TW: Tensor = self._drop(self.words(batch.tokens))
        dtype = compute_dtype(content_TW)
        distances_PW = self._distances(batch).to(dtype)
        attention = relative_attention.prepare(self._sight(batch, None), dropout=self._rate, backend=self.backend)
        for index, layer in enumerate(self.layers):
            keys_KW = self._keys(content_TW, batch, index)
            streams = [(content_TW, attention.content)]
            (content_TW,) = run_layer(index, self.recompute_every, layer, streams, keys_KW, distances_PW, attention.arrange, dtype)
        return content_TW

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, [N, V], for hidden states [N, W]."""
        return functional.linear(hidden, self.words.weight, self.head["bias"])

    @property
    def _rate(self) -> float:
        return self.shape.dropout if self.training else 0.0

    def _drop(self, hidden: Tensor) -> Tensor:
        return functional.dropout(hidden, self._rate)

    def _sight(self, batch: Batch, order: Tensor | None) -> Sight:
        num_memory = 0 if batch.memory is None else batch.memory.shape[2]
        targets = batch.target_positions if order is not None else batch.target_positions[:0]
        carried = batch.carried if num_memory else None
        return Sight(batch.cu_seqlens, batch.max_length, num_memory, order, batch.documents, carried, targets)

    def _distances(self, batch: Batch) -> Tensor:
        """Sines and cosines of every distance that occurs, [P, W]."""
        width, device = self.shape.hidden_size, batch.tokens.device
        distances_P = relative_attention.distances(self._sight(batch, None), device).float()
        if self.shape.clamp_length:
            distances_P = distances_P.clamp(-self.shape.clamp_length, self.shape.clamp_length)
        frequencies = 1 / torch.pow(10000, torch.arange(0, width, 2.0, device=device) / width)
        angles = distances_P[:, None] * frequencies
        return self._drop(torch.cat([angles.sin(), angles.cos()], dim=-1))

    def _keys(self, content_TW: Tensor, batch: Batch, index: int) -> Tensor:
        """What keys and values are made of: the memory of each lane in front of its tokens, [K, W]."""
        if batch.memory is None:
            return content_TW
        memory_SKW = batch.memory[:, index].to(content_TW.dtype)
        return torch.cat([memory_SKW, content_TW.view(len(memory_SKW), -1, content_TW.shape[1])], dim=1).flatten(0, 1)

    def _new_memory(self, inputs: list[Tensor], batch: Batch) -> Tensor | None:
        """The last `memory_length` inputs of each layer, [S, N, up to that, W]."""
        if batch.lanes is None or self.shape.memory_length == 0 or len(batch.lanes) == 0:
            return None
        memory_SNLW = torch.stack([hidden_TW.detach().view(len(batch.lanes), -1, hidden_TW.shape[1]) for hidden_TW in inputs], dim=1)
        if batch.memory is not None:
            memory_SNLW = torch.cat([batch.memory.to(memory_SNLW.dtype), memory_SNLW], dim=2)
        return memory_SNLW[:, :, -self.shape.memory_length :].contiguous()

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw the starting weights: normal matrices, tables and score biases, zero biases, unit norms; equal on every device type."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                parameter.zero_()
            elif parameter.ndim > 1:
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, self.shape.initializer_range, generator=generator))
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def build(shape: XLNetShape) -> ProtXLNet:
    """The modules on torch's default device; the weights are undefined until `initialise` or `load_state_dict`."""
    return build_empty(lambda: ProtXLNet(shape))
