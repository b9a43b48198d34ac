"""What a recomputed layer keeps beside its inputs: nothing, the results of attention, or those and some of its matrix products.

`recompute` is `torch.utils.checkpoint.checkpoint`; within `keeping(...)` it keeps what the named policy chooses. Attention is most of the work of
a layer over long sequences, and its result one row of the hidden width a token; a product that narrows (the second of the feed-forward part)
costs four times what another of the same result does, so keeping those buys the most time a byte.

torch's own `create_selective_checkpoint_contexts` counts every operation and fails where the second run makes other ones, as under autocast,
whose cache of cast weights is gone by then. Here the operations that may be kept are counted alone, kept tensors take the way of the other
saved ones (`hooks`), and a backward pass may run again.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from . import hooks

Result = TypeVar("Result")

Chooses = Callable[[int, tuple[Any, ...]], bool]
"""(how many matrix products were before it in the layer, its arguments) -> whether its result is kept."""


def _every_second(number: int, _arguments: tuple[Any, ...]) -> bool:
    return number % 2 == 1


def _narrows(_number: int, arguments: tuple[Any, ...]) -> bool:
    weight = arguments[-1]
    return bool(weight.shape[1] < weight.shape[0])


PRODUCTS: dict[str, Chooses | None] = {
    "attention": None,
    "attention_and_narrow": _narrows,
    "attention_and_half": _every_second,
}
"""By policy, which products of the hidden states with a weight are kept beside the attention's results."""

_MATRIX_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
"""What a linear layer is, its weight the last argument."""

_ATTENTION = (
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_flash_attention_forward",
    "aten::_efficient_attention_forward",
    "torch_attn::_varlen_attn",
)
"""The fused kernels of torch; attention written out in products says itself what its result is (`kept`)."""


@functools.cache
def _is_attention(operation: Any) -> bool:
    schema = getattr(operation, "_schema", None)  # operations of higher order have none
    return schema is not None and schema.name in _ATTENTION


@functools.cache
def _place_of_dropout(operation: Any) -> int | None:
    names = [argument.name for argument in operation._schema.arguments]
    return names.index("dropout_p") if "dropout_p" in names else None


def _draws(operation: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether it draws random numbers: those after it would be others if it were not run again."""
    place = _place_of_dropout(operation)
    share = named.get("dropout_p", arguments[place] if place is not None and place < len(arguments) else 0.0)
    return bool(share > 0.0)


class _Region:
    """One call of a recomputed layer: what it kept in the first run, for the second."""

    def __init__(self, chooses: Chooses | None) -> None:
        self.chooses = chooses
        self.hooks = hooks.current()
        self.kept: list[Any] = []

    def keep(self, result: Any) -> None:
        leaves, nest = tree_flatten(result)
        self.kept.append((nest, [(isinstance(leaf, Tensor), self.hooks.pack(_detached(leaf)) if isinstance(leaf, Tensor) else leaf) for leaf in leaves]))

    def recall(self, place: int) -> Any:
        nest, leaves = self.kept[place]
        # A fresh alias each time: it gets a place in the graph of this run.
        return tree_unflatten([_detached(self.hooks.unpack(value)) if is_tensor else value for is_tensor, value in leaves], nest)


def _detached(tensor: Tensor) -> Tensor:
    # The tensor itself gets its place in the graph after this and would keep the graph alive. Its counter of versions is shared (see hooks).
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.policy: str | None = None
        self.run: _Run | None = None


_now = _OfThread()


class _Run(TorchDispatchMode):  # type: ignore[no-untyped-call] # of torch
    """The first or the second run of a region; sees every operation of it."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled functions within stay compiled."""
        return True

    def __init__(self, region: _Region, *, is_second: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # of torch
        self._region, self._is_second = region, is_second
        self._products = self._place = 0
        self._is_inside = self.marks_products = False
        self._outer: list[_Run | None] = []

    def __enter__(self) -> Any:
        self._products = self._place = 0  # a backward pass with retain_graph comes here again
        self._outer.append(_now.run)
        _now.run = self
        return super().__enter__()  # type: ignore[no-untyped-call] # of torch

    def __exit__(self, *error: Any) -> None:
        _now.run = self._outer.pop()
        super().__exit__(*error)  # type: ignore[no-untyped-call] # of torch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if self._is_inside or not self._is_kept(func, args, named):
            return func(*args, **named)
        return self.once(lambda: func(*args, **named))

    def _is_kept(self, func: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> bool:
        if func in _MATRIX_PRODUCTS and self._region.chooses:
            self._products += 1
            return self._region.chooses(self._products - 1, arguments)
        if func is torch.ops.aten.bmm.default:
            return self.marks_products
        return _is_attention(func) and not _draws(func, arguments, named)

    def once(self, compute: Callable[[], Result]) -> Result:
        """What `compute` returns, a tensor or a nest of them: computed in the first run, taken from there in the second."""
        self._place += 1
        if self._is_second:
            recalled: Result = self._region.recall(self._place - 1)
            return recalled
        self._is_inside = True
        try:
            result = compute()
        finally:
            self._is_inside = False
        self._region.keep(result)
        return result


def _contexts(policy: str) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    region = _Region(PRODUCTS[policy])
    return _Run(region, is_second=False), _Run(region, is_second=True)


@contextlib.contextmanager
def keeping(policy: str) -> Iterator[None]:
    """Within it, and in this thread, `recompute` keeps what the policy, a key of PRODUCTS, chooses."""
    outer, _now.policy = _now.policy, policy
    try:
        yield
    finally:
        _now.policy = outer


def recompute(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the function, keep its arguments and what the policy in force says, and compute the rest again for the gradient.

    Gradients are bit for bit those of a plain call as long as the function makes the same tensors twice. What it draws at random is drawn again alike.
    """
    if _now.policy is None:
        return checkpoint(function, *arguments, use_reentrant=False)
    return checkpoint(function, *arguments, use_reentrant=False, context_fn=functools.partial(_contexts, _now.policy))


def kept(compute: Callable[[], Result]) -> Result:
    """The result of attention that is written out in products: in a layer that keeps these, computed once.

    `compute` returns tensors without gradient, as within the forward pass of an autograd function, and draws nothing at random.
    """
    return compute() if _now.run is None else _now.run.once(compute)


def last_product(weights: Tensor, values: Tensor) -> Tensor:
    """`torch.bmm(weights, values)` with gradients, the last product of attention that is written out: in a layer that keeps these, made once.

    The weights are computed again all the same, as its gradient needs them.
    """
    run = _now.run
    if run is None:
        return torch.bmm(weights, values)
    run.marks_products = True
    try:
        return torch.bmm(weights, values)
    finally:
        run.marks_products = False
