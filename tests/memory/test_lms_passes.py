"""Large model support in other company: errors, several passes, recomputed layers, bf16, threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prottrans_hpc.memory import keeping
from prottrans_hpc.memory.hooks import applied
from prottrans_hpc.memory.narrowing import narrowing

KIB = 1024


def test_an_error_in_either_pass_leaves_nothing_behind(support: Any, transformer: Any, assert_nothing_is_left: Any) -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradient: Tensor) -> Tensor:
            raise ValueError("backward on purpose")

    model, lms, rows = transformer(), support(8 * KIB, ahead_bytes=8 * KIB), torch.ones(2, 16, 32)
    with pytest.raises(ValueError, match="forward on purpose"), lms, lms:
        model(rows)
        raise ValueError("forward on purpose")
    assert lms._of_thread.entered == []
    with lms:
        loss = model(Fails.apply(rows * torch.ones(32, requires_grad=True))).sum()
    with pytest.raises(ValueError, match="backward on purpose"):
        loss.backward()
    del loss
    assert_nothing_is_left(lms)
    before = lms.counts().on_device.number["all"].allocated
    model(rows).sum().backward()
    assert lms.counts().on_device.number["all"].allocated == before, "it is no longer in force"


@pytest.mark.parametrize("limit", [0, 30 * KIB])
def test_a_backward_pass_may_run_again_under_the_same_limit(limit: int, support: Any, transformer: Any, gradients: Any, assert_nothing_is_left: Any) -> None:
    model = transformer()
    expected = gradients(model, model)
    lms = support(limit, ahead_bytes=0)
    torch.manual_seed(2)
    model.zero_grad()
    with lms:
        loss = model(torch.ones(4, 16, 32)).square().sum()
    for _ in range(3):
        model.zero_grad()
        loss.backward(retain_graph=True)
        assert all(torch.equal(parameter.grad, other) for parameter, other in zip(model.parameters(), expected, strict=True))
    assert lms.counts().on_device.bytes["all"].peak <= limit + 3 * 4 * 16 * 64 * 4
    del loss
    assert_nothing_is_left(lms)


def test_a_gradient_of_a_gradient(support: Any) -> None:
    source, found = torch.linspace(0, 1, 64, requires_grad=True), []
    for lms in (None, support()):
        with lms or torch.enable_grad():
            (first,) = torch.autograd.grad((source.sin() * source.exp()).sum(), source, create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), source)[0])
    assert torch.equal(found[0], found[1])


def test_with_recomputed_layers_and_in_bf16(support: Any, transformer: Any, gradients: Any, assert_nothing_is_left: Any) -> None:
    """What recomputed layers keep on purpose travels, too."""
    model = transformer(dropout=0.0)
    layers = list(model.layers)  # type: ignore[arg-type] # of torch

    def recomputing(policy: str | None, rows: Tensor) -> Tensor:
        for layer in layers:
            if policy is None:
                rows = checkpoint(layer, rows, use_reentrant=False)
            else:
                with keeping.keeping(policy):
                    rows = keeping.recompute(layer, rows)
        return rows

    expected = gradients(model, model)
    moved = {}
    for policy in (None, "attention", "attention_and_half"):
        lms = support()
        found = gradients(model, lms(lambda rows, policy=policy: recomputing(policy, rows)))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        moved[policy] = lms.counts().reclaimed_bytes
        assert_nothing_is_left(lms)
    assert moved[None] < moved["attention"] < moved["attention_and_half"]

    whole, half = support(), support()
    gradients(model, whole(model))
    with applied(narrowing(smallest_bytes=1, inner=half.hooks)):
        torch.manual_seed(2)
        loss = model(torch.ones(4, 16, 32)).square().sum()
    model.zero_grad()
    loss.backward()
    del loss
    assert half.counts().reclaimed_bytes == pytest.approx(0.5 * whole.counts().reclaimed_bytes, rel=0.05)
    assert_nothing_is_left(half)


def test_threads_share_one_limit_and_do_not_see_one_another(support: Any, transformer: Any, gradients: Any, assert_nothing_is_left: Any) -> None:
    lms, errors = support(20 * KIB, ahead_bytes=10 * KIB), list[str]()
    models = [transformer(dropout=0.0) for _ in range(4)]
    expected: list[list[Tensor]] = []

    def work(number: int) -> None:
        for _ in range(3):
            model = models[number]
            model.zero_grad()
            with lms:
                loss = model(torch.ones(4, 16, 32)).square().sum()
            elsewhere = threading.Thread(target=loss.backward)  # on another thread than its forward pass
            del loss
            elsewhere.start()
            elsewhere.join()
            del elsewhere
            if not all(torch.equal(parameter.grad, other) for parameter, other in zip(model.parameters(), expected[number], strict=True)):
                errors.append(f"other gradients in thread {number}")

    for model in models:
        expected.append(gradients(model, model))
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert lms.counts().reclaimed > 0
    assert_nothing_is_left(lms)


def test_everything_that_may_be_moved_goes_on_request(support: Any, transformer: Any, gradients: Any) -> None:
    model, lms = transformer(), support(1 << 30)
    torch.manual_seed(2)
    with lms:
        loss = model(torch.ones(4, 16, 32)).square().sum()
    held = lms.counts().on_device.bytes["all"].current
    assert lms.reclaim_inactive() == held > 0
    assert lms.counts().on_device.bytes["all"].current == 0
    assert lms.reclaim_inactive() == 0
    expected = gradients(model, model)
    model.zero_grad()
    loss.backward()
    assert all(torch.equal(parameter.grad, other) for parameter, other in zip(model.parameters(), expected, strict=True))
