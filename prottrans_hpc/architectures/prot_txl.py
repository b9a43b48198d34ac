"""ProtTXL without torch: its sizes, what the papers say about them, and the arithmetic of one step.

The modules are in `prottrans_hpc.models.prot_txl`; tests hold the arithmetic here against them.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic.dataclasses import dataclass

from ..architecture import Architecture, Size, TensorParallel, Vocabulary
from ..config import STRICT, Fraction
from ..errors import ConfigError
from . import errata


@dataclass(frozen=True, config=STRICT)
class TxlShape:
    """The hyper-parameters of a Transformer-XL (Dai et al. 2019) whose two attention biases all layers share."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    """Width of the feed-forward part."""
    num_heads: int
    head_size: int
    """Width of one attention head; need not be hidden_size / num_heads."""
    memory_length: int = 512
    """Hidden states of each layer that a lane takes along; also how far back a token may look where there are no lanes."""
    dropout: Fraction = 0.0
    """Of embeddings, distances and what attention and feed-forward part add; attention weights are not dropped."""
    vocabulary_size: int = 28
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    """Standard deviation of the starting weights."""

    def __post_init__(self) -> None:
        counts = (self.num_layers, self.hidden_size, self.intermediate_size, self.num_heads, self.head_size, self.memory_length, self.vocabulary_size)
        if min(counts) < 1:
            raise ValueError("layers, sizes, heads, memory and vocabulary must be at least 1")
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size {self.hidden_size} must be even: half of a distance's encoding are sines, half cosines")

    @property
    def inner_size(self) -> int:
        """Width of all heads together."""
        return self.num_heads * self.head_size


def num_parameters(shape: TxlShape) -> int:
    """Parameters; the word table serves as decoder too and is counted once."""
    width, inner = shape.hidden_size, shape.intermediate_size
    norm = 2 * width
    # Query, key, value, distances, output: all without bias.
    layer = 5 * width * shape.inner_size + norm + (width * inner + inner) + (inner * width + width) + norm
    return shape.vocabulary_size * width + shape.vocabulary_size + 2 * shape.inner_size + shape.num_layers * layer


def flops(shape: TxlShape, lengths: Sequence[int]) -> float:
    """Floating-point operations of a forward and backward pass over pieces of `lengths` tokens, each with a full memory of its own protein.

    Matrix products only, two operations a multiply-add, backward twice the forward pass, nothing recomputed: the
    convention of model-FLOP utilisation. A token is counted with the keys that it sees: the memory, and what lies before it. Where
    memories are reset at the ends of proteins less is computed. The table of distances, one for all pieces, is left out.
    """
    width, heads, memory = shape.hidden_size, shape.inner_size, shape.memory_length
    num_tokens, num_memory = float(sum(lengths)), float(memory * len(lengths))
    pairs = sum(length * memory + length * (length + 1) / 2 for length in lengths)
    linear = num_tokens * (4 * width * heads + 2 * width * shape.intermediate_size) + num_memory * 2 * width * heads
    return 3 * 2 * (shape.num_layers * (linear + 3 * pairs * heads) + num_tokens * width * shape.vocabulary_size)


def activation_bytes(shape: TxlShape, lengths: Sequence[int], precision: str) -> int:
    """Bytes that one forward pass over pieces with full memories keeps for the backward pass, without activation checkpointing.

    `precision` is "fp32" or "bf16" (autocast, fp32 weights); weights and their bf16 copies are not counted, nor is the memory itself
    (`lane_bytes`). Held against saved tensors to 2 % where attention is blocks of plain products.
    Raises ConfigError for another precision.
    """
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"no activation arithmetic for the precision {precision!r}; known are fp32 and bf16")
    width, inner, heads, drops = shape.hidden_size, shape.intermediate_size, shape.inner_size, shape.dropout > 0
    narrow, norm = 4 if precision == "fp32" else 2, 8
    num_tokens, num_memory = sum(lengths), shape.memory_length * len(lengths)
    # Query and attention result, inputs of the linear layers, inputs of the norms; what was dropped and, on CPUs as wide, where.
    token = narrow * (2 * heads + 2 * width + inner) + 4 * 2 * width + 2 * norm + drops * narrow * (2 * width + 2 * inner)
    # What keys and values are made from, and both; the same of the distances.
    key, distance = narrow * (width + 2 * heads), narrow * heads
    layer = num_tokens * token + (num_tokens + num_memory) * key + (max(lengths, default=0) + shape.memory_length) * distance
    head = num_tokens * (4 * shape.vocabulary_size + narrow * width + drops * 4 * 2 * width + 2 * 8)
    return round(shape.num_layers * layer + head)


def lane_bytes(shape: TxlShape, piece_tokens: int) -> int:
    """Bytes of the memory of one lane, in fp32; full after `memory_length` tokens whatever the length of a piece."""
    return 4 * shape.num_layers * shape.memory_length * shape.hidden_size


_REFERENCE = "Elnaggar et al. 2021, ProtTrans, IEEE TPAMI, Table 2"
_BOTH = (
    "Which tokens the released vocabularies have, and in which order, is not published; here it is 25 letters, an end, an unknown and a padding token: "
    "with 28 tokens the parameters come to the published number.",
    "The paper took its code from NVIDIA's examples; an author names cybertronai/transformer-xl instead.",
    "202,176 GPU-hours are given for ProtTXL (preprint only, not saying which): 5,616 GPUs for 36 hours, so at least two jobs of the 24-hour queue.",
    errata.LMS,
)

_SIZES = {
    "prot_txl": Size(
        shape=TxlShape(num_layers=30, hidden_size=1024, intermediate_size=4096, num_heads=16, head_size=64, dropout=0.15),
        reference=f"{_REFERENCE}, column ProtTXL (UniRef100)",
        parameters_published=409_000_000,
        errata=(
            *_BOTH,
            "The table's local batch of 5 on 5,616 GPUs would be 28,080 sequences a step; its global batch of 22,464 is 4 each, as the recipe has it.",
            "A warm-up of at least one epoch is claimed; 5.5K steps of 22,464 sequences are 0.57 epochs of UniRef100 by sequences; by tokens 0.72 of "
            "88 billion residues, 0.79 of 80 billion.",
            errata.UNIREF100,
        ),
    ),
    "prot_txl_bfd": Size(
        shape=TxlShape(num_layers=32, hidden_size=1024, intermediate_size=4096, num_heads=14, head_size=128, dropout=0.15),
        reference=f"{_REFERENCE}, column ProtTXL-BFD (BFD100)",
        parameters_published=562_000_000,
        errata=(
            *_BOTH,
            "14 heads do not divide a width of 1,024 and no head width is given: 128 is the one that gives 562 M parameters.",
            "A warm-up of at least one epoch is claimed; 13.6K steps of 44,928 sequences are 0.29 epochs of BFD by sequences, 0.80 by tokens.",
            "All 40.7K steps are 0.86 epochs by sequences, 2.38 by tokens.",
            errata.BFD,
        ),
    ),
    "small": Size(
        shape=TxlShape(num_layers=6, hidden_size=256, intermediate_size=1024, num_heads=8, head_size=32, memory_length=256),
        reference="this project: study size for two CPU cores",
    ),
    "tiny": Size(
        shape=TxlShape(num_layers=2, hidden_size=64, intermediate_size=256, num_heads=2, head_size=32, memory_length=64),
        reference="this project: one-minute twin for the demo and the tests",
    ),
}

ARCHITECTURE = Architecture(
    name="prot_txl",
    description="ProtTXL: Transformer-XL (causal, relative positions, a memory of what came before) on protein sequences",
    sizes=_SIZES,
    vocabulary=Vocabulary(
        tokens=("<pad>", "<unk>", "<eos>", *"LAGVESIKRDTPNQFYMHCWXUBZO"),
        prefix=(),
        suffix=("<eos>",),
        mask="<unk>",
        padding="<pad>",
        unknown="<unk>",
    ),
    objectives=("causal",),
    build="prottrans_hpc.models.prot_txl:build",
    huggingface="prottrans_hpc.models.huggingface_transfo_xl:LAYOUT",
    num_parameters=num_parameters,
    flops=flops,
    activation_bytes=activation_bytes,
    lanes=True,
    lane_bytes=lane_bytes,
    tensor_parallel=TensorParallel(
        split={
            "query_key_value.weight": 0,  # blocks of rows: `models.tensor_group` deals their heads out
            "distance": "column",
            "attention_output": "row",
            "up": "column",
            "down": "row",
            "content_bias": 0,
            "distance_bias": 0,
        },
        divides=lambda shape: {"num_heads": shape.num_heads, "intermediate_size": shape.intermediate_size},
    ),
)
