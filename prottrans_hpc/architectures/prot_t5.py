"""ProtT5 without torch: its sizes, what the papers say about them, and the arithmetic of one step.

The modules are in `prottrans_hpc.models.prot_t5`; tests hold the arithmetic here against them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pydantic.dataclasses import dataclass

from ..architecture import Architecture, Size, TensorParallel, Vocabulary
from ..config import STRICT
from ..errors import ConfigError
from . import errata

NUM_SENTINELS = 100


@dataclass(frozen=True, config=STRICT)
class T5Shape:
    """The hyper-parameters of a T5 encoder-decoder, version 1.0 (Raffel et al. 2020): ReLU, no biases, tied embeddings."""

    num_layers: int
    """Of the encoder."""
    num_decoder_layers: int
    """0: an encoder alone, for embeddings; it cannot be trained."""
    hidden_size: int
    intermediate_size: int
    """Width of the feed-forward part."""
    num_heads: int
    head_size: int
    """Width of one attention head; all heads together need not be as wide as the hidden states."""
    num_buckets: int = 32
    """Rows of the table of position biases; one table for the encoder, one for the decoder, each shared by its layers."""
    max_distance: int = 128
    """All tokens this far apart, or farther, share a bucket."""
    vocabulary_size: int = 128
    dropout: float = 0.0
    """Share of the hidden states, and of the attention weights, that training sets to 0."""
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0

    def __post_init__(self) -> None:
        counts = (self.num_layers, self.hidden_size, self.intermediate_size, self.num_heads, self.head_size, self.vocabulary_size)
        if min(counts) < 1 or self.num_decoder_layers < 0:
            raise ValueError("layers, sizes, heads and vocabulary must be at least 1, the decoder's layers at least 0")
        if self.num_buckets < 4 or self.num_buckets % 4 or self.max_distance <= self.num_buckets // 2:
            raise ValueError(f"num_buckets {self.num_buckets} must be a multiple of 4, and max_distance {self.max_distance} more than half of it")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")

    @property
    def attention_size(self) -> int:
        """Width of all heads of an attention together."""
        return self.num_heads * self.head_size


def num_parameters(shape: T5Shape) -> int:
    """Parameters of both stacks; the one table of residues serves encoder, decoder and prediction and is counted once."""
    width = shape.hidden_size
    attention = 4 * width * shape.attention_size + width
    feed_forward = 2 * width * shape.intermediate_size + width
    stack = shape.num_buckets * shape.num_heads + width
    encoder = shape.num_layers * (attention + feed_forward) + stack
    decoder = shape.num_decoder_layers * (2 * attention + feed_forward) + stack if shape.num_decoder_layers else 0
    return shape.vocabulary_size * width + encoder + decoder


def flops(shape: T5Shape, lengths: Sequence[int]) -> float:
    """Floating-point operations of a forward and backward pass over sequences of `lengths` tokens.

    The decoder writes as many tokens as the encoder reads, as the published objective has it, and all of them are
    predicted. Matrix products only, two operations a multiply-add, backward twice the forward pass, nothing
    recomputed; the decoder's hidden future is counted, for its products are made.
    """
    width, attention = shape.hidden_size, shape.attention_size
    num_tokens = float(sum(lengths))
    squares = float(sum(length * length for length in lengths))
    products = num_tokens * 4 * width * attention + 2 * squares * attention  # of one attention, self or cross
    feed_forward = num_tokens * 2 * width * shape.intermediate_size
    head = num_tokens * width * shape.vocabulary_size if shape.num_decoder_layers else 0.0
    return 3 * 2 * (shape.num_layers * (products + feed_forward) + shape.num_decoder_layers * (2 * products + feed_forward) + head)


def activation_bytes(shape: T5Shape, lengths: Sequence[int], precision: str) -> int:
    """Bytes that one forward pass keeps for the backward pass, without activation checkpointing.

    `precision` is "fp32" or "bf16" (autocast, fp32 weights); weights and their bf16 copies are not counted. Held
    against saved tensors to 2 % where attention is the plain products and nothing is dropped; of dropout, whose masks are
    as a GPU keeps them, the byte an element is counted. Raises ConfigError for another precision.
    """
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"no activation arithmetic for the precision {precision!r}; known are fp32 and bf16")
    width, attention, number = shape.hidden_size, shape.attention_size, 4 if precision == "fp32" else 2
    # A norm keeps its input and what it scaled in fp32, a factor a token, and its result in the type of the products.
    norm = 8 * width + 4 + number * width
    drops = shape.dropout > 0.0
    feed_forward = norm + number * shape.intermediate_size + drops * ((number + 1) * shape.intermediate_size + width)
    own = norm + number * 4 * attention + drops * width
    cross = norm + number * 5 * attention + 4 * shape.num_heads + drops * width  # the kernel's results are kept once a sequence and once joined
    norm += drops * 2 * width  # the stack's last one, and its input
    encoder = shape.num_layers * (own + feed_forward) + norm + 8
    if not shape.num_decoder_layers:
        return sum(lengths) * encoder
    decoder = shape.num_decoder_layers * (own + cross + feed_forward) + norm + 4 * shape.vocabulary_size + 3 * 8
    return sum(lengths) * (encoder + decoder)


_XL = T5Shape(num_layers=24, num_decoder_layers=24, hidden_size=1024, intermediate_size=16_384, num_heads=32, head_size=128, dropout=0.1)
_XXL = dataclasses.replace(_XL, intermediate_size=65_536, num_heads=128)
_REFERENCE = "Elnaggar et al. 2021, ProtTrans, IEEE TPAMI, Table 2"

_ALL = (
    "The table's local batch is an average a core: with 8-way (XL) or 32-way (XXL) model parallelism a replica has 32 (XL-BFD), 64 (XL-U50), "
    "128 (XXL-BFD) or 256 (XXL-U50) sequences.",
    "Section 2.4 of the paper limits sequences to 1,024 residues in a second phase; the table has one phase of 512 for ProtT5, which the recipes use.",
    "The table has 8 values of dropout for 11 columns; the released configurations have 0.1 for both XL models and for XXL-U50, 0.0 for XXL-BFD.",
    errata.HOROVOD,
)
_AFTER_BFD = "Trained on from the BFD model's last checkpoint: steps and warm-up are those of the second training alone."
_BILLIONS = "Printed as {printed}; the published hyper-parameters give {given}, of which the encoder, what embeddings are made with, has {encoder}."
_XL_COUNT = _BILLIONS.format(printed="3B", given="2,818,830,336", encoder="1,208,141,824")
_XXL_COUNT = _BILLIONS.format(printed="11B", given="11,274,553,344", encoder="4,832,023,552")

_SIZES = {
    "prot_t5_xl_bfd": Size(
        shape=_XL,
        reference=f"{_REFERENCE}, column ProtT5-XL-BFD (BFD100)",
        parameters_published=3_000_000_000,
        errata=(*_ALL, _XL_COUNT, errata.BFD),
    ),
    "prot_t5_xl_u50": Size(
        shape=_XL,
        reference=f"{_REFERENCE}, column ProtT5-XL-U50 (UniRef50, after BFD100)",
        parameters_published=3_000_000_000,
        errata=(*_ALL, _XL_COUNT, _AFTER_BFD, "Figure 6 gives Q3 on NEW364 as 84.3, Table 3 as 84.8."),
    ),
    "prot_t5_xxl_bfd": Size(
        shape=dataclasses.replace(_XXL, dropout=0.0),
        reference=f"{_REFERENCE}, column ProtT5-XXL-BFD (BFD100)",
        parameters_published=11_000_000_000,
        errata=(*_ALL, _XXL_COUNT, errata.BFD),
    ),
    "prot_t5_xxl_u50": Size(
        shape=_XXL,
        reference=f"{_REFERENCE}, column ProtT5-XXL-U50 (UniRef50, after BFD100)",
        parameters_published=11_000_000_000,
        errata=(*_ALL, _XXL_COUNT, _AFTER_BFD, "The gain in Q3 over the BFD model is given as 1.4; the table's numbers differ by 1.7."),
    ),
    "small": Size(
        shape=T5Shape(num_layers=4, num_decoder_layers=4, hidden_size=256, intermediate_size=1024, num_heads=8, head_size=32),
        reference="this project: study size for two CPU cores",
    ),
    "tiny": Size(
        shape=T5Shape(num_layers=2, num_decoder_layers=2, hidden_size=64, intermediate_size=256, num_heads=4, head_size=16, initializer_factor=0.3),
        reference="this project: one-minute twin for the demo and the tests",
    ),
}

ARCHITECTURE = Architecture(
    name="prot_t5",
    description="ProtT5: T5 1.0 (encoder and decoder, relative position biases, ReLU, tied embeddings) on protein sequences",
    sizes=_SIZES,
    vocabulary=Vocabulary(
        tokens=("<pad>", "</s>", "<unk>", *"ALGVSREDTIPKFQNYMHWCXBOUZ", *(f"<extra_id_{index}>" for index in reversed(range(NUM_SENTINELS)))),
        prefix=(),
        suffix=("</s>",),
        mask="<extra_id_0>",
        padding="<pad>",
        unknown="<unk>",
    ),
    objectives=("denoising",),
    build="prottrans_hpc.models.prot_t5:build",
    huggingface="prottrans_hpc.models.huggingface_t5:LAYOUT",
    num_parameters=num_parameters,
    flops=flops,
    activation_bytes=activation_bytes,
    tensor_parallel=TensorParallel(
        split={
            "query": "column",
            "key": "column",
            "value": "column",
            "output": "row",
            "up": "column",
            "down": "row",
            "position_biases": "column",  # one a head
        },
        divides=lambda shape: {"num_heads": shape.num_heads, "intermediate_size": shape.intermediate_size},
    ),
)
