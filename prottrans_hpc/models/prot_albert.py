"""ProtAlbert on packed protein sequences: narrow embeddings, and one layer that is applied again and again.

The function is that of `transformers.AlbertForMaskedLM` with the pooler of `AlbertModel`, which masked training
leaves alone (requires_grad False). The layer is one module that is called `num_layers` times: its gradient is the sum
over the calls, and it has one optimizer state. What shards parameters (FSDP) must wrap the model as a whole: a unit
of its own around the layer would gather the same 201 million weights 24 times a step.

Shapes: T tokens, M targets, W width of the hidden states.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..architecture import Batch, LossSum
from ..architectures.prot_albert import AlbertShape
from . import attention, encoder
from .encoder import Embeddings, Layer, Projection, ResidueHead
from .layers import build_empty, compute_dtype, run_layer


class ProtAlbert(nn.Module):
    """The encoder with its heads. `backend` and `recompute_every` are as in ProtBert; each application of the layer counts."""

    def __init__(self, shape: AlbertShape) -> None:
        super().__init__()
        self.shape = shape
        self.backend: str | None = None
        self.recompute_every = 0
        width, narrow, words, epsilon = shape.hidden_size, shape.embedding_size, shape.vocabulary_size, shape.layer_norm_epsilon
        self.embeddings = Embeddings(narrow, vocabulary_size=words, max_positions=shape.max_positions, num_token_types=shape.num_token_types, epsilon=epsilon)
        self.project = Projection(narrow, width)
        self.layer = Layer(width, shape.intermediate_size, num_heads=shape.num_heads, epsilon=epsilon)
        self.head = ResidueHead(width, narrow, vocabulary_size=words, epsilon=epsilon)
        if shape.has_pooler:
            self.pooler = nn.Linear(width, width).requires_grad_(False)

    def forward(self, batch: Batch) -> LossSum:
        """Summed negative log likelihood of the targets, nats; 0 and connected to every trained parameter without any."""
        logits_MV = self.logits(self.hidden(batch).index_select(0, batch.target_positions)).float()
        loss = functional.cross_entropy(logits_MV, batch.targets, reduction="sum")
        return LossSum(loss=loss, num_correct=(logits_MV.argmax(dim=-1) == batch.targets).sum())

    def hidden(self, batch: Batch) -> Tensor:
        """The last hidden states, [T, W]. Raises ConfigError for a sequence longer than the position table."""
        self.embeddings.check(batch)
        hidden_TW: Tensor = self.project(self.embeddings(batch.tokens, batch.positions))
        dtype: torch.dtype = compute_dtype(hidden_TW)
        attend = attention.prepare(batch.cu_seqlens, batch.max_length, dtype=dtype, backend=self.backend)
        for index in range(self.shape.num_layers):
            hidden_TW = run_layer(index, self.recompute_every, self.layer, hidden_TW, attend, dtype)
        return hidden_TW

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, [N, V], for hidden states [N, W]."""
        result: Tensor = self.head(hidden, self.embeddings.words.weight)
        return result

    def initialise(self, seed: int) -> None:
        """Draw the starting weights: normal matrices and tables, zero biases, unit norms; equal on every device type."""
        encoder.initialise(self, seed, spread=self.shape.initializer_range)


def build(shape: AlbertShape) -> ProtAlbert:
    """The modules on torch's default device; the weights are undefined until `initialise` or `load_state_dict`."""
    return build_empty(lambda: ProtAlbert(shape))
