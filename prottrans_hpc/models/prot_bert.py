"""BERT on packed protein sequences: post-norm encoder, learned positions, masked-residue head.

The function is that of `transformers.BertForPreTraining`; the layout is not: T rows of all sequences end to end,
no padding, and the prediction head only where a target is. Masked training has no use for the pooler and the
next-sentence head of the published weights, so their parameters have requires_grad False: they take no gradient,
no optimizer state and no communication, and an imported model is exported with them unchanged.

Shapes: T tokens, M targets, W width of the hidden states.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from ..architecture import Batch, LossSum
from ..architectures.prot_bert import BertShape
from . import attention, encoder
from .encoder import Embeddings, Layer, ResidueHead
from .layers import build_empty, compute_dtype, run_layer


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
        width, words, epsilon = shape.hidden_size, shape.vocabulary_size, shape.layer_norm_epsilon
        self.embeddings = Embeddings(width, vocabulary_size=words, max_positions=shape.max_positions, num_token_types=shape.num_token_types, epsilon=epsilon)
        self.layers = nn.ModuleList(Layer(width, shape.intermediate_size, num_heads=shape.num_heads, epsilon=epsilon) for _ in range(shape.num_layers))
        self.head = ResidueHead(width, width, vocabulary_size=words, epsilon=epsilon)
        if shape.has_pooler:
            self.pooler = nn.Linear(width, width).requires_grad_(False)
        if shape.has_next_sentence:
            self.next_sentence = nn.Linear(width, 2).requires_grad_(False)

    def forward(self, batch: Batch) -> LossSum:
        """Summed negative log likelihood of the targets, nats; 0 and connected to every trained parameter without any."""
        logits_MV = self.logits(self.hidden(batch).index_select(0, batch.target_positions)).float()
        loss = functional.cross_entropy(logits_MV, batch.targets, reduction="sum")
        return LossSum(loss=loss, num_correct=(logits_MV.argmax(dim=-1) == batch.targets).sum())

    def hidden(self, batch: Batch) -> Tensor:
        """The last hidden states, [T, W]. Raises ConfigError for a sequence longer than the position table."""
        self.embeddings.check(batch)
        hidden_TW: Tensor = self.embeddings(batch.tokens, batch.positions)
        dtype = compute_dtype(hidden_TW)
        attend = attention.prepare(batch.cu_seqlens, batch.max_length, dtype=dtype, backend=self.backend)
        for index, layer in enumerate(self.layers):
            hidden_TW = run_layer(index, self.recompute_every, layer, hidden_TW, attend, dtype)
        return hidden_TW

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, [N, V], for hidden states [N, W]."""
        result: Tensor = self.head(hidden, self.embeddings.words.weight)
        return result

    def initialise(self, seed: int) -> None:
        """Draw the starting weights: normal matrices and tables, zero biases, unit norms; equal on every device type."""
        encoder.initialise(self, seed, spread=self.shape.initializer_range)


def build(shape: BertShape) -> ProtBert:
    """The modules on torch's default device; the weights are undefined until `initialise` or `load_state_dict`."""
    return build_empty(lambda: ProtBert(shape))
