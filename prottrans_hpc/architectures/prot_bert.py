"""ProtBert without torch: its sizes, what the papers say about them, and the arithmetic of one step.

The modules are in `prottrans_hpc.models.prot_bert`; tests hold the arithmetic here against them.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic.dataclasses import dataclass

from ..architecture import Architecture, Size, TensorParallel, Vocabulary
from ..config import STRICT
from . import errata, post_norm


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
        counts = (self.num_layers, self.intermediate_size, self.max_positions, self.vocabulary_size, self.num_token_types)
        post_norm.check(self.hidden_size, self.num_heads, *counts)

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


def num_parameters(shape: BertShape) -> int:
    """Parameters of the encoder and its heads; the word table serves as decoder too and is counted once."""
    width = shape.hidden_size
    embeddings = (shape.vocabulary_size + shape.max_positions + shape.num_token_types) * width + 2 * width
    unused = shape.has_pooler * (width * width + width) + shape.has_next_sentence * (2 * width + 2)
    layers = shape.num_layers * post_norm.layer_parameters(width, shape.intermediate_size)
    return embeddings + layers + post_norm.head_parameters(width, width, shape.vocabulary_size) + unused


def flops(shape: BertShape, lengths: Sequence[int]) -> float:
    """Floating-point operations of a forward and backward pass over sequences of `lengths` tokens.

    Matrix products only, two operations a multiply-add, backward twice the forward pass, nothing recomputed:
    the convention of model-FLOP utilisation. The prediction head is counted for 15 % of the tokens.
    """
    width = shape.hidden_size
    layers = shape.num_layers * post_norm.layer_products(width, shape.intermediate_size, lengths)
    head = post_norm.MASKED_FRACTION * float(sum(lengths)) * post_norm.head_products(width, width, shape.vocabulary_size)
    return 3 * 2 * (layers + head)


def activation_bytes(shape: BertShape, lengths: Sequence[int], precision: str) -> int:
    """Bytes that one forward pass keeps for the backward pass, without activation checkpointing.

    `precision` is "fp32" or "bf16" (autocast, fp32 weights); weights and their bf16 copies are not counted. Held
    against saved tensors to 2 % where attention is one kernel a sequence or the plain products.
    Raises ConfigError for another precision.
    """
    width = shape.hidden_size
    layer = post_norm.layer_bytes(width, shape.intermediate_size, shape.num_heads, precision)
    head = post_norm.head_bytes(width, width, shape.vocabulary_size, precision)
    return round(sum(lengths) * (shape.num_layers * layer + post_norm.embedding_bytes(width) + post_norm.MASKED_FRACTION * head))


_PUBLISHED = BertShape(num_layers=30, hidden_size=1024, intermediate_size=4096, num_heads=16)


_BOTH = (
    "Section 2.4 of the paper limits the second phase to 1,024 residues for all models; its table and text give 2,048 for ProtBert, which the recipes use.",
    "The paper calls the position encoding sinusoidal; the released weights have BERT's learned table of 40,000 rows.",
    "Only with 40,000 positions are there 420 M parameters (380.5 M with 512); about 38,000 rows, past the longest training sequence, were never trained.",
    "420 M is 420,984,864 with pooler and next-sentence head (BertForPreTraining), as counted here, and 419,933,214 without (BertForMaskedLM).",
    errata.HOROVOD,
    errata.LMS,
)
_REFERENCE = "Elnaggar et al. 2021, ProtTrans, IEEE TPAMI, Table 2"

_SIZES = {
    "prot_bert": Size(
        shape=_PUBLISHED,
        reference=f"{_REFERENCE}, column ProtBert (UniRef100)",
        parameters_published=420_000_000,
        errata=(
            *_BOTH,
            errata.UNIREF100,
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
            errata.BFD,
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
    tensor_parallel=TensorParallel(split=post_norm.SPLIT, divides=lambda shape: {"num_heads": shape.num_heads, "intermediate_size": shape.intermediate_size}),
)
