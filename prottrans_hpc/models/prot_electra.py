"""ProtElectra on packed protein sequences: a generator forges masked residues, a discriminator tells which are forged.

The functions are those of `transformers.ElectraForMaskedLM` and `ElectraForPreTraining`; how the two are trained together
follows Clark et al. 2020 and their code. They share the embeddings, norm included, and both train them. The loss is the
generator's mean over its targets plus `Batch.loss_weights[1]` times the discriminator's mean over all tokens; no gradient
flows through the choice of a forged residue.

What is embedded, `hidden`, is the discriminator.

Shapes: T tokens, M targets, V tokens of the vocabulary, E width of the embeddings, W width of the hidden states.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..architecture import Batch, LossSum
from ..architectures.prot_electra import ElectraShape, GeneratorShape
from ..errors import ConfigError
from . import attention, encoder
from .attention import Attend
from .encoder import Embeddings, Layer, Projection, ResidueHead
from .layers import build_empty, compute_dtype, run_layer

_PUBLISHED_WEIGHT = 50.0


class Encoder(nn.Module):
    """The layers of one of the two, and the matrix that leads to their width where the embeddings have another."""

    def __init__(self, shape: ElectraShape | GeneratorShape, *, embedding_size: int, epsilon: float) -> None:
        super().__init__()
        width = shape.hidden_size
        self.project: nn.Module = nn.Identity() if width == embedding_size else Projection(embedding_size, width)
        self.layers = nn.ModuleList(Layer(width, shape.intermediate_size, num_heads=shape.num_heads, epsilon=epsilon) for _ in range(shape.num_layers))

    def last(self, embedded_TE: Tensor, attend: Attend, dtype: torch.dtype, recompute_every: int) -> Tensor:
        """The output of the last layer, [T, W]."""
        hidden_TW: Tensor = self.project(embedded_TE)
        for index, layer in enumerate(self.layers):
            hidden_TW = run_layer(index, recompute_every, layer, hidden_TW, attend, dtype)
        return hidden_TW


class ReplacedHead(nn.Module):
    """How likely a token is a forged one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.score = nn.Linear(width, 1)

    def forward(self, hidden_TW: Tensor) -> Tensor:
        """Log odds, [T, 1]."""
        result: Tensor = self.score(functional.gelu(self.dense(hidden_TW)))
        return result


class ProtElectra(nn.Module):
    """Both models. `backend` and `recompute_every` are as in ProtBert and hold for both."""

    def __init__(self, shape: ElectraShape) -> None:
        super().__init__()
        self.shape = shape
        self.backend: str | None = None
        self.recompute_every = 0
        narrow, words, epsilon = shape.embedding_size, shape.vocabulary_size, shape.layer_norm_epsilon
        self.embeddings = Embeddings(narrow, vocabulary_size=words, max_positions=shape.max_positions, num_token_types=shape.num_token_types, epsilon=epsilon)
        if shape.generator:
            self.generator = Encoder(shape.generator, embedding_size=narrow, epsilon=epsilon)
            self.generator_head = ResidueHead(shape.generator.hidden_size, narrow, vocabulary_size=words, epsilon=epsilon)
        self.discriminator = Encoder(shape, embedding_size=narrow, epsilon=epsilon)
        self.discriminator_head = ReplacedHead(shape.hidden_size)

    def forward(self, batch: Batch) -> LossSum:
        """The generator's summed negative log likelihood and the discriminator's share, nats, connected to every parameter without tokens too.

        A batch that was not told the tokens of its step (`tokens_per_target` 0) is taken for the whole step. Raises
        ConfigError for a batch of another objective, or for a model without generator.
        """
        if batch.draws is None or not self.shape.generator:
            why = "this one has no generator" if batch.draws is not None else "this batch is of another objective"
            raise ConfigError(f"ProtElectra is trained by its generator with the objective 'replaced_token'; {why}")
        logits_MV = self.generator_logits(self.generator_hidden(batch).index_select(0, batch.target_positions)).float()
        generator_loss = functional.cross_entropy(logits_MV, batch.targets, reduction="sum")
        guesses_M = sample(logits_MV.detach(), batch.draws)
        forged_T = torch.zeros_like(batch.tokens, dtype=torch.float32).index_copy(0, batch.target_positions, (guesses_M != batch.targets).float())
        hidden_TW = self._last(self.discriminator, batch.tokens.index_copy(0, batch.target_positions, guesses_M), batch)
        scores_T = self.logits(hidden_TW).float().squeeze(1)
        tokens_per_target = batch.tokens_per_target or max(len(batch.tokens), 1) / max(len(batch.targets), 1)
        share = functional.binary_cross_entropy_with_logits(scores_T, forged_T, reduction="sum") / tokens_per_target
        weights = batch.loss_weights or (1.0, _PUBLISHED_WEIGHT)
        return LossSum(
            loss=weights[0] * generator_loss + weights[1] * share,
            num_correct=(logits_MV.argmax(dim=-1) == batch.targets).sum(),
            parts=torch.stack((generator_loss, share)).detach(),
        )

    def hidden(self, batch: Batch) -> Tensor:
        """The discriminator's last hidden states, [T, W]. Raises ConfigError for a sequence longer than the position table."""
        return self._last(self.discriminator, batch.tokens, batch)

    def generator_hidden(self, batch: Batch) -> Tensor:
        """The generator's last hidden states, [T, its width]. Raises as `hidden` does."""
        return self._last(self.generator, batch.tokens, batch)

    def _last(self, model: Encoder, tokens_T: Tensor, batch: Batch) -> Tensor:
        self.embeddings.check(batch)
        embedded_TE: Tensor = self.embeddings(tokens_T, batch.positions)
        dtype = compute_dtype(embedded_TE)
        attend = attention.prepare(batch.cu_seqlens, batch.max_length, dtype=dtype, backend=self.backend)
        return model.last(embedded_TE, attend, dtype, self.recompute_every)

    def logits(self, hidden: Tensor) -> Tensor:
        """The log odds that a token is a forged one, [N, 1], for the discriminator's hidden states [N, W]."""
        result: Tensor = self.discriminator_head(hidden)
        return result

    def generator_logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, [N, V], for the generator's hidden states."""
        result: Tensor = self.generator_head(hidden, self.embeddings.words.weight)
        return result

    def initialise(self, seed: int) -> None:
        """Draw the starting weights: normal matrices and tables, zero biases, unit norms; equal on every device type."""
        encoder.initialise(self, seed, spread=self.shape.initializer_range)


@torch.no_grad()
def sample(logits_MV: Tensor, draws_M: Tensor) -> Tensor:
    """A token for each row, [M]: where the cumulative probability first exceeds the draw (fp64, so that the last bits of a sum decide next to nothing)."""
    cumulative_MV = logits_MV.double().softmax(dim=-1).cumsum(dim=-1)
    return (cumulative_MV <= draws_M[:, None]).sum(dim=-1).clamp(max=logits_MV.shape[-1] - 1)


def build(shape: ElectraShape) -> ProtElectra:
    """The modules on torch's default device; the weights are undefined until `initialise` or `load_state_dict`."""
    return build_empty(lambda: ProtElectra(shape))
