"""ProtElectra without torch: its sizes, what the papers say about them, and the arithmetic of one step.

The modules are in `prottrans_hpc.models.prot_electra`; tests hold the arithmetic here against them.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic.dataclasses import dataclass

from ..architecture import Architecture, Size, TensorParallel
from ..config import STRICT
from . import errata, post_norm
from .prot_bert import ARCHITECTURE as PROT_BERT

MASKED_FRACTION = 0.25
"""Share of the tokens that the generator's head is counted for: the published objective's."""


@dataclass(frozen=True, config=STRICT)
class GeneratorShape:
    """The hyper-parameters of the generator that are its own."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int

    def __post_init__(self) -> None:
        post_norm.check(self.hidden_size, self.num_heads, self.num_layers, self.intermediate_size)


@dataclass(frozen=True, config=STRICT)
class ElectraShape:
    """The hyper-parameters of an ELECTRA pair (Clark et al. 2020), the discriminator's by themselves; without dropout, as published."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    """Width of the feed-forward part."""
    num_heads: int
    embedding_size: int
    """Width of the word, position and segment tables, which both models share; a model of another width projects."""
    generator: GeneratorShape | None
    """None: the discriminator alone, which cannot be trained further."""
    max_positions: int = 40_000
    """Rows of the learned position table: the longest sequence in tokens, [CLS] and [SEP] included."""
    vocabulary_size: int = 30
    num_token_types: int = 2
    """Rows of the segment table; only row 0 is used, both are kept for the published weights."""
    layer_norm_epsilon: float = 1e-12
    initializer_range: float = 0.02
    """Standard deviation of the starting weights."""

    def __post_init__(self) -> None:
        counts = (self.num_layers, self.intermediate_size, self.embedding_size, self.max_positions, self.vocabulary_size, self.num_token_types)
        post_norm.check(self.hidden_size, self.num_heads, *counts)


def num_parameters(shape: ElectraShape) -> int:
    """Parameters of both models and their heads; what they share is counted once."""
    return discriminator_parameters(shape) + (generator_parameters(shape) if shape.generator else 0)


def discriminator_parameters(shape: ElectraShape) -> int:
    """As `transformers.ElectraForPreTraining` has them: the embeddings, the encoder, and a head of two matrices."""
    width, narrow = shape.hidden_size, shape.embedding_size
    embeddings = (shape.vocabulary_size + shape.max_positions + shape.num_token_types) * narrow + 2 * narrow
    return embeddings + _encoder_parameters(shape, narrow) + (width * width + width) + (width + 1)


def generator_parameters(shape: ElectraShape) -> int:
    """What the generator has for itself: its encoder and its head, whose last matrix is the shared word table."""
    own, narrow = shape.generator, shape.embedding_size
    return _encoder_parameters(own, narrow) + post_norm.head_parameters(own.hidden_size, narrow, shape.vocabulary_size) if own else 0


def _encoder_parameters(shape: ElectraShape | GeneratorShape, narrow: int) -> int:
    width = shape.hidden_size
    return _projects(shape, narrow) * (narrow * width + width) + shape.num_layers * post_norm.layer_parameters(width, shape.intermediate_size)


def _projects(shape: ElectraShape | GeneratorShape, narrow: int) -> bool:
    return shape.hidden_size != narrow


def flops(shape: ElectraShape, lengths: Sequence[int]) -> float:
    """Floating-point operations of a forward and backward pass of both models over sequences of `lengths` tokens.

    The conventions are ProtBert's. The generator's head is counted for 25 % of the tokens, the discriminator's for all.
    """
    width, narrow, num_tokens = shape.hidden_size, shape.embedding_size, float(sum(lengths))
    products = _encoder_products(shape, narrow, lengths) + num_tokens * (width * width + width)
    if shape.generator:
        head = MASKED_FRACTION * num_tokens * post_norm.head_products(shape.generator.hidden_size, narrow, shape.vocabulary_size)
        products += _encoder_products(shape.generator, narrow, lengths) + head
    return 3 * 2 * products


def _encoder_products(shape: ElectraShape | GeneratorShape, narrow: int, lengths: Sequence[int]) -> float:
    layers = shape.num_layers * post_norm.layer_products(shape.hidden_size, shape.intermediate_size, lengths)
    return layers + _projects(shape, narrow) * float(sum(lengths)) * narrow * shape.hidden_size


def activation_bytes(shape: ElectraShape, lengths: Sequence[int], precision: str) -> int:
    """Bytes that one forward pass of both models keeps for the backward pass, without activation checkpointing; as ProtBert's.

    The embeddings are computed twice, as the discriminator reads other tokens. Raises ConfigError for a precision other than fp32 and bf16.
    """
    each, width = (2 if precision == "bf16" else 4), shape.hidden_size
    # The head of the discriminator: the inputs of its two matrices and of the GELU, and what the loss keeps.
    token = _encoder_bytes(shape, shape.embedding_size, precision) + each * 3 * width + 4 * 2
    if shape.generator:
        head = post_norm.head_bytes(shape.generator.hidden_size, shape.embedding_size, shape.vocabulary_size, precision)
        token += _encoder_bytes(shape.generator, shape.embedding_size, precision) + MASKED_FRACTION * head
    return round(sum(lengths) * token)


def _encoder_bytes(shape: ElectraShape | GeneratorShape, narrow: int, precision: str) -> float:
    layer = post_norm.layer_bytes(shape.hidden_size, shape.intermediate_size, shape.num_heads, precision)
    projection = _projects(shape, narrow) * post_norm.projection_bytes(narrow, precision)
    return shape.num_layers * layer + post_norm.embedding_bytes(narrow) + projection


_SIZES = {
    "prot_electra": Size(
        shape=ElectraShape(
            num_layers=30,
            hidden_size=1024,
            intermediate_size=4096,
            num_heads=16,
            embedding_size=1024,
            generator=GeneratorShape(num_layers=30, hidden_size=256, intermediate_size=1024, num_heads=4),
        ),
        reference="Elnaggar et al. 2021, ProtTrans, IEEE TPAMI, Table 2, column ProtElectra (UniRef100)",
        parameters_published=420_000_000,
        errata=(
            "420 M is the discriminator alone (419,932,161). The generator adds 24.0 M in its encoder and 0.3 M in its head; the embeddings are shared.",
            "The paper trains on UniRef100; the released weights are named after BFD (prot_electra_discriminator_bfd, prot_electra_generator_bfd).",
            "The released discriminator is not the table's model: its configuration has 32 layers x 1,280 (size prot_electra_released), 682.56 M parameters.",
            "Section 2.4 of the paper limits the second phase to 1,024 residues for all models, which holds for ProtElectra.",
            "The paper calls the position encoding sinusoidal; the released configuration has a learned table of 40,000 rows,"
            " of which about 39,000 were never trained.",
            errata.UNIREF100,
            errata.HOROVOD,
        ),
    ),
    "prot_electra_released": Size(
        shape=ElectraShape(num_layers=32, hidden_size=1280, intermediate_size=5120, num_heads=20, embedding_size=1280, generator=None),
        reference="config.json of the released prot_electra_discriminator_bfd; for import, export and embeddings",
        errata=(
            "The paper's table has 30 layers x 1,024 and 420 M parameters; this released model has 32 layers x 1,280 and 682.56 M.",
            "The paper trains on UniRef100; the released weights are named after BFD.",
            "It is the discriminator alone. Its generator, released apart, joins it at import when it lies in the folder generator/ beside config.json.",
        ),
    ),
    "small": Size(
        shape=ElectraShape(
            num_layers=6,
            hidden_size=256,
            intermediate_size=1024,
            num_heads=8,
            embedding_size=256,
            generator=GeneratorShape(num_layers=6, hidden_size=64, intermediate_size=256, num_heads=2),
            max_positions=2_560,
        ),
        reference="this project: study size for two CPU cores",
    ),
    "tiny": Size(
        shape=ElectraShape(
            num_layers=2,
            hidden_size=64,
            intermediate_size=256,
            num_heads=2,
            embedding_size=64,
            generator=GeneratorShape(num_layers=2, hidden_size=64, intermediate_size=128, num_heads=2),
            max_positions=2_560,
            initializer_range=0.05,
        ),
        reference="this project: one-minute twin for the demo and the tests",
    ),
}


def _divides(shape: ElectraShape) -> dict[str, int]:
    numbers = {"num_heads": shape.num_heads, "intermediate_size": shape.intermediate_size}
    if shape.generator is None:
        return numbers
    return numbers | {"generator.num_heads": shape.generator.num_heads, "generator.intermediate_size": shape.generator.intermediate_size}


ARCHITECTURE = Architecture(
    name="prot_electra",
    description="ProtElectra: ELECTRA (a discriminator, and a small generator that forges its input) on protein sequences",
    sizes=_SIZES,
    vocabulary=PROT_BERT.vocabulary,
    objectives=("replaced_token",),
    build="prottrans_hpc.models.prot_electra:build",
    huggingface="prottrans_hpc.models.huggingface_electra:LAYOUT",
    num_parameters=num_parameters,
    flops=flops,
    activation_bytes=activation_bytes,
    loss_parts=("generator_loss", "discriminator_loss"),
    counts_tokens=True,
    tensor_parallel=TensorParallel(split=post_norm.SPLIT, divides=_divides),
)
