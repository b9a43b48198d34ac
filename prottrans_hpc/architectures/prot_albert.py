"""ProtAlbert without torch: its sizes, what the papers say about them, and the arithmetic of one step.

The modules are in `prottrans_hpc.models.prot_albert`; tests hold the arithmetic here against them.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic.dataclasses import dataclass

from ..architecture import Architecture, Size, TensorParallel, Vocabulary
from ..config import STRICT
from . import errata, post_norm


@dataclass(frozen=True, config=STRICT)
class AlbertShape:
    """The hyper-parameters of an ALBERT encoder with its heads (Lan et al. 2020); without dropout, as published."""

    num_layers: int
    """How often the one layer is applied."""
    hidden_size: int
    intermediate_size: int
    """Width of the feed-forward part."""
    num_heads: int
    embedding_size: int = 128
    """Width of the word, position and segment tables; a matrix leads from it to `hidden_size`."""
    max_positions: int = 40_000
    """Rows of the learned position table: the longest sequence in tokens, [CLS] and [SEP] included."""
    vocabulary_size: int = 34
    num_token_types: int = 2
    """Rows of the segment table; only row 0 is used, both are kept for the published weights."""
    layer_norm_epsilon: float = 1e-12
    initializer_range: float = 0.02
    """Standard deviation of the starting weights."""
    has_pooler: bool = True
    """A head of the published weights that masked training leaves alone; an imported model may lack it."""

    def __post_init__(self) -> None:
        counts = (self.num_layers, self.intermediate_size, self.embedding_size, self.max_positions, self.vocabulary_size, self.num_token_types)
        post_norm.check(self.hidden_size, self.num_heads, *counts)


def num_parameters(shape: AlbertShape) -> int:
    """Parameters of the encoder and its heads; the layer and the word table, which serves as decoder too, are counted once."""
    width, narrow = shape.hidden_size, shape.embedding_size
    embeddings = (shape.vocabulary_size + shape.max_positions + shape.num_token_types) * narrow + 2 * narrow
    heads = post_norm.head_parameters(width, narrow, shape.vocabulary_size) + shape.has_pooler * (width * width + width)
    return embeddings + (narrow * width + width) + post_norm.layer_parameters(width, shape.intermediate_size) + heads


def flops(shape: AlbertShape, lengths: Sequence[int]) -> float:
    """Floating-point operations of a forward and backward pass over sequences of `lengths` tokens; the conventions are ProtBert's.

    The layer is computed `num_layers` times: sharing saves memory, not work.
    """
    width, narrow, num_tokens = shape.hidden_size, shape.embedding_size, float(sum(lengths))
    layers = shape.num_layers * post_norm.layer_products(width, shape.intermediate_size, lengths)
    head = post_norm.MASKED_FRACTION * num_tokens * post_norm.head_products(width, narrow, shape.vocabulary_size)
    return 3 * 2 * (num_tokens * narrow * width + layers + head)


def activation_bytes(shape: AlbertShape, lengths: Sequence[int], precision: str) -> int:
    """Bytes that one forward pass keeps for the backward pass, without activation checkpointing; as ProtBert's.

    The layer keeps its inputs at each of its `num_layers` applications. Raises ConfigError for a precision other than fp32 and bf16.
    """
    width, narrow = shape.hidden_size, shape.embedding_size
    layer = post_norm.layer_bytes(width, shape.intermediate_size, shape.num_heads, precision)
    head = post_norm.head_bytes(width, narrow, shape.vocabulary_size, precision)
    embeddings = post_norm.embedding_bytes(narrow) + post_norm.projection_bytes(narrow, precision)
    return round(sum(lengths) * (shape.num_layers * layer + embeddings + post_norm.MASKED_FRACTION * head))


_RESIDUES = "LAGVESIKRDTPNQFYMHCWX"
_SYMBOLS = ("(", ")", '"', "-", ".", "\u2013", "\u00a3", "\u20ac")
"""Signs that ALBERT's SentencePiece settings always put into a vocabulary; no protein has them."""

_SIZES = {
    "prot_albert": Size(
        shape=AlbertShape(num_layers=12, hidden_size=4096, intermediate_size=16_384, num_heads=64),
        reference="Elnaggar et al. 2021, ProtTrans, IEEE TPAMI, Table 2, column ProtAlbert (UniRef100); the settings of ALBERT xxlarge v2",
        parameters_published=224_000_000,
        errata=(
            "Section 2.4 of the paper limits the second phase to 1,024 residues for all models; its table and text give 2,048 for ProtAlbert,"
            " which the recipe uses.",
            "The paper calls the position encoding sinusoidal; the released configuration has a learned table of 40,000 rows,"
            " of which about 38,000 were never trained.",
            "224 M is with the pooler, as counted here; AlbertForMaskedLM, which lacks it, has 207.56 M.",
            errata.UNIREF100,
            errata.HOROVOD,
            "The discussion compares pre-training data as SeqVec's 30 M with ProtAlbert's 224 M: the first are sequences, the second parameters.",
            "The released vocabulary has 34 tokens and is not published as text. ALBERT's SentencePiece settings give 5 special tokens and 8 signs;"
            " with 20 residues and X (the released notebooks write U, Z, O and B as X) that makes 34. The residues stand here in ProtBert's order:"
            " import sorts the rows of released weights by the spiece.model beside them.",
        ),
    ),
    "small": Size(
        shape=AlbertShape(num_layers=6, hidden_size=512, intermediate_size=2048, num_heads=8, embedding_size=64, max_positions=2_560),
        reference="this project: study size for two CPU cores",
    ),
    "tiny": Size(
        shape=AlbertShape(num_layers=2, hidden_size=128, intermediate_size=256, num_heads=2, embedding_size=64, max_positions=2_560, initializer_range=0.05),
        reference="this project: one-minute twin for the demo and the tests",
    ),
}

ARCHITECTURE = Architecture(
    name="prot_albert",
    description="ProtAlbert: ALBERT (one shared encoder layer, factorised embeddings) on protein sequences",
    sizes=_SIZES,
    vocabulary=Vocabulary(
        tokens=("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]", *_SYMBOLS, *_RESIDUES),
        prefix=("[CLS]",),
        suffix=("[SEP]",),
        mask="[MASK]",
        padding="<pad>",
        unknown="<unk>",
    ),
    objectives=("masked",),
    build="prottrans_hpc.models.prot_albert:build",
    huggingface="prottrans_hpc.models.huggingface_albert:LAYOUT",
    num_parameters=num_parameters,
    flops=flops,
    activation_bytes=activation_bytes,
    tensor_parallel=TensorParallel(split=post_norm.SPLIT, divides=lambda shape: {"num_heads": shape.num_heads, "intermediate_size": shape.intermediate_size}),
)
