"""What becomes of tensors saved for the backward pass while a policy is in force: torch's default saved-tensor hooks, and who set them.

torch applies the innermost hooks of a thread alone, and a recomputed layer brings its own. What such a layer keeps on purpose must
take the way of the other saved tensors all the same, so the hooks of this package are remembered here.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Hooks:
    """One way of saving tensors."""

    pack: Callable[[Tensor], Any]
    """From the tensor to what autograd holds in its place."""
    unpack: Callable[[Any], Tensor]
    """Back again; may run on any thread, and more than once."""


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.stack: list[Hooks] = []


_in_force = _OfThread()


@contextlib.contextmanager
def applied(hooks: Hooks) -> Iterator[None]:
    """Operations of this thread save their tensors so. The backward pass may run outside."""
    _in_force.stack.append(hooks)
    try:
        with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
            yield
    finally:
        _in_force.stack.pop()


def current() -> Hooks:
    """Those in force in this thread; `AS_IS` where none are."""
    return _in_force.stack[-1] if _in_force.stack else AS_IS


@dataclass(frozen=True)
class Version:
    """Tells whether a tensor was changed in place since, without keeping its data alive: autograd checks that only of what it holds itself."""

    probe: Tensor
    number: int

    @classmethod
    def of(cls, tensor: Tensor) -> Version:
        """The version that a tensor has now."""
        # Below autograd, where dispatch modes run, a detached tensor counts its versions alone unless this key takes part.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            probe = tensor.detach()
        probe.data = probe.new_empty(0)  # shares the counter of versions, no longer the data
        return cls(probe, tensor._version)

    def check(self, what: str) -> None:
        """Raises RuntimeError, as autograd does."""
        if self.probe._version != self.number:
            raise RuntimeError(
                f"one of the variables needed for gradient computation has been modified by an inplace operation: {what} "
                f"is at version {self.probe._version}; expected version {self.number} instead"
            )


def describe(tensor: Tensor) -> str:
    """How messages call a tensor."""
    return f"a {tensor.dtype} tensor of shape {list(tensor.shape)}"


def is_plain(tensor: Tensor) -> bool:
    """Whether it is a piece of one storage and nothing else: no subclass, not sparse, not lazily conjugated, not without data."""
    kind = type(tensor)
    return kind in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_conj() or tensor.is_neg())


@dataclass(frozen=True)
class _Held:
    tensor: Tensor
    version: Version | None


def _hold(tensor: Tensor) -> _Held:
    # Detached: a result that its own node saves would else keep that node, which keeps it, for ever.
    return _Held(tensor.detach(), Version.of(tensor) if is_plain(tensor) else None)


def _give(held: _Held) -> Tensor:
    if held.version is not None:
        held.version.check(describe(held.tensor))
    return held.tensor


AS_IS = Hooks(_hold, _give)
"""Holds the tensor itself and refuses one that was changed since."""
