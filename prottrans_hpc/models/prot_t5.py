"""T5 on packed protein sequences: encoder and decoder with relative position biases, tied embeddings.

The function is that of `transformers.T5ForConditionalGeneration`; the layout is not: the encoder's T rows and the
decoder's U rows of all sequences lie end to end, no padding. A shape without decoder layers is the encoder alone,
what embeddings are made with.

Shapes: T tokens of the encoder, U of the decoder, N of either, M targets, W width of the hidden states, H heads,
D width of a head, R distances of two tokens.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..architecture import Batch, LossSum
from ..architectures.prot_t5 import T5Shape
from ..errors import ConfigError
from .attention import Attend
from .biased_attention import prepare_biased, prepare_cross
from .layers import build_empty, compute_dtype, run_layer, table
from .tensor_group import own_part


class RmsNorm(nn.Module):
    """Scaled to a root mean square of 1, computed in fp32: no mean is taken off, nothing added (Zhang and Sennrich 2019)."""

    def __init__(self, shape: T5Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.hidden_size))
        self.epsilon = shape.layer_norm_epsilon

    def forward(self, hidden_NW: Tensor) -> Tensor:
        """[N, W] in the type of the input."""
        wide_NW = hidden_NW.float()
        scaled_NW = wide_NW * torch.rsqrt(wide_NW.square().mean(dim=-1, keepdim=True) + self.epsilon)
        return scaled_NW.to(hidden_NW.dtype) * self.weight


class Attention(nn.Module):
    """From rows to rows, all heads; who may see whom is the Attend's."""

    def __init__(self, shape: T5Shape) -> None:
        super().__init__()
        self.head_size = shape.head_size
        self.query = nn.Linear(shape.hidden_size, shape.attention_size, bias=False)
        self.key = nn.Linear(shape.hidden_size, shape.attention_size, bias=False)
        self.value = nn.Linear(shape.hidden_size, shape.attention_size, bias=False)
        self.output = nn.Linear(shape.attention_size, shape.hidden_size, bias=False)

    def forward(self, own_NW: Tensor, seen_NW: Tensor, attend: Attend) -> Tensor:
        """What each row of `own_NW` takes from the rows of `seen_NW`, [N, W]."""
        query, key, value = (linear(rows).unflatten(-1, (-1, self.head_size)) for linear, rows in self._pairs(own_NW, seen_NW))
        result: Tensor = self.output(attend(query, key, value).flatten(1))
        return result

    def _pairs(self, own_NW: Tensor, seen_NW: Tensor) -> list[tuple[nn.Linear, Tensor]]:
        return [(self.query, own_NW), (self.key, seen_NW), (self.value, seen_NW)]


class FeedForward(nn.Module):
    """Up, ReLU, down."""

    def __init__(self, shape: T5Shape) -> None:
        super().__init__()
        self.dropout = shape.dropout
        self.up = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, hidden_NW: Tensor) -> Tensor:
        """[N, W]; in fp32 where the rest is fp16, whose range the published weights leave here."""
        inner = functional.dropout(functional.relu(self.up(hidden_NW)), self.dropout, self.training)
        is_narrow = inner.dtype == torch.float16 and self.down.weight.dtype == torch.float32
        with torch.autocast(inner.device.type, enabled=False) if is_narrow else contextlib.nullcontext():
            result: Tensor = self.down(inner.float() if is_narrow else inner)
        return result


class Layer(nn.Module):
    """Self-attention, in a decoder also attention to the encoder's states, and the feed-forward part; each normalises what it reads."""

    def __init__(self, shape: T5Shape, *, is_decoder: bool) -> None:
        super().__init__()
        self.dropout = shape.dropout
        self.attention_norm = RmsNorm(shape)
        self.attention = Attention(shape)
        if is_decoder:
            self.cross_norm = RmsNorm(shape)
            self.cross = Attention(shape)
        self.feed_forward_norm = RmsNorm(shape)
        self.feed_forward = FeedForward(shape)

    def forward(self, hidden_NW: Tensor, dtype: torch.dtype, attend: Attend, encoded_TW: Tensor | None = None, attend_cross: Attend | None = None) -> Tensor:
        """Hidden states in, hidden states out, [N, W]; `dtype` is that of the matrix products."""
        normed_NW = self.attention_norm(hidden_NW).to(dtype)
        hidden_NW = hidden_NW + self._dropped(self.attention(normed_NW, normed_NW, attend))
        if encoded_TW is not None and attend_cross is not None:
            normed_NW = self.cross_norm(hidden_NW).to(dtype)
            hidden_NW = hidden_NW + self._dropped(self.cross(normed_NW, encoded_TW, attend_cross))
        normed_NW = self.feed_forward_norm(hidden_NW).to(dtype)
        return hidden_NW + self._dropped(self.feed_forward(normed_NW))

    def _dropped(self, change_NW: Tensor) -> Tensor:
        return functional.dropout(change_NW, self.dropout, self.training)


class Stack(nn.Module):
    """The layers of an encoder or decoder, the position biases that they share, and the norm behind them."""

    def __init__(self, shape: T5Shape, *, is_decoder: bool) -> None:
        super().__init__()
        self.shape, self.is_decoder = shape, is_decoder
        self.position_biases = table(shape.num_buckets, shape.num_heads)
        num_layers = shape.num_decoder_layers if is_decoder else shape.num_layers
        self.layers = nn.ModuleList(Layer(shape, is_decoder=is_decoder) for _ in range(num_layers))
        self.norm = RmsNorm(shape)

    def attend(self, cu_seqlens: Tensor, max_length: int, backend: str | None) -> Attend:
        """The self-attention of one packed batch, for all layers."""
        buckets_R = buckets(self.shape, max(max_length, 1), bidirectional=not self.is_decoder).to(cu_seqlens.device)
        bias_HR = own_part(self.position_biases.weight)[buckets_R].T
        dropout = self.shape.dropout if self.training else 0.0
        return prepare_biased(cu_seqlens, bias_HR, causal=self.is_decoder, dropout=dropout, backend=backend)


def buckets(shape: T5Shape, max_length: int, *, bidirectional: bool) -> Tensor:
    """int64 [2 max_length - 1]: which row of the table each distance of a key from its query has, the most negative first.

    Raffel et al. 2020, section 2.1: half of the rows for small distances, one each, the others for ever wider ranges
    up to `max_distance`, on a logarithmic scale in fp32. In an encoder tokens before and behind have half of them each.
    """
    distances = torch.arange(-(max_length - 1), max_length)
    if bidirectional:
        num, offset, far = shape.num_buckets // 2, (distances > 0) * (shape.num_buckets // 2), distances.abs()
    else:
        num, offset, far = shape.num_buckets, torch.zeros_like(distances), -distances.clamp(max=0)
    exact = num // 2
    scale = torch.log(far.float() / exact) / math.log(shape.max_distance / exact)
    coarse = (exact + (scale * (num - exact)).nan_to_num(neginf=0.0).long()).clamp(max=num - 1)
    return offset + torch.where(far < exact, far, coarse)


class ProtT5(nn.Module):
    """Encoder and, unless the shape has none, decoder."""

    backend: str | None = None
    """A key of biased_attention.BACKENDS; None chooses the fastest at each forward pass."""
    recompute_every = 0
    """Every so many layers one keeps its inputs only and is computed again for the gradient; 0: none."""

    def __init__(self, shape: T5Shape) -> None:
        super().__init__()
        self.shape = shape
        self.words = table(shape.vocabulary_size, shape.hidden_size)
        self.encoder = Stack(shape, is_decoder=False)
        if shape.num_decoder_layers:
            self.decoder = Stack(shape, is_decoder=True)

    def forward(self, batch: Batch) -> LossSum:
        """Summed negative log likelihood of the targets, nats; 0 and connected to every parameter without any."""
        logits_MV = self.logits(self.decode(batch, self.hidden(batch)).index_select(0, batch.target_positions)).float()
        loss = functional.cross_entropy(logits_MV, batch.targets, reduction="sum")
        return LossSum(loss=loss, num_correct=(logits_MV.argmax(dim=-1) == batch.targets).sum())

    def hidden(self, batch: Batch) -> Tensor:
        """The encoder's output, [T, W]: the embeddings of the tokens."""
        hidden_TW = self._embedded(batch.tokens)
        dtype = compute_dtype(hidden_TW)
        attend = self.encoder.attend(batch.cu_seqlens, batch.max_length, self.backend)
        for index, layer in enumerate(self.encoder.layers):
            hidden_TW = run_layer(index, self.recompute_every, layer, hidden_TW, dtype, attend)
        return self._dropped(self.encoder.norm(hidden_TW))

    def decode(self, batch: Batch, encoded_TW: Tensor) -> Tensor:
        """The decoder's output, [U, W]. Raises ConfigError for a model without decoder."""
        if not self.shape.num_decoder_layers:
            raise ConfigError("this model has no decoder: it makes embeddings, but cannot be trained or predict residues")
        hidden_UW = self._embedded(batch.decoder_tokens)
        dtype = compute_dtype(hidden_UW)
        attend = self.decoder.attend(batch.decoder_cu_seqlens, batch.decoder_max_length, self.backend)
        longest = (batch.decoder_max_length, batch.max_length)
        dropout = self.shape.dropout if self.training else 0.0
        attend_cross = prepare_cross(batch.decoder_cu_seqlens, batch.cu_seqlens, longest, dtype=dtype, dropout=dropout, backend=self.backend)
        encoded_TW = encoded_TW.to(dtype)  # once for all layers
        for index, layer in enumerate(self.decoder.layers):
            hidden_UW = run_layer(index, self.recompute_every, layer, hidden_UW, dtype, attend, encoded_TW, attend_cross)
        return self._dropped(self.decoder.norm(hidden_UW))

    def _embedded(self, tokens_N: Tensor) -> Tensor:
        return self._dropped(self.words(tokens_N))

    def _dropped(self, hidden_NW: Tensor) -> Tensor:
        return functional.dropout(hidden_NW, self.shape.dropout, self.training)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, [N, V], for the decoder's hidden states [N, W]."""
        return functional.linear(hidden * self.shape.hidden_size**-0.5, self.words.weight)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw the starting weights, as T5's authors do: normal, as wide as keeps what a layer adds at the size of its input; unit norms."""
        generator, shape = torch.Generator().manual_seed(seed), self.shape
        inputs = {"query": shape.hidden_size * shape.head_size, "output": shape.attention_size, "down": shape.intermediate_size, "words": 1}
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(shape.initializer_factor)
                continue
            deviation = shape.initializer_factor * inputs.get(name.split(".")[-2], shape.hidden_size) ** -0.5
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, deviation, generator=generator))


def build(shape: T5Shape) -> ProtT5:
    """The modules on torch's default device; the weights are undefined until `initialise` or `load_state_dict`."""
    return build_empty(lambda: ProtT5(shape))
