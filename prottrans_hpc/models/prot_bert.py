"""BERT on packed protein sequences: post-norm encoder, learned positions, masked-residue head.

The function is that of `transformers.BertForPreTraining`; the layout is not: T rows of all sequences end to end,
no padding, and the prediction head only where a target is. Masked training has no use for the pooler and the
next-sentence head of the published weights, so their parameters have requires_grad False: they take no gradient,
no optimizer state and no communication, and an imported model is exported with them unchanged.

Shapes: T tokens, M targets, W width of the hidden states, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..architecture import Batch, LossSum
from ..architectures.prot_bert import BertShape
from ..errors import ConfigError
from . import attention
from .attention import Attend
from .layers import build_empty, compute_dtype, run_layer, table


class Embeddings(nn.Module):
    """Residue + position + segment 0, normalised."""

    def __init__(self, shape: BertShape) -> None:
        super().__init__()
        self.words = table(shape.vocabulary_size, shape.hidden_size)
        self.positions = table(shape.max_positions, shape.hidden_size)
        self.token_types = table(shape.num_token_types, shape.hidden_size)
        self.norm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_epsilon)

    def forward(self, tokens_T: Tensor, positions_T: Tensor) -> Tensor:
        """The input of the first layer, [T, W]."""
        result: Tensor = self.norm(self.words(tokens_T) + self.token_types.weight[0] + self.positions(positions_T))
        return result


class Layer(nn.Module):
    """Attention and feed-forward part, each added to its input and then normalised."""

    def __init__(self, shape: BertShape) -> None:
        super().__init__()
        width, inner = shape.hidden_size, shape.intermediate_size
        self.num_heads = shape.num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.attention_output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=shape.layer_norm_epsilon)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.output_norm = nn.LayerNorm(width, eps=shape.layer_norm_epsilon)

    def forward(self, hidden_TW: Tensor, attend: Attend, dtype: torch.dtype) -> Tensor:
        """Hidden states in, hidden states out, [T, W]; `dtype` is that of the matrix products."""
        narrow_TW = hidden_TW.to(dtype)  # once, where autocast would cast and keep a copy for each of the three
        query, key, value = (linear(narrow_TW).unflatten(-1, (self.num_heads, -1)) for linear in (self.query, self.key, self.value))
        attended_TW = attend(query, key, value).flatten(1)
        hidden_TW = self.attention_norm(self.attention_output(attended_TW) + hidden_TW)
        result: Tensor = self.output_norm(self.down(functional.gelu(self.up(hidden_TW))) + hidden_TW)
        return result


class MaskedHead(nn.Module):
    """Scores over the vocabulary; the word table is the last matrix (weight tying)."""

    def __init__(self, shape: BertShape) -> None:
        super().__init__()
        self.dense = nn.Linear(shape.hidden_size, shape.hidden_size)
        self.norm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_epsilon)
        self.bias = nn.Parameter(torch.empty(shape.vocabulary_size))

    def forward(self, hidden_MW: Tensor, words_VW: Tensor) -> Tensor:
        """Scores, [M, V]."""
        return functional.linear(self.norm(functional.gelu(self.dense(hidden_MW))), words_VW, self.bias)


class ProtBert(nn.Module):
    """The encoder with its heads.

    `backend` (a key of `attention.BACKENDS`) overrules the choice of attention; every `recompute_every`-th layer is
    computed again for the gradient instead of being kept (0: none).
    """

    def __init__(self, shape: BertShape) -> None:
        super().__init__()
        self.shape = shape
        self.backend: str | None = None
        self.recompute_every = 0
        self.embeddings = Embeddings(shape)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.head = MaskedHead(shape)
        if shape.has_pooler:
            self.pooler = nn.Linear(shape.hidden_size, shape.hidden_size).requires_grad_(False)
        if shape.has_next_sentence:
            self.next_sentence = nn.Linear(shape.hidden_size, 2).requires_grad_(False)

    def forward(self, batch: Batch) -> LossSum:
        """Summed negative log likelihood of the targets, nats; 0 and connected to every trained parameter without any."""
        logits_MV = self.logits(self.hidden(batch).index_select(0, batch.target_positions)).float()
        loss = functional.cross_entropy(logits_MV, batch.targets, reduction="sum")
        return LossSum(loss=loss, num_correct=(logits_MV.argmax(dim=-1) == batch.targets).sum())

    def hidden(self, batch: Batch) -> Tensor:
        """The last hidden states, [T, W]. Raises ConfigError for a sequence longer than the position table."""
        for hidden_TW in self._states(batch):
            last_TW = hidden_TW
        return last_TW

    def hidden_states(self, batch: Batch) -> list[Tensor]:
        """The embeddings and the output of each layer, [T, W] each. Raises as `hidden` does."""
        return list(self._states(batch))

    def _states(self, batch: Batch) -> Iterator[Tensor]:
        if batch.max_length > self.shape.max_positions:
            raise ConfigError(f"a sequence has {batch.max_length} tokens, special ones included; this model has {self.shape.max_positions} positions")
        hidden_TW: Tensor = self.embeddings(batch.tokens, batch.positions)
        yield hidden_TW
        dtype = compute_dtype(hidden_TW)
        attend = attention.prepare(batch.cu_seqlens, batch.max_length, dtype=dtype, backend=self.backend)
        for index, layer in enumerate(self.layers):
            hidden_TW = run_layer(index, self.recompute_every, layer, hidden_TW, attend, dtype)
            yield hidden_TW

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, [N, V], for hidden states [N, W]."""
        result: Tensor = self.head(hidden, self.embeddings.words.weight)
        return result

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw the starting weights: normal matrices and tables, zero biases, unit norms; equal on every device type."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, self.shape.initializer_range, generator=generator))
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def build(shape: BertShape) -> ProtBert:
    """The modules on torch's default device; the weights are undefined until `initialise` or `load_state_dict`."""
    return build_empty(lambda: ProtBert(shape))
