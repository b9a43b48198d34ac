"""ProtXLNet without torch: its sizes, what the papers say about them, and the arithmetic of one step.

The modules are in `prottrans_hpc.models.prot_xlnet`; tests hold the arithmetic here against them.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic.dataclasses import dataclass

from ..architecture import Architecture, Size, TensorParallel, Vocabulary
from ..config import STRICT
from ..errors import ConfigError
from ..recipe_objectives import Permutation
from . import errata

TARGET_FRACTION = 1 / 6
"""Share of the tokens that the query stream and the prediction head are counted for: the published objective's."""


@dataclass(frozen=True, config=STRICT)
class XLNetShape:
    """The hyper-parameters of an XLNet (Yang et al. 2019)."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    """Width of the feed-forward part."""
    num_heads: int
    memory_length: int = 384
    """Tokens of the pieces before that a lane's piece may see; 0: none."""
    clamp_length: int = 0
    """Distances beyond this, either way, count as this; 0: no distance is clamped (the authors' clamp_len -1)."""
    vocabulary_size: int = 37
    dropout: float = 0.1
    """Everywhere in training: embeddings, positions, attention weights, what each part adds, and the output."""
    layer_norm_epsilon: float = 1e-12
    initializer_range: float = 0.02
    """Standard deviation of the starting weights."""

    def __post_init__(self) -> None:
        counts = (self.num_layers, self.hidden_size, self.intermediate_size, self.num_heads, self.vocabulary_size)
        if min(counts) < 1:
            raise ValueError("layers, sizes, heads and vocabulary must be at least 1")
        if min(self.memory_length, self.clamp_length) < 0:
            raise ValueError("memory_length and clamp_length must be at least 0")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size {self.hidden_size} must be even: one half are sines of a distance, the other cosines")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout {self.dropout} must be at least 0 and below 1")

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


def num_parameters(shape: XLNetShape) -> int:
    """Parameters as XLNetLMHeadModel has them; the word table serves as decoder too and is counted once."""
    width, inner = shape.hidden_size, shape.intermediate_size
    norm = 2 * width
    attention = 5 * width * width + (3 + 2) * width + norm  # three biases of the scores and a table of two segments
    feed_forward = (width * inner + inner) + (inner * width + width) + norm
    embeddings = shape.vocabulary_size * width + width  # and the vector that every query starts from
    return embeddings + shape.num_layers * (attention + feed_forward) + shape.vocabulary_size


def flops(shape: XLNetShape, lengths: Sequence[int]) -> float:
    """Floating-point operations of a forward and backward pass over pieces of `lengths` tokens, each with a full memory.

    Matrix products only, two operations a multiply-add, backward twice the forward pass, nothing recomputed: the
    convention of model-FLOP utilisation. The query stream and the head are counted for a sixth of the tokens. The last
    layer has no content stream, only its keys and values.
    """
    width, inner, memory = shape.hidden_size, shape.intermediate_size, shape.memory_length
    pieces = [float(length) for length in lengths]
    keys = [length + memory for length in pieces]
    num_tokens, num_keys = sum(pieces), sum(keys)
    # A score is a product with the key and one with each distance that occurs; a third product is with the value.
    pairs = sum(length * (3 * key + length) for length, key in zip(pieces, keys, strict=True))
    stream = num_tokens * (2 * width * width + 2 * width * inner) + pairs * width
    streams = (shape.num_layers - 1 + TARGET_FRACTION * shape.num_layers) * stream
    keys_and_values = shape.num_layers * num_keys * 2 * width * width
    head = TARGET_FRACTION * num_tokens * width * shape.vocabulary_size
    # The table of distances is made once a batch, and nothing is behind it to pass a gradient on to.
    num_distances = 2.0 * max(lengths, default=0) + memory if lengths else 0.0
    positions = shape.num_layers * num_distances * width * width
    return 2 * (3 * (streams + keys_and_values + head) + 2 * positions)


def activation_bytes(shape: XLNetShape, lengths: Sequence[int], precision: str) -> int:
    """Bytes that one forward pass over lanes' pieces of `lengths` tokens, each with a full memory, keeps for the backward
    pass, without activation checkpointing.

    `precision` is "fp32" or "bf16" (autocast, fp32 weights); weights and their bf16 copies are not counted. Held
    against saved tensors on a CPU to 2 %, which keeps the mask of a dropout as numbers. Raises ConfigError for another
    precision.
    """
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"no activation arithmetic for the precision {precision!r}; known are fp32 and bf16")
    size, drops, width, memory = 4 if precision == "fp32" else 2, int(shape.dropout > 0.0), shape.hidden_size, shape.memory_length
    num_tokens, num_distances = sum(lengths), 2 * max(lengths, default=0) + memory
    pairs = sum(length * (length + memory) for length in lengths)
    masks = pairs * (1 + TARGET_FRACTION * (1 + 8))  # and which distance each pair has, int64
    head = TARGET_FRACTION * num_tokens * ((2 * 4 + size) * drops * width + 4 * shape.vocabulary_size)
    embeddings = num_tokens * (8 + 4 * drops * width) + num_distances * width * size
    return round(sum(_layers(shape, lengths, precision, TARGET_FRACTION)) + masks + head + embeddings)


def _layers(shape: XLNetShape, lengths: Sequence[int], precision: str, fraction: float) -> list[float]:
    """Bytes that each layer keeps; the last one has the stream of queries alone, `fraction` of the tokens."""
    size, drops, width, memory = 4 if precision == "fp32" else 2, int(shape.dropout > 0.0), shape.hidden_size, shape.memory_length
    num_tokens, num_keys = sum(lengths), sum(length + memory for length in lengths)
    num_distances = 2 * max(lengths, default=0) + memory
    pairs = sum(length * (length + memory) for length in lengths)
    sites = sum(length * (2 * length + memory) for length in lengths)
    # A stream's inputs of dense layers and norms (these fp32), its two kinds of queries, both sides of the GELU, two norms' statistics.
    stream = num_tokens * (width * (2 * 4 + (5 + 2 * drops) * size) + shape.intermediate_size * (2 + drops) * size + 16)
    stream += pairs * shape.num_heads * (1 + 2 * drops) * size
    query = fraction * (stream + sites * shape.num_heads * size) + (3 * num_keys + num_distances) * width * size
    return [query + stream] * (shape.num_layers - 1) + [query]


def layer_bytes(shape: XLNetShape, lengths: Sequence[int], precision: str, objective: Permutation | None) -> tuple[list[int], list[int]]:
    """What each layer keeps, and what its backward pass needs for a moment: gradients of its hidden states, and of the scores of
    its widest stream, of which some are fp32 in any precision."""
    fraction, memory = objective.fraction if objective else TARGET_FRACTION, shape.memory_length
    scores = 1.5 * shape.num_heads * (4 if precision == "fp32" else 3) * sum(length * (length + memory) for length in lengths)
    gradients = 3.5 * 4 * shape.hidden_size * sum(lengths)
    kept = [round(layer) for layer in _layers(shape, lengths, precision, fraction)]
    return kept, [round(gradients + scores)] * (len(kept) - 1) + [round(fraction * (gradients + scores))]


def lane_bytes(shape: XLNetShape, num_tokens: int) -> int:
    """Bytes of the memory that a lane has between steps, whatever the tokens of a piece: the inputs of every layer, fp32."""
    return 4 * shape.num_layers * shape.memory_length * shape.hidden_size


_SPECIAL = ("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>")
_PUNCTUATION = (".", "(", ")", '"', "-", "\u2013", "\u00a3", "\u20ac")
"""Pieces that the authors of XLNet ask for in every vocabulary; no protein has them."""

_SIZES = {
    "prot_xlnet": Size(
        shape=XLNetShape(num_layers=30, hidden_size=1024, intermediate_size=4096, num_heads=16),
        reference="Elnaggar et al. 2021, ProtTrans, IEEE TPAMI, Table 2, column ProtXLNet (UniRef100)",
        parameters_published=409_000_000,
        errata=(
            "409 M is 409,413,669 as XLNetLMHeadModel has them, each layer's table of two segments included, which a protein alone has no use for.",
            "The memory of 384 tokens is of training alone: the released configuration has no mem_len, and the published embeddings are made without memory.",
            "Section 2.4 of the paper gives all models a second phase of 1,024 residues; its table has one phase of 512 for ProtXLNet, as the recipe.",
            errata.UNIREF100,
            errata.HOROVOD,
        ),
    ),
    "small": Size(
        shape=XLNetShape(num_layers=6, hidden_size=256, intermediate_size=1024, num_heads=8),
        reference="this project: study size for two CPU cores",
    ),
    "tiny": Size(
        shape=XLNetShape(num_layers=2, hidden_size=64, intermediate_size=256, num_heads=2, memory_length=64, dropout=0.0, initializer_range=0.1),
        reference="this project: one-minute twin for the demo and the tests",
    ),
}

ARCHITECTURE = Architecture(
    name="prot_xlnet",
    description="ProtXLNet: XLNet (two-stream attention, relative positions, memory) on protein sequences",
    sizes=_SIZES,
    vocabulary=Vocabulary(
        # 17 pieces of every XLNet vocabulary, then the 20 standard residues by frequency; X, U, Z, O and B are unknown.
        tokens=(*_SPECIAL, *_PUNCTUATION, *"LAGVESIKRDTPNQFYMHCW"),
        prefix=(),
        suffix=("<sep>", "<cls>"),
        mask="<mask>",
        padding="<pad>",
        unknown="<unk>",
    ),
    objectives=("permutation",),
    build="prottrans_hpc.models.prot_xlnet:build",
    huggingface="prottrans_hpc.models.huggingface_xlnet:LAYOUT",
    num_parameters=num_parameters,
    flops=flops,
    activation_bytes=activation_bytes,
    lanes=True,
    lane_bytes=lane_bytes,
    layer_bytes=layer_bytes,
    tensor_parallel=TensorParallel(
        split={
            **dict.fromkeys(("attention.query", "attention.key", "attention.value", "attention.output", "attention.distance", "attention.segments"), 1),
            **dict.fromkeys(("content.bias", "position.bias", "segment.bias"), 0),
            "up": "column",
            "down": "row",
        },
        divides=lambda shape: {"num_heads": shape.num_heads, "intermediate_size": shape.intermediate_size},
    ),
)
