"""What a forward pass keeps for the gradient under the recipe's memory policies, layer by layer. Pure arithmetic over an architecture's record.

A record says what a whole forward pass keeps; as that grows in proportion to layers, a layer keeps what one more would add.
Layers differ where a record says so (`layer_bytes`). In the backward pass layers are freed from the last to the first; one
that is recomputed is there whole for its own moment only.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..architecture import Architecture
from ..recipe import Recipe
from .memory_storages import SIZE_BYTES, Layer, dropped_bytes, small_bytes

_LAYER_COUNTS = ("num_layers", "num_decoder_layers")
"""Fields of a shape, or of a shape within it, that say how often a layer is applied; every n-th application is recomputed."""
_GRADIENTS = 3.5
"""Hidden states in fp32 whose gradients a layer's backward pass has at once, beside what the layer keeps; measured on six families."""
_LANE_GRADIENTS = 6.5
"""The same of layers with a memory, whose keys are more than their tokens."""

_WIDTH = {"fp32": 4.0, "bf16": 3.3, "half": 2.0}
"""Bytes of a number of such a gradient, by what is kept: under autocast those of norms and residuals are fp32."""
_NUMBER = {"fp32": 4, "bf16": 2, "half": 2}
"""Bytes of a number of the type of the products."""

_NARROW = {"fp32": (0.58, 0.48), "bf16": (0.86, 0.2), "half": (1.0, 0.0)}
"""With memory.saved = "bf16", by what is kept otherwise: the share of its bytes that stays, and the share of a layer's that is there in both
types while it is computed; measured on six families."""


@dataclass(frozen=True)
class Kept:
    """Bytes, for the layers in the order in which they are computed."""

    whole: tuple[int, ...]
    """What each keeps when nothing is given up."""
    held: tuple[int, ...]
    """What is left of that until its gradient is computed."""
    rest: int
    """Of embeddings, heads and loss."""
    working: tuple[int, ...]
    """What the backward pass of each layer needs for a moment."""
    finish: int = 0
    """What the end of the forward pass needs for a moment."""
    beside: int = 0
    """What a layer that is computed again has beside what it keeps: results that the policy kept and nobody else needs."""
    small: tuple[int, ...] = ()
    """Of what is held, what large model support leaves where it is; nothing where it is empty."""
    small_rest: int = 0
    """The same of the rest."""
    replaced: tuple[int, ...] = ()
    """What the backward pass of each layer needs for a moment where what it frees is filled with what large model support brings back: the gradients
    on both sides of the feed-forward part's middle and of the layer; and what dropout made of scores of attention."""

    @property
    def after_forward(self) -> int:
        """When the loss is there."""
        return self.rest + sum(self.held)

    @property
    def peak(self) -> int:
        """The most at once in the forward and backward pass."""
        before, moments = 0, [self.after_forward + self.finish]
        for held, whole, working in zip(self.held, self.whole, self.working, strict=True):
            moments.append(self.rest + before + (whole + self.beside if held < whole else held) + working)
            before += held
        return max(moments)


@dataclass(frozen=True)
class Tokens:
    """What a micro batch has."""

    lengths: Sequence[int]
    """Tokens of each sequence, as the model (its encoder) reads them."""
    num_decoder: int | None = None
    """Tokens that a decoder reads, if there is one and it reads others."""

    @property
    def num(self) -> int:
        """Of all sequences."""
        return sum(self.lengths)


def kept_bytes(chosen: Architecture, shape: Any, tokens: Tokens, kept_in: str, recipe: Recipe, *, packed: bool = True) -> Kept:
    """What a micro batch keeps; `kept_in` is "fp32", "bf16" (autocast) or "half" (norms and residuals, too).

    `packed`: whether attention has all sequences in one storage, or one storage a sequence.
    """
    kept = _under_recomputation(chosen, shape, tokens, kept_in, recipe, packed=packed)
    if chosen.lane_bytes is not None:  # the new memory
        kept = replace(kept, rest=kept.rest + len(tokens.lengths) * chosen.lane_bytes(shape, max(tokens.lengths, default=0)))
    return kept if recipe.memory.saved == "as_is" else _narrowed(kept, kept_in)


def _narrowed(kept: Kept, kept_in: str) -> Kept:
    """fp32 numbers in bf16, but for statistics; while a layer is computed, some of its numbers are there in both."""
    share, both = _NARROW[kept_in]
    whole, held = (tuple(round(share * one) for one in layers) for layers in (kept.whole, kept.held))
    working = tuple(round(more + both * one) for more, one in zip(kept.working, kept.whole, strict=True))
    small, small_rest = tuple(round(share * one) for one in kept.small), round(share * kept.small_rest)
    rest, beside = round(share * kept.rest), round(share * kept.beside)
    return replace(kept, rest=rest, whole=whole, held=held, working=working, beside=beside, small=small, small_rest=small_rest)


def _under_recomputation(chosen: Architecture, shape: Any, tokens: Tokens, kept_in: str, recipe: Recipe, *, packed: bool) -> Kept:
    memory = recipe.memory
    whole = _own(chosen, shape, tokens, kept_in, recipe) if chosen.layer_bytes else _by_difference(chosen, shape, tokens, kept_in)
    whole = _with_shared_gradients(chosen, shape, _with_half_norms(shape, tokens, whole) if kept_in == "half" else whole, kept_in)
    layers = [(index, stack) for stack in _stacks(shape, tokens) for index in range(stack.num_layers)]
    if memory.lms_limit_gib is not None:
        whole = _with_storages(chosen, tokens, kept_in, whole, [stack for _, stack in layers], packed=packed)
    if not memory.recompute_every:
        return whole
    size, held, small, beside = _NUMBER[kept_in], list(whole.whole), list(whole.small), 0
    for place, (index, stack) in enumerate(layers):
        if index % memory.recompute_every == 0:
            results, products = KEEPS[memory.recompute_keeps](stack.part, 2 if stack.is_decoder else 1, has_streams=chosen.layer_bytes is not None)
            # The input is fp32 but for half weights; with the results there is a number a head for the softmax.
            input_bytes = (2 if kept_in == "half" and not chosen.wide_residuals else 4) * stack.part.hidden_size + (4 * stack.part.num_heads if results else 0)
            held[place] = min(held[place], stack.num_tokens * (input_bytes + size * (results + products)))
            beside = max(beside, stack.num_tokens * size * products)
            if small:  # all of it is as wide as the hidden states
                small[place] = held[place] if stack.num_tokens * size * stack.part.hidden_size < SIZE_BYTES else 0
    return replace(whole, held=tuple(held), beside=beside, small=tuple(small))


def _with_half_norms(shape: Any, tokens: Tokens, kept: Kept) -> Kept:
    """With half weights and no masters residuals are half, and so are the inputs of norms, which autocast keeps in fp32: one a layer's part, and one
    of the embeddings or behind the last layer."""
    stacks = list(_stacks(shape, tokens))
    less = [2 * (2 + stack.is_decoder) * stack.part.hidden_size * stack.num_tokens for stack in stacks for _ in range(stack.num_layers)]
    whole = tuple(max(0, one - each) for one, each in zip(kept.whole, less, strict=True))
    of_ends = 2 * sum(stack.part.hidden_size * stack.num_tokens for stack in stacks)
    return replace(kept, whole=whole, held=whole, rest=max(kept.rest // 2, kept.rest - of_ends))


def _with_shared_gradients(chosen: Architecture, shape: Any, kept: Kept, kept_in: str) -> Kept:
    """Where all layers have the same weights, their gradients are added up beside the old ones until the first layer's are there."""
    another = replace(shape, num_layers=shape.num_layers + 1)
    if not shape.num_layers or chosen.num_parameters(another) != chosen.num_parameters(shape):
        return kept
    matrix = shape.hidden_size * shape.intermediate_size
    added = _NUMBER[kept_in] * (4 * shape.hidden_size**2 + 2 * matrix + matrix)  # attention, the feed-forward part, and what is being added
    return replace(kept, working=(*(one + added for one in kept.working[:-1]), kept.working[-1] + _NUMBER[kept_in] * matrix))


def _with_storages(chosen: Architecture, tokens: Tokens, kept_in: str, kept: Kept, stacks: Sequence[_Stack], *, packed: bool) -> Kept:
    """Of each layer, and of the rest, what lies in small storages."""
    precision, known, small, dropped = _as_recorded(kept_in), dict[int, tuple[float, int]](), [], []
    for stack, held in zip(stacks, kept.held, strict=True):
        if id(stack) not in known:
            share = stack.num_tokens / max(1, tokens.num)
            one_by_one = () if packed or chosen.lanes else tuple(max(1, round(length * share)) for length in tokens.lengths)

            def bytes_of(part: Any, stack: _Stack = stack, share: float = share) -> float:
                more = chosen.activation_bytes(stack.rebuild(replace(part, **{stack.counter: stack.num_layers + 1})), tokens.lengths, precision)
                return share * (more - chosen.activation_bytes(stack.rebuild(part), tokens.lengths, precision))

            layer = Layer(stack.part, bytes_of, stack.num_tokens, one_by_one, 2 if stack.is_decoder else 1, _NUMBER[kept_in], bool(chosen.layer_bytes))
            known[id(stack)] = small_bytes(layer) / max(1.0, bytes_of(stack.part)), dropped_bytes(layer)
        part, of_scores = known[id(stack)]
        small.append(round(min(1.0, part) * held))
        dropped.append(of_scores)
    widest = max((4 * stack.part.hidden_size * stack.num_tokens for stack in stacks), default=0)
    gradients = [2 * _NUMBER[kept_in] * (stack.part.intermediate_size + stack.part.hidden_size) * stack.num_tokens for stack in stacks]
    replaced = tuple(max(one + more, other) for one, more, other in zip(kept.working, dropped, gradients, strict=True))
    return replace(kept, small=tuple(small), small_rest=kept.rest if widest < SIZE_BYTES else 0, replaced=replaced)


def _nothing(part: Any, num_attentions: int, *, has_streams: bool) -> tuple[int, int]:
    return 0, 0


def _attention(part: Any, num_attentions: int, *, has_streams: bool) -> tuple[int, int]:
    return num_attentions * attention_size(part), 0


def _narrow(part: Any, num_attentions: int, *, has_streams: bool) -> tuple[int, int]:
    return num_attentions * attention_size(part), part.hidden_size


def _half(part: Any, num_attentions: int, *, has_streams: bool) -> tuple[int, int]:
    """Keys (which the layer keeps anyway) and results of attentions, and the second product of the feed-forward part; with two streams
    other products have the odd places: values, queries and the wide ones."""
    keys = num_attentions * attention_size(part)
    if has_streams:
        return keys, 2 * part.hidden_size + part.intermediate_size
    return 2 * keys, (num_attentions + 1) * part.hidden_size


KEEPS: dict[str, Callable[..., tuple[int, int]]] = {
    "nothing": _nothing,
    "attention": _attention,
    "attention_and_narrow": _narrow,
    "attention_and_half": _half,
}
"""Numbers a token that a recomputed layer keeps beside its input, by policy: those that the layer itself needs, and those it does not."""


def attention_size(part: Any) -> int:
    """Width of all heads together."""
    head_size = getattr(part, "head_size", None) or part.hidden_size // part.num_heads
    return int(part.num_heads * head_size)


def _own(chosen: Architecture, shape: Any, tokens: Tokens, kept_in: str, recipe: Recipe) -> Kept:
    """As the record says."""
    assert chosen.layer_bytes is not None
    scale = 1.0 if kept_in != "half" else 2 / 3  # records take scores' gradients under autocast as 3 bytes a number
    kept_in = _as_recorded(kept_in)
    layers, working = chosen.layer_bytes(shape, tokens.lengths, kept_in, recipe.objective)
    rest = max(0, chosen.activation_bytes(shape, tokens.lengths, kept_in) - sum(chosen.layer_bytes(shape, tokens.lengths, kept_in, None)[0]))
    # Its new memory is cut from the old and the new together.
    return Kept(tuple(layers), tuple(layers), rest, tuple(round(scale * one) for one in working), round(3.5 * _finish(chosen, shape, tokens)))


def _by_difference(chosen: Architecture, shape: Any, tokens: Tokens, kept_in: str) -> Kept:
    """A layer keeps what one more would add."""
    width, size, kept_in = _WIDTH["bf16" if chosen.wide_residuals and kept_in == "half" else kept_in], _NUMBER[kept_in], _as_recorded(kept_in)
    everything = chosen.activation_bytes(shape, tokens.lengths, kept_in)
    layers, working, rest = [], [], float(everything)
    for stack in _stacks(shape, tokens):
        layer = chosen.activation_bytes(stack.with_another, tokens.lengths, kept_in) - everything
        own = float(layer)
        rest -= stack.num_layers * layer
        if stack.num_tokens != tokens.num:
            # A decoder: keys and values of the attention to the encoder are as many as that has tokens.
            own = layer * stack.num_tokens / max(1, tokens.num) + 2 * size * attention_size(stack.part) * (tokens.num - stack.num_tokens)
        layers += [round(own)] * stack.num_layers
        working += [round((_LANE_GRADIENTS if chosen.lanes else _GRADIENTS) * width * stack.part.hidden_size * stack.num_tokens)] * stack.num_layers
    if tokens.num_decoder is not None:
        alone = replace(shape, num_decoder_layers=0)
        of_encoder = chosen.activation_bytes(alone, tokens.lengths, kept_in) - sum(layers[: shape.num_layers])
        rest = of_encoder + (rest - of_encoder) * tokens.num_decoder / max(1, tokens.num)
    return Kept(tuple(layers), tuple(layers), max(0, round(rest)), tuple(working), _finish(chosen, shape, tokens))


def _as_recorded(kept_in: str) -> str:
    """Records know fp32 and autocast."""
    return "bf16" if kept_in == "half" else kept_in


def _finish(chosen: Architecture, shape: Any, tokens: Tokens) -> int:
    """With lanes, the inputs of all layers side by side, of which the new memory is cut."""
    return 4 * shape.hidden_size * shape.num_layers * tokens.num if chosen.lanes else 0


@dataclass(frozen=True)
class _Stack:
    """Layers of one kind."""

    num_layers: int
    part: Any
    """The shape that has them."""
    with_another: Any
    """The whole shape with one more of them."""
    num_tokens: int
    is_decoder: bool
    counter: str
    """The field of the shape that says how many layers there are."""
    rebuild: Callable[[Any], Any]
    """The whole shape with another in place of `part`."""


def _stacks(shape: Any, tokens: Tokens) -> Iterator[_Stack]:
    """Each stack of layers, those within other shapes first."""
    values = [(field.name, getattr(shape, field.name)) for field in dataclasses.fields(shape)]
    for name, value in values:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            for stack in _stacks(value, tokens):
                rebuild = functools.partial(_rebuilt_within, shape, name, stack.rebuild)
                yield replace(stack, with_another=replace(shape, **{name: stack.with_another}), rebuild=rebuild)
    for name, value in values:
        if name in _LAYER_COUNTS and value:
            is_decoder = name == "num_decoder_layers"
            num_tokens = tokens.num_decoder if is_decoder and tokens.num_decoder is not None else tokens.num
            yield _Stack(value, shape, replace(shape, **{name: value + 1}), num_tokens, is_decoder, name, lambda part: part)


def _rebuilt_within(shape: Any, name: str, rebuild: Callable[[Any], Any], part: Any) -> Any:
    return replace(shape, **{name: rebuild(part)})
