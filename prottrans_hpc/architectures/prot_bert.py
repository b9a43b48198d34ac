"""ProtBert without torch: its sizes, what the papers say about them, and the arithmetic of one step.

The modules are in `prottrans_hpc.models.prot_bert`; tests hold the arithmetic here against them.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic.dataclasses import dataclass

from ..architecture import Architecture, Size, Vocabulary
from ..config import STRICT
from ..errors import ConfigError

MASKED_FRACTION = 0.15
"""Share of the tokens that the prediction head is counted for: the published objective's."""


@dataclass(frozen=True, config=STRICT)
class BertShape:
    """The hyper-parameters of a BERT encoder with its heads (Devlin et al. 2019); without dropout, as published."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    """Width of the feed-forward part."""
    num_heads: int
    max_positions: int = 40_000
    """Rows of the learned position table: the longest sequence in tokens, [CLS] and [SEP] included."""
    vocabulary_size: int = 30
    num_token_types: int = 2
    """Rows of the segment table; only row 0 is used, both are kept for the published weights."""
    layer_norm_epsilon: float = 1e-12
    initializer_range: float = 0.02
    """Standard deviation of the starting weights."""
    has_pooler: bool = True
    has_next_sentence: bool = True
    """Heads of the published weights that masked training leaves alone; an imported model may lack them."""

    def __post_init__(self) -> None:
        counts = (self.num_layers, self.hidden_size, self.intermediate_size, self.num_heads, self.max_positions, self.vocabulary_size, self.num_token_types)
        if min(counts) < 1:
            raise ValueError("layers, sizes, heads, positions, vocabulary and token types must be at least 1")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


def num_parameters(shape: BertShape) -> int:
    """Parameters of the encoder and its heads; the word table serves as decoder too and is counted once."""
    width, inner = shape.hidden_size, shape.intermediate_size
    norm = 2 * width
    dense = width * width + width
    embeddings = (shape.vocabulary_size + shape.max_positions + shape.num_token_types) * width + norm
    layer = 4 * dense + norm + (width * inner + inner) + (inner * width + width) + norm
    heads = (dense + norm + shape.vocabulary_size) + shape.has_pooler * dense + shape.has_next_sentence * (2 * width + 2)
    return embeddings + shape.num_layers * layer + heads


def flops(shape: BertShape, lengths: Sequence[int]) -> float:
    """Floating-point operations of a forward and backward pass over sequences of `lengths` tokens.

    Matrix products only, two operations a multiply-add, backward twice the forward pass, nothing recomputed:
    the convention of model-FLOP utilisation. The prediction head is counted for 15 % of the tokens.
    """
    width = shape.hidden_size
    num_tokens = float(sum(lengths))
    squares = float(sum(length * length for length in lengths))
    linear = num_tokens * (4 * width * width + 2 * width * shape.intermediate_size)
    attention = 2 * squares * width
    head = MASKED_FRACTION * num_tokens * (width * width + width * shape.vocabulary_size)
    return 3 * 2 * (shape.num_layers * (linear + attention) + head)


def activation_bytes(shape: BertShape, lengths: Sequence[int], precision: str) -> int:
    """Bytes that one forward pass keeps for the backward pass, without activation checkpointing.

    `precision` is "fp32" or "bf16" (autocast, fp32 weights); weights and their bf16 copies are not counted. Held
    against saved tensors to 2 % where attention is one kernel a sequence or the plain products.
    Raises ConfigError for another precision.
    """
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"no activation arithmetic for the precision {precision!r}; known are fp32 and bf16")
    width, inner, norm = shape.hidden_size, shape.intermediate_size, 8
    if precision == "fp32":
        # Inputs of the linear and norm layers (5), query, key, value and result of the attention; both sides of the GELU.
        layer = 4 * (9 * width + 2 * inner + shape.num_heads) + 2 * norm
        head = 4 * (4 * width + shape.vocabulary_size) + norm
    else:
        # As above in half the bytes, but the norms' inputs are fp32 and the packed attention result is kept once.
        layer = 2 * (6 * width + 2 * inner) + 4 * (2 * width + shape.num_heads) + 2 * norm
        head = 2 * 4 * width + 4 * shape.vocabulary_size + norm
    embeddings = 4 * width + norm + 2 * 8  # the two index vectors are int64
    return round(sum(lengths) * (shape.num_layers * layer + embeddings + MASKED_FRACTION * head))


_PUBLISHED = BertShape(num_layers=30, hidden_size=1024, intermediate_size=4096, num_heads=16)


_BOTH = (
    "Section 2.4 of the paper limits the second phase to 1,024 residues for all models; its table and text give 2,048 for ProtBert, which the recipes use.",
    "The paper calls the position encoding sinusoidal; the released weights have BERT's learned table of 40,000 rows.",
    "Only with 40,000 positions are there 420 M parameters (380.5 M with 512); about 38,000 rows, past the longest training sequence, were never trained.",
    "420 M is 420,984,864 with pooler and next-sentence head (BertForPreTraining), as counted here, and 419,933,214 without (BertForMaskedLM).",
)
_REFERENCE = "Elnaggar et al. 2021, ProtTrans, IEEE TPAMI, Table 2"

_SIZES = {
    "prot_bert": Size(
        shape=_PUBLISHED,
        reference=f"{_REFERENCE}, column ProtBert (UniRef100)",
        parameters_published=420_000_000,
        errata=(
            *_BOTH,
            "UniRef100 is given as 80 and as 88 billion residues; the 150 GB stated for it fit 80 billion (149.4 GiB, space-separated), not 88 (164 GiB).",
        ),
    ),
    "prot_bert_bfd": Size(
        shape=_PUBLISHED,
        reference=f"{_REFERENCE}, column ProtBert-BFD (BFD100)",
        parameters_published=420_000_000,
        errata=(
            *_BOTH,
            "The table gives 128 hosts with 1,024 TPU cores; the text says V3-512.",
            "The preprint's 116,736 TPU core-hours imply 86 TFLOP/s a core (6 x parameters x tokens), above a TPU v3 core's peak of about 52 to 61.",
            "So either its hours or the journal's steps are wrong, or the hours belong to an earlier, shorter run.",
            "The size of BFD is given as 527, 572 and 734 GB; 734 fits the space-separated text in GiB (736).",
            "The gain in Q3 over ProtBert is given as 1.1 and as 1.3; the table's numbers differ by 1.0.",
        ),
    ),
    "small": Size(
        shape=BertShape(num_layers=6, hidden_size=256, intermediate_size=1024, num_heads=8, max_positions=2_560),
        reference="this project: study size for two CPU cores",
    ),
    "tiny": Size(
        shape=BertShape(num_layers=2, hidden_size=64, intermediate_size=256, num_heads=2, max_positions=2_560),
        reference="this project: one-minute twin for the demo and the tests",
    ),
}

ARCHITECTURE = Architecture(
    name="prot_bert",
    description="ProtBert: BERT (encoder, post-norm, learned positions) on protein sequences",
    sizes=_SIZES,
    vocabulary=Vocabulary(
        tokens=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"LAGVESIKRDTPNQFYMHCWXUBZO"),
        prefix=("[CLS]",),
        suffix=("[SEP]",),
        mask="[MASK]",
        padding="[PAD]",
        unknown="[UNK]",
    ),
    objectives=("masked",),
    build="prottrans_hpc.models.prot_bert:build",
    huggingface="prottrans_hpc.models.huggingface_bert:LAYOUT",
    num_parameters=num_parameters,
    flops=flops,
    activation_bytes=activation_bytes,
)
