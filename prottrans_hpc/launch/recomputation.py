"""What a forward pass keeps for the gradient under the recipe's memory policies, layer by layer. Pure arithmetic over an architecture's record.

A record says what a whole forward pass keeps; as that grows in proportion to layers, a layer keeps what one more would add.
Layers differ where a record says so (`layer_bytes`). In the backward pass layers are freed from the last to the first; one
that is recomputed is there whole for its own moment only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..architecture import Architecture
from ..recipe import Recipe

_LAYER_COUNTS = ("num_layers", "num_decoder_layers")
"""Fields of a shape, or of a shape within it, that say how often a layer is applied; every n-th application is recomputed."""
_GRADIENTS = 3.5
"""Hidden states in fp32 whose gradients a layer's backward pass has at once, beside what the layer keeps; measured on six families."""
_LANE_GRADIENTS = 6.5
"""The same of layers with a memory, whose keys are more than their tokens."""

_NARROW = {"fp32": (0.58, 0.48), "bf16": (0.86, 0.2)}
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


def kept_bytes(chosen: Architecture, shape: Any, tokens: Tokens, kept_in: str, recipe: Recipe) -> Kept:
    """What a micro batch keeps; `kept_in` is "fp32" or "bf16" (autocast)."""
    kept = _under_recomputation(chosen, shape, tokens, kept_in, recipe)
    if chosen.lane_bytes is not None:  # the new memory
        kept = replace(kept, rest=kept.rest + len(tokens.lengths) * chosen.lane_bytes(shape, max(tokens.lengths, default=0)))
    return kept if recipe.memory.saved == "as_is" else _narrowed(kept, kept_in)


def _narrowed(kept: Kept, kept_in: str) -> Kept:
    """fp32 numbers in bf16, but for statistics; while a layer is computed, some of its numbers are there in both."""
    share, both = _NARROW[kept_in]
    whole, held = (tuple(round(share * one) for one in layers) for layers in (kept.whole, kept.held))
    working = tuple(round(more + both * one) for more, one in zip(kept.working, kept.whole, strict=True))
    return replace(kept, rest=round(share * kept.rest), whole=whole, held=held, working=working, beside=round(share * kept.beside))


def _under_recomputation(chosen: Architecture, shape: Any, tokens: Tokens, kept_in: str, recipe: Recipe) -> Kept:
    memory = recipe.memory
    whole = _own(chosen, shape, tokens, kept_in, recipe) if chosen.layer_bytes else _by_difference(chosen, shape, tokens, kept_in)
    if not memory.recompute_every:
        return whole
    size, held, beside = 2 if kept_in == "bf16" else 4, list(whole.whole), 0
    layers = [(index, stack) for stack in _stacks(shape, tokens) for index in range(stack.num_layers)]
    for place, (index, stack) in enumerate(layers):
        if index % memory.recompute_every == 0:
            results, products = KEEPS[memory.recompute_keeps](stack.part, 2 if stack.is_decoder else 1, has_streams=chosen.layer_bytes is not None)
            # The input is fp32 at most; with the results there is a number a head for the softmax.
            input_bytes = 4 * stack.part.hidden_size + (4 * stack.part.num_heads if results else 0)
            held[place] = min(held[place], stack.num_tokens * (input_bytes + size * (results + products)))
            beside = max(beside, stack.num_tokens * size * products)
    return replace(whole, held=tuple(held), beside=beside)


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
    layers, working = chosen.layer_bytes(shape, tokens.lengths, kept_in, recipe.objective)
    rest = max(0, chosen.activation_bytes(shape, tokens.lengths, kept_in) - sum(chosen.layer_bytes(shape, tokens.lengths, kept_in, None)[0]))
    # Its new memory is cut from the old and the new together.
    return Kept(tuple(layers), tuple(layers), rest, tuple(working), round(3.5 * _finish(chosen, shape, tokens)))


def _by_difference(chosen: Architecture, shape: Any, tokens: Tokens, kept_in: str) -> Kept:
    """A layer keeps what one more would add."""
    everything, size = chosen.activation_bytes(shape, tokens.lengths, kept_in), 2 if kept_in == "bf16" else 4
    layers, working, rest = [], [], float(everything)
    width = 3.3 if size == 2 else 4.0  # some of the gradients are half, those of norms and residuals are not
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


def _stacks(shape: Any, tokens: Tokens) -> Iterator[_Stack]:
    """Each stack of layers, those within other shapes first."""
    values = [(field.name, getattr(shape, field.name)) for field in dataclasses.fields(shape)]
    for name, value in values:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            for stack in _stacks(value, tokens):
                yield replace(stack, with_another=replace(shape, **{name: stack.with_another}))
    for name, value in values:
        if name in _LAYER_COUNTS and value:
            is_decoder = name == "num_decoder_layers"
            num_tokens = tokens.num_decoder if is_decoder and tokens.num_decoder is not None else tokens.num
            yield _Stack(value, shape, replace(shape, **{name: value + 1}), num_tokens, is_decoder)
