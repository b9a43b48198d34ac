"""ProteinLM on packed protein sequences: a Megatron BERT, normalised in front of each half of a layer, with a masked-residue head.

The function is that of `transformers.MegatronBertForMaskedLM`; the layout is not: T rows of all sequences end to end,
no padding, and the prediction head only where a target is. ProteinLM has no segments, so the segment row of the
HuggingFace layout has requires_grad False: zero from the start, and whatever an imported model has.

Shapes: T tokens, M targets, W width of the hidden states, H heads, D width of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..architecture import Batch, LossSum
from ..architectures.protein_lm import ProteinLmShape
from ..errors import ConfigError
from . import attention
from .attention import Attend
from .layers import build_empty, compute_dtype, run_layer, table

_RESIDUAL_OUTPUTS = (".attention_output.weight", ".down.weight")
"""The matrices that write to the residual stream."""


class Embeddings(nn.Module):
    """Residue + position + segment 0."""

    def __init__(self, shape: ProteinLmShape) -> None:
        super().__init__()
        self.dropout = shape.dropout
        self.words = table(shape.vocabulary_size, shape.hidden_size)
        self.positions = table(shape.max_positions, shape.hidden_size)
        self.token_types = table(shape.num_token_types, shape.hidden_size).requires_grad_(False)

    def forward(self, tokens_T: Tensor, positions_T: Tensor) -> Tensor:
        """The input of the first layer, [T, W]."""
        # In the order of transformers' class, whose rounding is the reference.
        hidden_TW = self.words(tokens_T) + self.token_types.weight[0] + self.positions(positions_T)
        return _drop(hidden_TW, self.dropout, self.training)


class Layer(nn.Module):
    """Attention and feed-forward part; each reads its normalised input and adds to it."""

    def __init__(self, shape: ProteinLmShape) -> None:
        super().__init__()
        width, inner = shape.hidden_size, shape.intermediate_size
        self.head_size = width // shape.num_heads
        self.dropout = shape.dropout
        self.attention_norm = nn.LayerNorm(width, eps=shape.layer_norm_epsilon)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.attention_output = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width, eps=shape.layer_norm_epsilon)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, hidden_TW: Tensor, attend: Attend, dtype: torch.dtype) -> Tensor:
        """Hidden states in, hidden states out, [T, W]; `dtype` is that of the matrix products."""
        narrow_TW = self.attention_norm(hidden_TW).to(dtype)  # once, where autocast would cast and keep a copy for each of the three
        query, key, value = (linear(narrow_TW).unflatten(-1, (-1, self.head_size)) for linear in (self.query, self.key, self.value))
        attended_TW = self.attention_output(attend(query, key, value).flatten(1))
        hidden_TW = _drop(attended_TW, self.dropout, self.training) + hidden_TW
        inner_TW = self.down(functional.gelu(self.up(self.feed_forward_norm(hidden_TW).to(dtype))))
        return _drop(inner_TW, self.dropout, self.training) + hidden_TW


def _drop(values: Tensor, share: float, training: bool) -> Tensor:
    return functional.dropout(values, share) if share and training else values


class MaskedHead(nn.Module):
    """Scores over the vocabulary; the word table is the last matrix (weight tying)."""

    def __init__(self, shape: ProteinLmShape) -> None:
        super().__init__()
        self.dense = nn.Linear(shape.hidden_size, shape.hidden_size)
        self.norm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_epsilon)
        self.bias = nn.Parameter(torch.empty(shape.vocabulary_size))

    def forward(self, hidden_MW: Tensor, words_VW: Tensor) -> Tensor:
        """Scores, [M, V]."""
        return functional.linear(self.norm(functional.gelu(self.dense(hidden_MW))), words_VW, self.bias)


class ProteinLm(nn.Module):
    """The encoder with its head.

    `backend` (a key of `attention.BACKENDS`) overrules the choice of attention; every `recompute_every`-th layer is
    computed again for the gradient instead of being kept (0: none).
    """

    def __init__(self, shape: ProteinLmShape) -> None:
        super().__init__()
        self.shape = shape
        self.backend: str | None = None
        self.recompute_every = 0
        self.embeddings = Embeddings(shape)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_epsilon)
        self.head = MaskedHead(shape)

    def forward(self, batch: Batch) -> LossSum:
        """Summed negative log likelihood of the targets, nats; 0 and connected to every trained parameter without any."""
        logits_MV = self.logits(self.hidden(batch).index_select(0, batch.target_positions)).float()
        loss = functional.cross_entropy(logits_MV, batch.targets, reduction="sum")
        return LossSum(loss=loss, num_correct=(logits_MV.argmax(dim=-1) == batch.targets).sum())

    def hidden(self, batch: Batch) -> Tensor:
        """The last hidden states, normalised, [T, W]. Raises ConfigError for a sequence longer than the position table."""
        if batch.max_length > self.shape.max_positions:
            raise ConfigError(f"a sequence has {batch.max_length} tokens, special ones included; this model has {self.shape.max_positions} positions")
        hidden_TW: Tensor = self.embeddings(batch.tokens, batch.positions)
        dtype = compute_dtype(hidden_TW)
        dropout = self.shape.attention_dropout if self.training else 0.0
        attend = attention.prepare(batch.cu_seqlens, batch.max_length, dtype=dtype, backend=self.backend, dropout=dropout)
        for index, layer in enumerate(self.layers):
            hidden_TW = run_layer(index, self.recompute_every, layer, hidden_TW, attend, dtype)
        result: Tensor = self.norm(hidden_TW)
        return result

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, [N, V], for hidden states [N, W]."""
        result: Tensor = self.head(hidden, self.embeddings.words.weight)
        return result

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw the starting weights: normal matrices and tables, zero biases and segments, unit norms; equal on every device type."""
        generator = torch.Generator().manual_seed(seed)
        plain = self.shape.initializer_range
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                parameter.zero_()
            elif parameter.ndim > 1:
                spread = plain / math.sqrt(2.0 * self.shape.num_layers) if name.endswith(_RESIDUAL_OUTPUTS) else plain
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, spread, generator=generator))
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def build(shape: ProteinLmShape) -> ProteinLm:
    """The modules on torch's default device; the weights are undefined until `initialise` or `load_state_dict`."""
    return build_empty(lambda: ProteinLm(shape))
