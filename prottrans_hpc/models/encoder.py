"""The post-norm encoder that BERT, ALBERT and ELECTRA share, in parts: embeddings, a layer, the head that predicts residues.

Shapes: T tokens, M targets, V tokens of the vocabulary, E width of the embeddings, W width of the hidden states, H heads, D width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..architecture import Batch
from ..errors import ConfigError
from .attention import Attend
from .layers import table


class Embeddings(nn.Module):
    """Residue + position + segment 0, normalised."""

    def __init__(self, width: int, *, vocabulary_size: int, max_positions: int, num_token_types: int, epsilon: float) -> None:
        super().__init__()
        self.words = table(vocabulary_size, width)
        self.positions = table(max_positions, width)
        self.token_types = table(num_token_types, width)
        self.norm = nn.LayerNorm(width, eps=epsilon)

    def forward(self, tokens_T: Tensor, positions_T: Tensor) -> Tensor:
        """What the first layer reads, or its projection: [T, E]."""
        result: Tensor = self.norm(self.words(tokens_T) + self.token_types.weight[0] + self.positions(positions_T))
        return result

    def check(self, batch: Batch) -> None:
        """Raises ConfigError for a sequence longer than the position table."""
        rows = self.positions.num_embeddings
        if batch.max_length > rows:
            raise ConfigError(f"a sequence has {batch.max_length} tokens, special ones included; this model has {rows} positions")


class Layer(nn.Module):
    """Attention and feed-forward part, each added to its input and then normalised."""

    def __init__(self, width: int, inner: int, *, num_heads: int, epsilon: float) -> None:
        super().__init__()
        self.head_size = width // num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.attention_output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=epsilon)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.output_norm = nn.LayerNorm(width, eps=epsilon)

    def forward(self, hidden_TW: Tensor, attend: Attend, dtype: torch.dtype) -> Tensor:
        """Hidden states in, hidden states out, [T, W]; `dtype` is that of the matrix products."""
        narrow_TW = hidden_TW.to(dtype)  # once, where autocast would cast and keep a copy for each of the three
        # Of the heads a rank of a tensor group has some: their number is that of the columns that come.
        query, key, value = (linear(narrow_TW).unflatten(-1, (-1, self.head_size)) for linear in (self.query, self.key, self.value))
        attended_TW = attend(query, key, value).flatten(1)
        hidden_TW = self.attention_norm(self.attention_output(attended_TW) + hidden_TW)
        result: Tensor = self.output_norm(self.down(functional.gelu(self.up(hidden_TW))) + hidden_TW)
        return result


class Projection(nn.Linear):
    """From embeddings to hidden states of another width. The result stays as wide as its input where autocast would narrow it: sums run on from it."""

    def forward(self, embedded_TE: Tensor) -> Tensor:
        """[T, W]."""
        return super().forward(embedded_TE).to(embedded_TE.dtype)


class ResidueHead(nn.Module):
    """Scores over the vocabulary; the word table is the last matrix (weight tying)."""

    def __init__(self, width: int, embedding_size: int, *, vocabulary_size: int, epsilon: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width, embedding_size)
        self.norm = nn.LayerNorm(embedding_size, eps=epsilon)
        self.bias = nn.Parameter(torch.empty(vocabulary_size))

    def forward(self, hidden_MW: Tensor, words_VE: Tensor) -> Tensor:
        """Scores, [M, V]."""
        return functional.linear(self.norm(functional.gelu(self.dense(hidden_MW))), words_VE, self.bias)


@torch.no_grad()
def initialise(module: nn.Module, seed: int, *, spread: float) -> None:
    """Draw the starting weights: normal matrices and tables, zero biases, unit norms; equal on every device type."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, spread, generator=generator))
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
