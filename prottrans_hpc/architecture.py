"""The plug-in record of an architecture, its registry, and the two nouns that data and models exchange.

An objective makes a `Batch`; a model turns it into a `LossSum`. Neither side knows the other. This module never
imports torch: a login node plans, lists and counts with it. Third parties register a record under the
entry-point group ``prottrans_hpc.architectures``; the built-in ones stand in `BUILT_IN`.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from . import terminal
from .errors import ConfigError
from .stage import find

ENTRY_POINT_GROUP = "prottrans_hpc.architectures"
BUILT_IN = {
    "prot_albert": "prottrans_hpc.architectures.prot_albert:ARCHITECTURE",
    "prot_bert": "prottrans_hpc.architectures.prot_bert:ARCHITECTURE",
    "prot_electra": "prottrans_hpc.architectures.prot_electra:ARCHITECTURE",
    "prot_t5": "prottrans_hpc.architectures.prot_t5:ARCHITECTURE",
    "prot_txl": "prottrans_hpc.architectures.prot_txl:ARCHITECTURE",
    "prot_xlnet": "prottrans_hpc.architectures.prot_xlnet:ARCHITECTURE",
    "protein_lm": "prottrans_hpc.architectures.protein_lm:ARCHITECTURE",
}

Array = Any
"""A numpy.ndarray when the objective makes it, a torch.Tensor when the model gets it."""


@dataclass(frozen=True)
class Batch:
    """One micro batch: S whole sequences packed end to end into T tokens, of which M are to be predicted."""

    tokens: Array
    """int64 [T]: corrupted input, special tokens included."""
    positions: Array
    """int64 [T]: position of each token within its own sequence, from 0."""
    cu_seqlens: Array
    """int32 [S + 1]: where each sequence starts, then T. Attention never crosses these borders."""
    target_positions: Array
    """int64 [M]: which of the T tokens are predicted."""
    targets: Array
    """int64 [M]: what they should be."""
    sample_ids: Array
    """int64 [S]: which sample of the corpus each sequence is."""
    max_length: int
    """Tokens of the longest sequence; 0 for an empty batch."""
    num_residues: int
    """Residues without special tokens."""
    draws: Array = None
    """float64 [M]: a uniform random number for each target, for models that sample there; None where the objective needs none."""
    permutation: Array = None
    """int64 [T]: place of each token in the order of factorisation, -1 for what all may see; None for other objectives."""
    decoder_tokens: Array = None
    """int64 [U]: what the decoder reads, sequence after sequence. `target_positions` then points into these; None without decoder."""
    decoder_positions: Array = None
    """int64 [U]: as `positions`."""
    decoder_cu_seqlens: Array = None
    """int32 [S + 1]: as `cu_seqlens`."""
    decoder_max_length: int = 0
    """Tokens of the longest sequence that the decoder reads."""
    lanes: Array = None
    """int64 [S]: for a model with memory, which lane of the global batch each "sequence" is the next piece of; else None."""
    documents: Array = None
    """int64 [T]: with lanes, a number for each protein of a lane that grows from one to the next; tokens that must not see
    one another differ in it. None where all of a sequence may see one another."""
    memory: Array = None
    """With lanes, what the model returned as `LossSum.memory` for these lanes' pieces before, lanes first; None at their beginning."""
    carried: Array = None
    """int64 [S]: with lanes, how many tokens right before each piece its first token may see, and so how much of the memory,
    from its end: all since the epoch began, or, with `documents`, those of the same protein. The piece's later proteins see none of
    it then. It may exceed what the memory holds. A function of the text alone, so that a memory needs no documents of its own."""
    tokens_per_target: float = 0.0
    """Tokens of the whole step, over all ranks, divided by its targets; set where the record says `counts_tokens`."""
    loss_weights: tuple[float, ...] = ()
    """Of the record's `loss_parts` in the sum, where the objective has settings for them."""


@dataclass(frozen=True)
class LossSum:
    """What a model returns for a batch: sums, to be divided by the global count of targets by the caller."""

    loss: Array
    """Scalar tensor, fp32: sum of the negative log likelihoods in nats, connected to the graph even when M is 0."""
    num_correct: Array
    """Scalar tensor, int64: targets whose most likely token is the right one."""
    parts: Array = None
    """fp32 [number of the record's `loss_parts`]: addends of the loss by themselves, unweighted, detached, to be divided as the loss is."""
    memory: Array = None
    """What to put into the next batch of these lanes, a tensor with a row a lane, detached; None for models without memory."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of an architecture, in the order that published weights index by."""

    tokens: tuple[str, ...]
    prefix: tuple[str, ...]
    """Special tokens in front of every sequence."""
    suffix: tuple[str, ...]
    """Special tokens behind every sequence."""
    mask: str
    padding: str
    unknown: str

    def index(self, token: str) -> int:
        """The id of a token."""
        return self.tokens.index(token)

    def residue_table(self) -> bytes:
        """256 bytes that map an upper-case ASCII residue to its token id; every other byte to the unknown token."""
        table = bytearray([self.index(self.unknown)] * 256)
        for token_id, token in enumerate(self.tokens):
            if len(token) == 1 and token.isalpha():
                table[ord(token)] = token_id
        return bytes(table)

    def residue_ids(self) -> tuple[int, ...]:
        """The ids of the 20 standard amino acids: what a random replacement is drawn from."""
        return tuple(i for i, token in enumerate(self.tokens) if token in "ACDEFGHIKLMNPQRSTVWY" and len(token) == 1)


@dataclass(frozen=True)
class Size:
    """One size of an architecture."""

    shape: Any
    """A frozen dataclass of the architecture's own: its hyper-parameters."""
    reference: str
    """Where the numbers come from."""
    parameters_published: int | None = None
    """As printed in the paper, rounded there."""
    errata: tuple[str, ...] = ()
    """Where the paper contradicts itself or its released weights."""


@dataclass(frozen=True)
class TensorParallel:
    """How the ranks of a tensor group share an architecture's matrix products."""

    split: Mapping[str, Literal["column", "row"] | int]
    """By the last part of a module's name, for a Linear or Embedding: "column", each rank computes some of the output features
    (of an Embedding: has some columns), or "row", it takes some of the input features and the results are added up. By the last two
    parts of a parameter's name, the dimension that is cut, where modules multiply by it themselves (`models.tensor_group`). All other
    parameters are whole on every rank. A module's forward must take the number of heads from what it is given, not from the shape."""
    divides: Callable[[Any], Mapping[str, int]]
    """`(shape)` -> the numbers that `parallel.tensor_ranks` has to divide, by what they are called in the shape."""

    def degrees(self, shape: Any) -> list[int]:
        """Every size that a tensor group can have, ascending."""
        common = math.gcd(*self.divides(shape).values())
        return [size for size in range(1, common + 1) if common % size == 0]


@dataclass(frozen=True)
class Architecture:
    """Everything about an architecture that needs no torch, and the strings that say where the rest is."""

    name: str
    description: str
    sizes: Mapping[str, Size]
    vocabulary: Vocabulary
    objectives: tuple[str, ...]
    """Names of the objectives it can be trained with, the published one first."""
    build: str
    """ "module:function" of `(shape) -> torch.nn.Module`, whose forward maps a Batch to a LossSum (connected to every
    parameter that requires a gradient, for an empty batch too), whose `hidden(batch)` gives the last hidden states,
    [T, width], whose `logits(hidden)` gives scores over the vocabulary, and whose `initialise(seed)` draws the starting
    weights: they are undefined before it or `load_state_dict`. Its attribute `recompute_every` (int, 0 at first) says that
    every n-th layer is to be computed again for the gradient instead of being kept. Weights that the objective cannot train are parameters
    with requires_grad False: saved and exported, never updated or reduced."""
    huggingface: str
    """ "module:attribute" of the `HuggingFaceLayout` for export and import; "" where there is none."""
    num_parameters: Callable[[Any], int]
    """`(shape)` -> parameters, those that the objective does not train included."""
    flops: Callable[[Any, Sequence[int]], float]
    """`(shape, tokens of each sequence)` -> floating-point operations of one forward and backward pass."""
    activation_bytes: Callable[[Any, Sequence[int], str], int]
    """`(shape, tokens of each sequence, precision)` -> bytes kept for the backward pass."""
    loss_parts: tuple[str, ...] = ()
    """Names of the addends in `LossSum.parts`: metrics.jsonl has each as a mean."""
    counts_tokens: bool = False
    """Whether a part of the loss is a mean over all tokens: the step is then counted first and `Batch.tokens_per_target` set."""
    lanes: bool = False
    """Whether a step's sequences are lanes, each a text that goes on from step to step with the model's memory of it
    (Transformer-XL). Lanes stay on their rank, so `global_batch_size` must be a multiple of the number of ranks unless `loading.uneven_lanes`."""
    lane_bytes: Callable[[Any, int], int] | None = None
    """`(shape, tokens of a piece)` -> bytes of the memory that a lane has between steps; None without lanes."""
    layer_bytes: Callable[[Any, Sequence[int], str, Any], tuple[Sequence[int], Sequence[int]]] | None = None
    """`(shape, tokens of each sequence, precision, objective)` -> of what `activation_bytes` counts, what each layer keeps, and what its
    backward pass needs for a moment; the published objective where that is None. None where all layers of a stack are alike."""
    wide_residuals: bool = False
    """Whether hidden states between layers are fp32 in every precision, with half weights too."""
    tensor_parallel: TensorParallel | None = None
    """None where every rank computes whole products only."""

    def size(self, name: str) -> Size:
        """One of the sizes. Raises ConfigError that lists them."""
        if name not in self.sizes:
            raise ConfigError(f"{self.name} has no size {name!r}; its sizes are {', '.join(self.sizes)}")
        return self.sizes[name]


def _registered() -> dict[str, str | importlib.metadata.EntryPoint]:
    plugins = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    clashes = sorted({point.name for point in plugins} & BUILT_IN.keys())
    if clashes:
        terminal.warn(f"a plug-in registers {', '.join(clashes)}, which is built in; the built-in one is used")
    return {point.name: point for point in plugins} | BUILT_IN


def names() -> list[str]:
    """The names of all registered architectures; plug-ins are listed without importing them."""
    return sorted(_registered())


def get(name: str) -> Architecture:
    """A registered architecture. Raises ConfigError with the known names, or with what broke in a plug-in."""
    registered = _registered()
    if name not in registered:
        # A size or a recipe of a family has its name with more behind it.
        close = sorted((own for own in registered if name.startswith(f"{own}_")), key=len)[-1:] or difflib.get_close_matches(name, registered, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ConfigError(f"no architecture is called {name!r}{hint}; registered are {', '.join(sorted(registered))}")
    source = registered[name]
    try:
        record = find(source) if isinstance(source, str) else source.load()
    except Exception as error:
        raise ConfigError(f"the plug-in of the architecture {name!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(record, Architecture):
        raise ConfigError(f"the plug-in of the architecture {name!r} gives a {type(record).__name__}, not an Architecture record")
    return record


def available() -> list[Architecture]:
    """Every architecture that loads; a broken plug-in is a warning here, an error only when asked for by name."""
    found = []
    for name in names():
        try:
            found.append(get(name))
        except ConfigError as error:
            terminal.warn(str(error))
    return found
