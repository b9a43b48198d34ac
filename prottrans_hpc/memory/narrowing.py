"""Saved tensors in bf16: half the bytes of what fp32 layers keep for the backward pass. Gradients are no longer exact.

Rounding to bf16, which has 8 significant bits, changes a number by 2 ** -8 of itself at most. A gradient is made of products with saved numbers, so
each of its addends is off by about as much; as roundings are independent the whole is off by less. docs/lms.md has what was measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .divided import by_parts
from .hooks import AS_IS, Hooks, is_plain
from .storages import Catalogue, HasOrigin, Origin, Parameters, View, whole

SMALLEST_BYTES = 64 * 1024
"""Smaller tensors stay as they are: means, deviations and sums of a softmax are needed exactly and cost little."""


class _Narrow(HasOrigin):
    """A whole fp32 storage in bf16, saved in another way from there on."""

    def __init__(self, tensor: Tensor, inner: Hooks) -> None:
        super().__init__(Origin(tensor))
        self._inner, self._flat = inner, inner.pack(whole(tensor).to(torch.bfloat16))

    def flat(self) -> Tensor:
        """All of it, bf16."""
        return self._inner.unpack(self._flat)


@dataclass(frozen=True)
class _Saved:
    narrow: _Narrow
    view: View


def narrowing(parameters: Iterable[Tensor] | Parameters = (), *, smallest_bytes: int | None = None, inner: Hooks = AS_IS) -> Hooks:
    """Save fp32 tensors of `smallest_bytes` (SMALLEST_BYTES) or more in bf16, each storage once; parameters and all others as they are.

    `inner` takes what this way leaves to save, narrow or not (large model support, for one). A tensor that was changed in place since
    it was saved raises RuntimeError in the backward pass.
    """
    excluded, catalogue, smallest = Parameters.of(parameters), Catalogue[_Narrow](), SMALLEST_BYTES if smallest_bytes is None else smallest_bytes

    def pack(tensor: Tensor) -> Any:
        if not _is_wide(tensor, smallest) or excluded.has(tensor):
            return inner.pack(tensor)
        known = catalogue.find(tensor)
        if known is None:
            known = _Narrow(tensor, inner)
            catalogue.add(known)
        return _Saved(known, View.of(tensor))

    def unpack(saved: Any) -> Tensor:
        if not isinstance(saved, _Saved):
            return inner.unpack(saved)
        view = saved.view
        saved.narrow.origin.version.check(f"a tensor of shape {list(view.size)}, saved in bf16,")
        return saved.narrow.flat().as_strided(view.size, view.stride, view.offset).to(view.dtype)

    return by_parts(Hooks(pack, unpack), excluded.has)


def _is_wide(tensor: Tensor, smallest_bytes: int) -> bool:
    """Of a small part of a large storage the whole would be copied: autograd keeps the whole alive, too, but so may others."""
    if not is_plain(tensor) or tensor.dtype != torch.float32 or tensor.nbytes < smallest_bytes:
        return False
    return tensor.untyped_storage().nbytes() <= 4 * tensor.nbytes
