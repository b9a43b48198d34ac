"""What recomputed layers keep: gradients are those of a plain call, and what was kept is not computed again."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from prottrans_hpc.memory import keeping

FLASH = "_scaled_dot_product_flash_attention_for_cpu"


class Layer(nn.Module):
    """Attention and a feed-forward part of six products, as in BERT."""

    def __init__(self, width: int = 32, dropout: float = 0.0, inplace: bool = False) -> None:
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(width, width) for _ in range(4)] + [nn.Linear(width, 4 * width), nn.Linear(4 * width, width)])
        self.dropout, self.inplace = dropout, inplace

    def forward(self, rows: Tensor) -> Tensor:
        query, key, value = (linear(rows).unflatten(-1, (4, -1)).transpose(0, 1)[None] for linear in self.linears[:3])
        attended = functional.scaled_dot_product_attention(query, key, value)[0].transpose(0, 1).flatten(1)
        rows = rows + functional.dropout(self.linears[3](attended), self.dropout)
        inner = functional.relu(self.linears[4](rows), inplace=self.inplace)
        return rows + self.linears[5](inner).tanh()


class Counting(TorchDispatchMode):
    """How often each operation was made."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def gradients(layers: nn.ModuleList, rows: Tensor, policy: str | None, *, backwards: int = 1) -> tuple[list[Tensor], Counter[str]]:
    torch.manual_seed(5)
    layers.zero_grad()
    hidden = rows
    with keeping.keeping(policy) if policy else torch.enable_grad():
        for layer in layers:
            hidden = keeping.recompute(layer, hidden) if policy != "plain" else layer(hidden)
    loss = hidden.square().sum()
    with Counting() as counting:
        for number in range(backwards):
            loss.backward(retain_graph=number < backwards - 1)
    return [parameter.grad.clone() for parameter in layers.parameters() if parameter.grad is not None], counting.counts


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("policy", "flash", "products"),
    [(None, 2, 12), ("attention", 0, 12), ("attention_and_narrow", 0, 10), ("attention_and_half", 0, 6)],
)
def test_gradients_are_equal_and_what_is_kept_is_not_made_again(policy: str | None, flash: int, products: int, dropout: float) -> None:
    torch.manual_seed(1)
    layers = nn.ModuleList([Layer(dropout=dropout), Layer(dropout=dropout)])
    rows = torch.randn(20, 32)
    torch.manual_seed(5)
    layers.zero_grad()
    hidden = rows
    for layer in layers:
        hidden = layer(hidden)
    hidden.square().sum().backward()
    expected = [parameter.grad.clone() for parameter in layers.parameters() if parameter.grad is not None]
    found, counts = gradients(layers, rows, policy)
    assert len(found) == len(expected) == 24
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert (counts[FLASH], counts["addmm"]) == (flash, products)


@pytest.mark.parametrize("policy", keeping.PRODUCTS)
def test_a_backward_pass_may_run_again(policy: str) -> None:
    layers, rows = nn.ModuleList([Layer()]), torch.randn(20, 32)
    once, _ = gradients(layers, rows, policy)
    twice, _ = gradients(layers, rows, policy, backwards=2)
    assert all(torch.equal(2 * one, two) for one, two in zip(once, twice, strict=True))


def test_a_kept_product_that_is_changed_in_place_is_an_error() -> None:
    """Its value is lost: autograd, which saved the result of the relu and not the product, had not needed it."""
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: a torch\.float32 tensor of shape"):
        gradients(nn.ModuleList([Wide()]), torch.randn(20, 32), "attention_and_narrow")


class Wide(nn.Module):
    """A product that narrows, changed in place by what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(32, 8)
        self.up = nn.Linear(8, 8)

    def forward(self, rows: Tensor) -> Tensor:
        return self.up(functional.relu(self.down(rows), inplace=True))


def test_nothing_is_kept_alive_and_no_policy_stays_behind_after_an_error() -> None:
    layer, rows = Layer(), torch.randn(20, 32)

    def fails(hidden: Tensor) -> Tensor:
        layer(hidden)
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"), keeping.keeping("attention"):
        keeping.recompute(fails, rows)
    assert keeping._now.policy is None
    assert keeping._now.run is None

    with keeping.keeping("attention_and_half"):
        result = keeping.recompute(layer, rows)
    region = [weakref.ref(one) for one in gc.get_objects() if type(one) is keeping._Region]
    assert len(region) == 1
    result.sum().backward()
    del result
    gc.collect()
    assert region[0]() is None


def test_attention_that_draws_is_computed_again() -> None:
    """Else what is drawn after it would be other numbers in the second run."""
    operation = torch.ops.aten._flash_attention_forward.default
    arguments = (None, None, None, None, None, 3, 3)
    assert keeping._is_attention(operation)
    assert not keeping._draws(operation, (*arguments, 0.0), {})
    assert keeping._draws(operation, (*arguments, 0.1), {})
    assert keeping._draws(torch.ops.aten._scaled_dot_product_flash_attention.default, (None, None, None), {"dropout_p": 0.1})
    assert not keeping._draws(torch.ops.aten._scaled_dot_product_flash_attention.default, (None, None, None), {})


def test_the_kernels_that_count_as_attention_exist() -> None:
    import torch.nn.attention.varlen

    known = {schema.name for schema in torch._C._jit_get_all_schemas()}
    assert set(keeping._ATTENTION) - known == set()
