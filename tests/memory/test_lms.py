"""Large model support in accounting mode: same gradients, the right storages moved, and nothing left behind."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prottrans_hpc.errors import ResourceError
from prottrans_hpc.memory import lms as module
from prottrans_hpc.profile.storage_tracker import StorageTracker

KIB = 1024


@pytest.mark.parametrize("ahead", [0, 20 * KIB, 1 << 30])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_foreign_model_has_equal_gradients_and_what_exceeds_the_limit_travels_once(
    share: float, ahead: int, support: Any, transformer: Any, gradients: Any, assert_nothing_is_left: Any
) -> None:
    model = transformer()
    expected = gradients(model, model)
    everything = support(1 << 40)
    gradients(model, everything(model))
    total = everything.counts().on_device.bytes["all"].peak
    largest = 4 * 16 * 64 * 4  # the widest activation, bytes
    lms = support(int(total * share), ahead_bytes=ahead)
    found = gradients(model, lms(model))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    counts = lms.counts()
    assert total - lms.limit_bytes <= counts.reclaimed_bytes <= max(0, total - lms.limit_bytes) + largest if share < 1 else counts.reclaimed == 0
    # One more while it is being saved, one more that is wanted at once.
    assert counts.on_device.bytes["all"].peak <= max(lms.limit_bytes, ahead) + 2 * largest
    if ahead > total:
        assert counts.fetched_late <= 1, "what the backward pass begins with"
    assert_nothing_is_left(lms)


class Journal:
    """Notes what travels, by the first number in it."""

    def __init__(self, transfer: Any) -> None:
        self.pinned, self.inner, self.outs, self.backs = False, transfer, [], []

    def written(self) -> None:
        return None

    def out(self, device_bytes: Tensor, block: Any, written: None) -> None:
        self.outs.append(float(device_bytes.view(torch.float32)[0]))
        self.inner.out(device_bytes, block, written)

    def back(self, block: Any, num_bytes: int, is_out: None, device: torch.device) -> tuple[Tensor, None]:
        self.backs.append(float(block.bytes[:4].view(torch.float32)[0]))
        return self.inner.back(block, num_bytes, is_out, device)

    def ready(self, device_bytes: Tensor, is_back: None) -> None:
        pass


def test_those_saved_first_are_moved_and_they_come_back_last(monkeypatch: pytest.MonkeyPatch, support: Any, assert_nothing_is_left: Any) -> None:
    journals: list[Journal] = []
    plain = module.DirectTransfer
    monkeypatch.setattr(module, "DirectTransfer", lambda: journals.append(Journal(plain())) or journals[-1])
    lms, weight = support(3 * 4 * KIB, ahead_bytes=0), torch.ones((), requires_grad=True)
    total = torch.zeros(())
    with lms:
        for number in range(8):
            total = total + (weight * torch.full((KIB,), float(number))).sum()
    assert journals[0].outs == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert lms.counts().sources == {"freelist": 3, "reclaim_one": 5}
    total.backward()
    assert journals[0].backs == [4.0, 3.0, 2.0, 1.0, 0.0]
    assert lms.counts().fetched_late == 0
    assert float(weight.grad or 0) == KIB * sum(range(8))
    assert_nothing_is_left(lms)


def test_tensors_of_one_storage_travel_together_and_come_back_as_views_of_one(support: Any, keep: Any, assert_nothing_is_left: Any) -> None:
    lms, source = support(), torch.arange(96.0, requires_grad=True)
    with lms:
        rows = (source * 1).view(8, 12)
        first, second, third = rows.chunk(3, dim=1)
        views = (first, second, third.t(), rows[::2, 3:7], rows[0], rows.view(torch.int32)[1:])
        loss = keep.apply(*views) + keep.apply(rows)
    expected = [view.detach().clone() for view in views]
    strides = [(view.stride(), view.storage_offset()) for view in views]
    assert (lms.counts().reclaimed, lms.counts().reclaimed_bytes) == (1, 4 * 96)
    del rows, first, second, third, views
    loss.backward()
    found = next(seen for seen in keep.seen if len(seen) == 6)
    assert len({tensor.untyped_storage()._cdata for tensor in (*found, *next(seen for seen in keep.seen if len(seen) == 1))}) == 1
    assert [(view.stride(), view.storage_offset()) for view in found] == strides
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    del found
    keep.seen.clear()
    del loss
    assert_nothing_is_left(lms)


def test_parameters_their_views_small_and_unusual_tensors_stay(support: Any, assert_nothing_is_left: Any) -> None:
    module, bare = nn.Linear(64, 64), torch.ones(64, 64)
    lms = support(size_bytes=4 * 64 * 8, parameters=[bare])
    rows = torch.ones(4, 64, requires_grad=True)
    with lms:
        saved = [rows @ module.weight.t(), rows.detach().mul(2).requires_grad_() @ bare[1:].t(), torch.sparse.mm(torch.eye(4).to_sparse(), module(rows))]
        saved.append((module.weight.view(32, 128) * module.weight.detach().view(32, 128)).sum())
    assert lms.counts().on_device.number["all"].allocated == 1, "a detached copy of a parameter's own: no longer known as one"
    sum(one.sum() for one in saved).backward()
    del saved
    assert_nothing_is_left(lms)


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_what_is_changed_in_place_is_found_as_autograd_finds_it(limit: int, support: Any, assert_nothing_is_left: Any) -> None:
    def changed(x: Tensor, *, before: bool) -> Tensor:
        y = x * 1
        view = y[2:]
        if before:
            view.mul_(2)
        z = y.exp() * y
        if not before:
            view.mul_(2)
        return z.sum()

    source, lms = torch.ones(64, requires_grad=True), support(limit)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        changed(source, before=False).backward()
    with lms:
        wrong = changed(source, before=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        wrong.backward()
    del wrong
    with lms:
        right = changed(source, before=True)
    right.backward()
    assert source.grad is not None
    assert torch.equal(source.grad[2:], torch.full((62,), 2 * 3 * torch.e**2)) or torch.allclose(source.grad[2:], torch.full((62,), 2 * 3 * torch.e**2))
    del right
    assert_nothing_is_left(lms)


def test_a_storage_that_was_changed_between_two_savings_is_two(support: Any) -> None:
    lms, source = support(), torch.ones(64, requires_grad=True)
    with lms:
        noise = torch.full((64,), 3.0)
        first = (source * noise).sum()
        second_noise = noise.clone()
        second = (source * second_noise).sum()
        third = (source * second_noise.mul_(1)).sum()
    assert lms.counts().reclaimed == 3
    (first + second.detach()).backward()
    with pytest.raises(RuntimeError, match="version 1; expected version 0"):
        second.backward()
    third.backward()
    assert source.grad is not None
    assert torch.equal(source.grad, torch.full((64,), 6.0))


def test_nothing_is_kept_alive(support: Any, assert_nothing_is_left: Any) -> None:
    lms, source = support(), torch.ones(KIB, requires_grad=True)
    with lms:
        inner = source.sin()
        alive = weakref.ref(inner.untyped_storage())
        loss = inner.exp().sum()
        del inner
    assert alive() is None, "moved"
    assert lms.pool.bytes_in_use > 0
    handle = weakref.ref(lms)
    del loss  # never had a backward pass
    assert_nothing_is_left(lms)
    del lms
    gc.collect()
    assert handle() is None


def test_no_more_host_memory_is_an_error_that_says_what_to_do(support: Any, assert_nothing_is_left: Any) -> None:
    lms = support()
    with pytest.raises(ResourceError, match="raise its limit on the device"):
        lms.pool.take(1 << 60)
    assert_nothing_is_left(lms)


def test_blocks_are_used_again_in_the_next_step(support: Any, transformer: Any, gradients: Any) -> None:
    model, lms = transformer(), support(10 * KIB)
    gradients(model, lms(model))
    first = lms.pool.bytes_in_all
    for _ in range(3):
        gradients(model, lms(model))
    assert lms.pool.bytes_in_all == first > 0
    lms.trim()
    assert lms.pool.bytes_in_all == 0


def test_a_tracker_of_storages_sees_the_device_and_not_the_host(support: Any) -> None:
    """What is moved is gone for it, and what comes back is there, so that a CPU shows the peak that a GPU would have."""
    lms, weight = support(ahead_bytes=0), torch.ones((), requires_grad=True)
    with StorageTracker(weight) as tracker:
        with lms:
            total = sum((weight * torch.full((16 * KIB,), float(number))).sum() for number in range(8))
        assert tracker.live_bytes < 64 * KIB, "each of the eight has so many"
        tracker.reset_peak()
        total.backward()
        assert 64 * KIB <= tracker.peak_bytes < 4 * 64 * KIB
    assert lms.counts().reclaimed_bytes == 8 * 64 * KIB


def test_tensors_of_a_cpu_move_where_there_is_a_gpu_too(monkeypatch: pytest.MonkeyPatch, transformer: Any, gradients: Any, assert_nothing_is_left: Any) -> None:
    """Each goes as its own device has it; page-locked memory is for those of a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    lms, model = module.LargeModelSupport(size_bytes=1), transformer()
    expected = gradients(model, model)
    assert all(torch.equal(one, other) for one, other in zip(gradients(model, lms(model)), expected, strict=True))
    assert lms.counts().reclaimed > 4
    assert lms.devices() == [torch.device("cpu")]
    assert_nothing_is_left(lms)
