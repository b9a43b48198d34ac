"""Saved tensors in bf16: which, how often, and how far off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prottrans_hpc.memory.hooks import AS_IS, Hooks, applied
from prottrans_hpc.memory.narrowing import SMALLEST_BYTES, narrowing

NUMBER = SMALLEST_BYTES // 4


ComesBack = Callable[..., tuple[Tensor, ...]]


@pytest.fixture
def come_back(keep: Any) -> ComesBack:
    """What the backward pass gets of tensors that are saved with hooks."""

    def saved(*tensors: Tensor, hooks: Hooks) -> tuple[Tensor, ...]:
        with applied(hooks):
            loss = keep.apply(*tensors)
        loss.backward()
        return keep.seen.pop()

    return saved


def counting() -> tuple[Hooks, list[Tensor]]:
    """Hooks that note what they are given."""
    given: list[Tensor] = []

    def pack(tensor: Tensor) -> Any:
        given.append(tensor)
        return AS_IS.pack(tensor)

    return Hooks(pack, AS_IS.unpack), given


def test_large_fp32_tensors_are_rounded_and_all_others_are_not(come_back: ComesBack) -> None:
    wide = torch.randn(4, NUMBER)
    source = (wide + 0).requires_grad_()
    inner, given = counting()
    weight = nn.Parameter(torch.randn(NUMBER, 2))
    others = (torch.randn(NUMBER - 1), torch.arange(NUMBER), torch.randn(NUMBER, dtype=torch.float64), weight.t(), torch.randn(NUMBER).bfloat16())
    views = ((source * 1), *others)
    found = come_back(*views, hooks=narrowing(inner=inner))
    assert torch.equal(found[0], wide.bfloat16().float())
    assert all(torch.equal(one, other) for one, other in zip(found[1:], others, strict=True))
    assert [tensor.dtype for tensor in given].count(torch.bfloat16) == 2, "the rounded one, and the one that was narrow before"


def test_views_are_rounded_once_and_keep_their_shapes(come_back: ComesBack) -> None:
    source = torch.randn(6, NUMBER, requires_grad=True)
    rows = source * 1
    inner, given = counting()
    first, second = rows.chunk(2)
    views = (rows, first, second, rows.t(), rows[::2], rows.view(3, 2, NUMBER).transpose(0, 1))
    expected = [(view.detach().bfloat16().float(), view.shape) for view in views]
    found = come_back(*views, hooks=narrowing(inner=inner))
    assert [tensor.dtype for tensor in given] == [torch.bfloat16]
    assert all(torch.equal(one, values) and one.shape == shape for one, (values, shape) in zip(found, expected, strict=True))


def test_of_a_small_part_the_whole_is_not_rounded(come_back: ComesBack) -> None:
    source = torch.randn(40, NUMBER, requires_grad=True)
    rows = source * 1
    (found,) = come_back(rows[3], hooks=narrowing())
    assert torch.equal(found, rows.detach()[3])


def test_the_rounding_is_what_the_docstring_says(come_back: ComesBack) -> None:
    values = torch.randn(4 * NUMBER)
    (found,) = come_back(values.clone().requires_grad_() * 1, hooks=narrowing())
    assert 2.0**-9 < float(((found.detach() - values) / values).abs().max()) <= 2.0**-8


def test_what_is_changed_in_place_is_found() -> None:
    source = torch.ones(NUMBER, requires_grad=True)
    with applied(narrowing()):
        rows = source * 1
        loss = rows.exp().sum() + (rows * rows).sum()
    rows.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
