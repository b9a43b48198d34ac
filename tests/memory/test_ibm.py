"""IBM's interface: the calls and the statistics of its own test and example, on stock torch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from prottrans_hpc.memory import ibm

cuda: Any = torch.cuda


@pytest.fixture
def installed() -> Iterator[None]:
    """A fresh one, taken away afterwards."""
    ibm._process = None
    ibm.install()
    cuda.set_size_lms(1)
    yield
    ibm.uninstall()
    ibm._process = None


def step(model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    model(torch.ones(16, 64)).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.Tanh())))


def test_an_old_script_runs_and_computes_the_same(installed: None) -> None:
    trained = model()
    expected = step(trained)
    assert not cuda.get_enabled_lms()
    cuda.set_enabled_lms(True)
    cuda.set_limit_lms(3 * 4 * 16 * 64)
    assert (cuda.get_enabled_lms(), cuda.get_limit_lms(), cuda.get_size_lms()) == (True, 3 * 4 * 16 * 64, 1)
    before = cuda.memory_stats()
    found = step(trained)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    after = cuda.memory_stats(0)
    delta = {key: after[key] - before[key] for key in after}
    # Seven tensors of 4 KiB: the input and the result of each Tanh; each linear layer saves what its Tanh has saved.
    assert (delta["reclaimed"], delta["reclaimed_bytes"]) == (4, 4 * 4 * 16 * 64)
    assert delta["alloc_distribution.freelist"] + delta["alloc_distribution.reclaim_one"] == 7 + 4
    assert delta["pinned.all.allocated"] == delta["pinned.small_pool.freed"] == 7
    assert (after["pinned_bytes.all.current"], after["pinned_bytes.all.peak"] > 0) == (0, True)
    cuda.set_enabled_lms(False)
    step(trained)
    assert cuda.memory_stats()["reclaimed"] == after["reclaimed"]


def test_every_documented_key_is_there(installed: None) -> None:
    kinds = [
        f"{name}.{pool}.{kind}"
        for name in ("pinned", "pinned_bytes")
        for pool in ("all", "large_pool", "small_pool")
        for kind in ("current", "peak", "allocated", "freed")
    ]
    sources = ("freelist", "cudamalloc", "reclaim_one", "reclaim_fragments", "reclaim_all", "cudamalloc_retry")
    assert set(cuda.memory_stats()) >= {*kinds, "reclaimed", "reclaimed_bytes", *(f"alloc_distribution.{source}" for source in sources)}


def test_inactive_tensors_go_on_request_and_what_is_pinned_does_not(installed: None) -> None:
    """As IBM's own test has it: less is allocated, and as much is pinned."""
    trained = model()
    cuda.set_enabled_lms(True)
    cuda.set_limit_lms(1 << 30)
    loss = trained(torch.ones(16, 64)).sum()
    assert cuda.memory_stats()["reclaimed"] == 0
    held, pinned = ibm.support().counts().on_device.bytes["all"].current, cuda.memory_stats()["pinned_bytes.all.current"]
    cuda.reclaim_inactive()
    assert ibm.support().counts().on_device.bytes["all"].current == 0 < held
    assert cuda.memory_stats()["pinned_bytes.all.current"] == pinned
    assert cuda.memory_stats()["reclaimed_bytes"] == held
    loss.backward()
    cuda.reset_accumulated_memory_stats()
    cuda.reset_peak_memory_stats()
    assert {cuda.memory_stats()[key] for key in ("reclaimed", "pinned.all.allocated", "pinned.all.peak", "alloc_distribution.freelist")} == {0}


def test_each_thread_says_for_itself(installed: None) -> None:
    cuda.set_enabled_lms(True)
    cuda.set_enabled_lms(True)
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(cuda.get_enabled_lms()))
    thread.start()
    thread.join()
    assert seen == [False]
    cuda.set_enabled_lms(False)
    assert not cuda.get_enabled_lms()


def test_a_limit_below_nothing_is_refused(installed: None) -> None:
    with pytest.raises(ValueError, match="-1 bytes"):
        cuda.set_limit_lms(-1)
    with pytest.raises(ValueError, match="-1 bytes"):
        cuda.set_size_lms(-1)


@pytest.mark.parametrize("wrong", ["1G", 1.5, None])
def test_what_is_no_number_of_bytes_is_refused_so_too(installed: None, wrong: Any) -> None:
    for set_it in (cuda.set_limit_lms, cuda.set_size_lms):
        with pytest.raises(TypeError, match="must be a whole number of bytes, 0 or more"):
            set_it(wrong)
    assert cuda.get_size_lms() == 1


def test_cpu_modules_are_under_it_where_there_is_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "memory_stats", lambda _device=None: {"num_device_alloc": 7})
    for name in ("reset_peak_memory_stats", "reset_accumulated_memory_stats"):
        monkeypatch.setattr(cuda, name, lambda _device=None: None, raising=False)
    ibm._process = None
    ibm.install()
    try:
        cuda.set_size_lms(1)
        trained = model()
        expected = step(trained)
        cuda.set_enabled_lms(True)
        assert all(torch.equal(one, other) for one, other in zip(step(trained), expected, strict=True))
        for device in (None, 0, "cuda"):
            assert (cuda.memory_stats(device)["reclaimed"], cuda.memory_stats(device)["alloc_distribution.cudamalloc"]) == (7, 7)
        cuda.reset_accumulated_memory_stats()
        assert cuda.memory_stats()["reclaimed"] == 0
    finally:
        ibm.uninstall()
        ibm._process = None


def test_it_is_taken_away_without_a_trace() -> None:
    before = dict(vars(torch.cuda))
    ibm.install()
    ibm.install()
    assert cuda.memory_stats is ibm.memory_stats
    ibm.uninstall()
    ibm.uninstall()
    assert dict(vars(torch.cuda)) == before


def test_a_torch_with_its_own_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_enabled_lms", print, raising=False)
    with pytest.warns(UserWarning, match="of its own"):
        ibm.install()
    assert cuda.set_enabled_lms is print
