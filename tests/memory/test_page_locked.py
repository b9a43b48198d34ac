"""Page-locked memory: as much as was asked for, known to the driver for as long as it is there and no longer."""

from __future__ import annotations

import ctypes
import gc
import mmap

import pytest
import torch

from prottrans_hpc.errors import ResourceError
from prottrans_hpc.memory import page_locked
from prottrans_hpc.memory.host_pool import HostPool, rounded

PAGE = mmap.PAGESIZE


class Driver:
    """Keeps book of what is locked; what is let go of must be there still."""

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}
        self.code = 0
        self.waits = 0

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:  # noqa: N802 - the driver's name
        assert address % PAGE == num_bytes % PAGE == 0, "a page that two share cannot be locked twice"
        assert address not in self.locked
        if self.code == 0:
            self.locked[address] = num_bytes
        return self.code

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802 - the driver's name
        assert self.waits > 0, "copies may be on their way"
        ctypes.memset(address, 1, self.locked.pop(address))  # a segmentation fault where it was unmapped before
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()

    def finish() -> None:
        fake.waits += 1

    monkeypatch.setattr(page_locked, "_driver", lambda: fake)
    monkeypatch.setattr(page_locked, "_finish_copies", finish)
    return fake


@pytest.mark.parametrize("num_bytes", [1, PAGE, PAGE + 1, 9 * PAGE, (5 << 20) + 3])
def test_it_is_locked_to_the_page_and_let_go_of_with_its_last_view(num_bytes: int, driver: Driver) -> None:
    memory = page_locked.empty_bytes(num_bytes, pinned=True)
    assert (memory.dtype, memory.shape) == (torch.uint8, (num_bytes,))
    assert driver.locked == {memory.data_ptr(): -(-num_bytes // PAGE) * PAGE}
    view = memory[num_bytes // 2 :]
    memory.fill_(7)
    del memory
    gc.collect()
    assert len(driver.locked) == 1
    assert view.eq(7).all()
    del view
    gc.collect()
    assert driver.locked == {}


def test_tensors_of_any_type_and_shape(driver: Driver) -> None:
    found = page_locked.empty(torch.Size((3, 5)), torch.bfloat16, pinned=True)
    assert (found.dtype, found.shape, sum(driver.locked.values())) == (torch.bfloat16, (3, 5), PAGE)
    assert page_locked.empty(0, torch.float32, pinned=True).shape == (0,)
    assert page_locked.empty(torch.Size(()), torch.float32, pinned=True).shape == ()
    assert page_locked.empty(7, torch.float32, pinned=False).shape == (7,)


def test_a_pool_counts_what_is_really_locked_and_gives_it_back(driver: Driver) -> None:
    pool = HostPool()
    blocks = [pool.take(num_bytes, pinned=True) for num_bytes in (5 << 20, (9 << 20) + 5, 3 << 20)]
    plain = pool.take(5 << 20)
    assert pool.bytes_in_all == sum(driver.locked.values()) + len(plain.bytes)
    assert pool.bytes_in_all - len(plain.bytes) < (17 << 20) * 9 / 8, "no powers of two"
    pool.give(plain)
    pool.give(blocks.pop(0))
    again = pool.take(5 << 20, pinned=True)
    assert again.pinned
    assert again.bytes.data_ptr() in driver.locked, "and not the plain one of the same size"
    pool.give(again)
    for block in blocks:
        pool.give(block)
    del block, blocks, again
    pool.trim()
    gc.collect()
    assert (driver.locked, pool.bytes_in_all) == ({}, 0)


def test_what_the_driver_refuses_is_an_error_that_leaves_nothing(driver: Driver) -> None:
    driver.code, pool = 2, HostPool()
    with pytest.raises(ResourceError, match=f"no {rounded(5000):,} bytes of page-locked host memory"):
        pool.take(5000, pinned=True)
    with pytest.raises(ResourceError, match="page-locked"):
        pool.take(1 << 60, pinned=True)
    assert pool.bytes_in_all == pool.bytes_in_use == 0


@pytest.mark.gpu
def test_on_a_gpu_it_is_pinned_and_copies_run_beside() -> None:
    memory = page_locked.empty(1 << 20, torch.float32, pinned=True)
    assert memory.is_pinned()
    memory.fill_(3.0)
    there = memory.to("cuda", non_blocking=True)
    del memory  # while it is being read
    gc.collect()
    assert there.eq(3.0).all()
