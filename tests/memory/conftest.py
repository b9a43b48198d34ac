"""A foreign model, large model support of CPU tensors, and what must be left of it: nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from prottrans_hpc.memory.lms import LargeModelSupport


@pytest.fixture
def support() -> Callable[..., LargeModelSupport]:
    """Makes one in accounting mode, for tensors of any size."""

    def make(limit_bytes: int = 0, **settings: Any) -> LargeModelSupport:
        return LargeModelSupport(limit_bytes, **{"size_bytes": 1, **settings})

    return make


class Keep(torch.autograd.Function):
    """Saves what it is given, and shows what it gets back."""

    seen: ClassVar[list[tuple[Tensor, ...]]] = []

    @staticmethod
    def forward(ctx: Any, first: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(first, *others)
        return first.sum()

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Any:
        Keep.seen.append(ctx.saved_tensors)
        return torch.zeros_like(ctx.saved_tensors[0]), *[None] * (len(ctx.saved_tensors) - 1)


@pytest.fixture
def keep() -> type[Keep]:
    """An operation whose saved tensors a test can see: `keep.apply(...)`, and after the backward pass `keep.seen`."""
    Keep.seen.clear()
    return Keep


@pytest.fixture
def transformer() -> Callable[..., nn.Module]:
    """Makes torch's own, of three layers of 32."""

    def make(dropout: float = 0.1) -> nn.Module:
        torch.manual_seed(1)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=dropout, batch_first=True)
        return nn.TransformerEncoder(layer, num_layers=3, enable_nested_tensor=False).train()

    return make


@pytest.fixture
def gradients() -> Callable[..., list[Tensor]]:
    """Of a step of a model: `(model, what runs it)`."""

    def find(model: nn.Module, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(2)
        model.zero_grad()
        run(torch.ones(4, 16, 32)).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    return find


@pytest.fixture
def assert_nothing_is_left() -> Callable[[LargeModelSupport], None]:
    """Neither tensors nor blocks nor counts."""

    def check(lms: LargeModelSupport) -> None:
        gc.collect()
        counts = lms.counts()
        assert (counts.on_device.bytes["all"].current, counts.on_host.bytes["all"].current, counts.pinned.bytes["all"].current) == (0, 0, 0)
        assert lms.pool.bytes_in_use == 0
        assert len(lms._catalogue) == 0
        assert all(not device.movable and not device.spent and not device.departures.bytes for device in lms._devices.values())

    return check
