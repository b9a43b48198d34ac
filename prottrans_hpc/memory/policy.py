"""The recipe's choices as one context around a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

from torch import Tensor

from ..recipe_memory import Memory
from .hooks import AS_IS, Hooks, applied
from .keeping import keeping
from .lms import LargeModelSupport
from .narrowing import narrowing
from .storages import Parameters

Context = Callable[[], AbstractContextManager[object]]
"""Makes a fresh context for one forward pass; the backward pass runs outside it."""


def around(forward: Context, memory: Memory, parameters: Iterable[Tensor] | Parameters) -> Context:
    """`forward` with the policies of `memory` in force; the same object where there are none."""
    saving = _saving(memory, parameters)
    if saving is AS_IS and memory.recompute_keeps == "nothing":
        return forward

    @contextlib.contextmanager
    def entered() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(forward())
            if saving is not AS_IS:
                stack.enter_context(applied(saving))
            if memory.recompute_keeps != "nothing":
                stack.enter_context(keeping(memory.recompute_keeps))
            yield

    return entered


def saves_otherwise(memory: Memory) -> bool:
    """Whether tensors that are saved become something else, so that it has to be known which are parameters."""
    return memory.lms_limit_gib is not None or memory.saved != "as_is"


def _saving(memory: Memory, parameters: Iterable[Tensor] | Parameters) -> Hooks:
    given = Parameters.of(parameters)
    moving = AS_IS
    if memory.lms_limit_gib is not None:
        moving = LargeModelSupport(int(memory.lms_limit_gib * 2**30), parameters=given).hooks
    return narrowing(given, inner=moving) if memory.saved == "bf16" else moving
