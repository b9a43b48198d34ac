"""Precision contexts: what runs in which type, and refusal where the hardware cannot."""

from __future__ import annotations

import pytest
import torch

from prottrans_hpc.errors import ConfigError
from prottrans_hpc.train.precision import CONTEXTS, forward_context

CPU = torch.device("cpu")


def test_there_is_a_context_for_every_precision_of_a_recipe():
    import typing

    from prottrans_hpc.recipe import Recipe

    assert set(typing.get_args(typing.get_type_hints(Recipe)["precision"])) == set(CONTEXTS)


@pytest.mark.parametrize(("precision", "product"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_weights_and_gradients_stay_fp32_while_products_take_the_precision(precision, product):
    layer = torch.nn.Linear(8, 8)
    make = forward_context(precision, CPU)
    for _ in range(2):
        with make():
            out = layer(torch.randn(4, 8))
        assert out.dtype == product
        out.float().sum().backward()
    assert layer.weight.dtype == layer.weight.grad.dtype == torch.float32


def test_bf16_is_near_fp32():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 64), torch.randn(16, 64)
    with forward_context("bf16", CPU)():
        low = layer(x)
    torch.testing.assert_close(low.float(), layer(x), rtol=2e-2, atol=2e-2)
    assert not torch.equal(low.float(), layer(x))


def test_a_gpu_without_bf16_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-16GB")
    with pytest.raises(ConfigError, match=r"Tesla V100.*fp32"):
        forward_context("bf16", torch.device("cuda", 0))
