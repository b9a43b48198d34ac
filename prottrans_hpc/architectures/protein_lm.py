"""ProteinLM without torch: its sizes, what the paper and its code say about them, and the arithmetic of one step.

Xiao et al. 2021, Modeling Protein Using Large-scale Pretrain Language Model (arXiv 2108.07435), and the authors' code.
The modules are in `prottrans_hpc.models.protein_lm`; tests hold the arithmetic here against them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic.dataclasses import dataclass

from ..architecture import Architecture, Size, TensorParallel, Vocabulary
from ..config import STRICT, Fraction
from . import post_norm


@dataclass(frozen=True, config=STRICT)
class ProteinLmShape:
    """The hyper-parameters of a Megatron BERT with its masked-residue head (Shoeybi et al. 2020)."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    """Width of the feed-forward part; Megatron's is four times the hidden size."""
    num_heads: int
    max_positions: int = 2_176
    """Rows of the learned position table: the longest sequence in tokens, [CLS] included."""
    vocabulary_size: int = 128
    """Rows of the word table: Megatron pads the 31 tokens to a multiple of 128; the softmax runs over all rows."""
    num_token_types: int = 1
    """Rows of the segment table of the HuggingFace layout. ProteinLM has no segments: row 0 is added, is zero and stays so."""
    dropout: Fraction = 0.1
    """Of the embeddings and of what each half of a layer adds."""
    attention_dropout: Fraction = 0.1
    layer_norm_epsilon: float = 1e-12
    initializer_range: float = 0.02
    """Standard deviation of the starting weights; of the two matrices that write to the residual stream, divided by sqrt(2 layers)."""

    def __post_init__(self) -> None:
        post_norm.check(
            self.hidden_size, self.num_heads, self.num_layers, self.intermediate_size, self.max_positions, self.vocabulary_size, self.num_token_types
        )
        if max(self.dropout, self.attention_dropout) >= 1.0:
            raise ValueError("dropout and attention_dropout must be below 1")


def num_parameters(shape: ProteinLmShape) -> int:
    """Parameters of the encoder and its head; the word table serves as decoder too and is counted once."""
    width, tables = shape.hidden_size, shape.vocabulary_size + shape.max_positions + shape.num_token_types
    return tables * width + num_layer_parameters(shape) + 2 * width + post_norm.head_parameters(width, width, shape.vocabulary_size)


def num_layer_parameters(shape: ProteinLmShape) -> int:
    """Parameters of the layers alone: what the paper's sizes count."""
    return shape.num_layers * post_norm.layer_parameters(shape.hidden_size, shape.intermediate_size)


def flops(shape: ProteinLmShape, lengths: Sequence[int]) -> float:
    """Floating-point operations of a forward and backward pass over sequences of `lengths` tokens.

    Matrix products only, two operations a multiply-add, backward twice the forward pass, nothing recomputed:
    the convention of model-FLOP utilisation. The prediction head is counted for 15 % of the tokens.
    """
    width = shape.hidden_size
    layers = shape.num_layers * post_norm.layer_products(width, shape.intermediate_size, lengths)
    return 3 * 2 * (layers + post_norm.MASKED_FRACTION * sum(lengths) * post_norm.head_products(width, width, shape.vocabulary_size))


def activation_bytes(shape: ProteinLmShape, lengths: Sequence[int], precision: str) -> int:
    """Bytes that one forward pass keeps for the backward pass, without activation checkpointing.

    `precision` is "fp32" or "bf16" (autocast, fp32 weights); weights and their bf16 copies are not counted, nor are
    dropped attention weights, which a fused kernel draws again. Held against saved tensors to 2 % without dropout.
    Raises ConfigError for another precision.
    """
    width = shape.hidden_size
    # A norm in front keeps its input where one behind does, and what it gives is the input of matrices in both.
    layer = post_norm.layer_bytes(width, shape.intermediate_size, shape.num_heads, precision)
    head = post_norm.head_bytes(width, width, shape.vocabulary_size, precision)
    masks = width if shape.dropout else 0  # a byte a number on GPUs; more on CPUs
    ends = post_norm.embedding_bytes(width)  # the norm is the last one, not the embeddings'
    return round(sum(lengths) * (shape.num_layers * (layer + 2 * masks) + masks + ends + post_norm.MASKED_FRACTION * head))


def _megatron(hidden_size: int, num_layers: int, num_heads: int) -> ProteinLmShape:
    return ProteinLmShape(num_layers=num_layers, hidden_size=hidden_size, intermediate_size=4 * hidden_size, num_heads=num_heads)


def _unpadded(*, num_layers: int, hidden_size: int, num_heads: int) -> ProteinLmShape:
    """For short runs: without dropout, without rows that stand for no token, and with starting weights as large as the width wants them."""
    return ProteinLmShape(
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_heads=num_heads,
        vocabulary_size=len(_TOKENS),
        dropout=0.0,
        attention_dropout=0.0,
        initializer_range=0.64 / math.sqrt(hidden_size),  # 0.02 at 1,024; with 0.02 at 64 nothing but the residue frequencies is learned for long
    )


_TOKENS = ("[PAD]", "[MASK]", "[CLS]", "[SEP]", "[UNK]", "[unused1]", *"ABCDEFGHIKLMNOPQRSTUVWXYZ")
_PAPER = "Xiao et al. 2021, arXiv 2108.07435"
_ALL = (
    "The paper's sizes count the layers alone (201.5 M, 1.21 B, 2.72 B); tables, last norm and head add 2 % at most, so they do not tell whether the "
    "vocabulary was padded. Megatron pads its 31 tokens to 128 rows unless told otherwise, and the authors' script does not: so here.",
    "The code's rows of 2,176 tokens hold as many whole proteins as fit, each behind its own [CLS], with positions and attention of its own: "
    "4 rows a GPU on 480 GPUs are 1,920 rows = 4,177,920 tokens a step, not 1,920 proteins.",
    "[SEP] is in the vocabulary but in no training row: sequences are [CLS] and residues. The fine-tuning code appends it all the same.",
    "The README of the code speaks of 20 residue letters; its vocabulary has 25 (all but J) and [unused1], which the conversion for fine-tuning drops: "
    "that is why the released config.json says 30 tokens.",
    "The paper calls ProtTrans a model of tens of billions of parameters; its largest has 11 billion.",
    "Of random replacements the code draws any of the 31 tokens; here they are the 20 standard residues. Megatron's fused GELU is the tanh "
    "approximation; here and in the released conversion it is exact.",
)
_LARGE = "The 3 B model had half as many iterations as the 1.2 B one; how many either had is not said. The recipes have the script's million."
_TABLE_7 = {
    (512, 32, 8): (),
    (768, 12, 6): (),
    (768, 16, 16): (),
    (768, 16, 24): (),
    (1024, 12, 16): (),
    (1024, 12, 32): (),
    (2048, 12, 16): (),
    (2048, 24, 16): (_LARGE,),
    (2048, 24, 8): (),
    (3072, 24, 16): (_LARGE,),
}
"""(hidden size, layers, heads) -> errata of its own. A model of 3 layers x 8,192 did not converge in 5 days and is not in the table."""

_SIZES = {
    "protein_lm_200m": Size(
        shape=_megatron(1024, 16, 16),
        reference=f"{_PAPER}, tables 2 to 6; its shape stands in the authors' code only",
        parameters_published=200_000_000,
        errata=(*_ALL, "The paper's table of ten configurations lacks this one, which its other tables compare."),
    ),
    "protein_lm_1p2b": Size(shape=_megatron(2048, 24, 16), reference=f"{_PAPER}, tables 1 and 7", parameters_published=1_200_000_000, errata=(*_ALL, _LARGE)),
    "protein_lm_3b": Size(shape=_megatron(3072, 24, 16), reference=f"{_PAPER}, tables 1 to 7", parameters_published=3_000_000_000, errata=(*_ALL, _LARGE)),
    **{
        f"protein_lm_h{hidden}_l{layers}_a{heads}": Size(
            shape=_megatron(hidden, layers, heads), reference=f"{_PAPER}, table 7, hidden-{hidden}-layer-{layers}-head-{heads}", errata=(*_ALL, *own)
        )
        for (hidden, layers, heads), own in _TABLE_7.items()
    },
    "small": Size(
        shape=_unpadded(num_layers=6, hidden_size=256, num_heads=8),
        reference="this project: study size for two CPU cores",
    ),
    "tiny": Size(
        shape=_unpadded(num_layers=2, hidden_size=64, num_heads=2),
        reference="this project: one-minute twin for the demo and the tests",
    ),
}

ARCHITECTURE = Architecture(
    name="protein_lm",
    description="ProteinLM: Megatron BERT (encoder, pre-norm, learned positions) on protein sequences",
    sizes=_SIZES,
    vocabulary=Vocabulary(
        tokens=_TOKENS,
        prefix=("[CLS]",),
        suffix=(),
        mask="[MASK]",
        padding="[PAD]",
        unknown="[UNK]",
    ),
    objectives=("masked",),
    build="prottrans_hpc.models.protein_lm:build",
    huggingface="prottrans_hpc.models.huggingface_megatron_bert:LAYOUT",
    num_parameters=num_parameters,
    flops=flops,
    activation_bytes=activation_bytes,
    wide_residuals=True,
    tensor_parallel=TensorParallel(split=post_norm.SPLIT, divides=lambda shape: {"num_heads": shape.num_heads, "intermediate_size": shape.intermediate_size}),
)
