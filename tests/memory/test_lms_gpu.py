"""Large model support on a GPU: delays between copies and kernels that would show a missing wait, and what is really allocated."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prottrans_hpc.memory import keeping
from prottrans_hpc.memory.lms import LargeModelSupport

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

MIB = 1 << 20


class Block(nn.Module):
    """Products and what is computed the same way twice: nothing that adds up in an order of chance."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, rows: Tensor) -> Tensor:
        return rows + self.down(torch.tanh(self.up(rows)))


def model(layers: int = 8, width: int = 256) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(*(Block(width) for _ in range(layers))).cuda()


def gradients(module: nn.Module, rows: Tensor, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    module.zero_grad()
    run(rows).square().sum().backward()
    return [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]


def sleeping(seed: int) -> Callable[[str], None]:
    """Up to some milliseconds on the stream that goes on, at one place or another."""
    dice, lock = random.Random(seed), threading.Lock()

    def pause(where: str) -> None:
        with lock:
            cycles = dice.choice((0, 0, 10_000, 1_000_000, 5_000_000))
        if cycles:
            torch.cuda._sleep(cycles)

    return pause


@pytest.mark.parametrize("seed", range(12))
def test_no_copy_and_no_kernel_overtakes_another(seed: int) -> None:
    module, rows = model(), torch.randn(1024, 256, device="cuda")
    expected = gradients(module, rows, module)
    limit, ahead = random.Random(seed).choice([(0, 0), (0, 8 * MIB), (10 * MIB, 0), (10 * MIB, 8 * MIB)])
    lms = LargeModelSupport(limit, size_bytes=1, ahead_bytes=ahead, pause=sleeping(seed))
    for _ in range(3):
        found = gradients(module, rows, lms(module))
        noise = [torch.randn(256, 1024, device="cuda") for _ in range(8)]  # takes whatever memory was given back too early
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        del noise
    assert lms.counts().reclaimed > 0
    assert lms.pool.bytes_in_use == 0


def test_forward_passes_on_other_streams_and_threads() -> None:
    module, rows = model(), torch.randn(1024, 256, device="cuda")
    expected, wrong = gradients(module, rows, module), list[int]()
    lms = LargeModelSupport(4 * MIB, size_bytes=1, ahead_bytes=4 * MIB, pause=sleeping(5))
    copies = [model() for _ in range(3)]
    torch.cuda.synchronize()

    def work(number: int) -> None:
        stream: Any = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                found = gradients(copies[number], rows, lms(copies[number]))
                if not all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert wrong == []


def peak_of(work: Callable[[], Any]) -> tuple[Any, int]:
    """What it gives, and the most bytes that nobody else could have: those, too, that Python dropped and a copy still reads."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["active_bytes.all.current"]
    found = work()
    torch.cuda.synchronize()
    return found, torch.cuda.memory_stats()["active_bytes.all.peak"] - before


def test_the_limit_holds_when_copies_are_late() -> None:
    """Python runs ahead of a GPU whose copies out take milliseconds each."""
    limit, ahead, module, rows = 32 * MIB, 16 * MIB, model(24), torch.randn(4096, 256, device="cuda")

    def pause(where: str) -> None:
        if where == "out":
            torch.cuda._sleep(5_000_000)

    def forward(run: Callable[[Tensor], Tensor]) -> Tensor:
        return run(rows).square().sum()

    forward(module).backward()  # workspaces of the libraries
    kept, plain = peak_of(lambda: forward(module))
    del kept
    lms = LargeModelSupport(limit, size_bytes=1, ahead_bytes=ahead, pause=pause)
    loss, peak = peak_of(lambda: forward(lms(module)))
    temporaries = 4 * 4 * 4096 * 1024  # four of the widest: what a layer is computing
    assert plain > 4 * limit
    assert peak < limit + ahead + temporaries
    loss.backward()


def test_less_is_allocated_and_the_gradients_are_equal_with_recomputation_too() -> None:
    module, rows, peaks = model(12), torch.randn(16384, 256, device="cuda"), []
    blocks: Any = module
    expected = gradients(module, rows, module)

    def recomputing(rows: Tensor) -> Tensor:
        with keeping.keeping("attention_and_narrow"):
            for block in blocks:
                rows = keeping.recompute(block, rows)
        return rows

    for run in (module, LargeModelSupport(64 * MIB)(module), LargeModelSupport(0, ahead_bytes=32 * MIB)(recomputing)):
        found, peak = peak_of(lambda run=run: gradients(module, rows, run))
        peaks.append(peak)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        del found
    assert peaks[1] < 0.5 * peaks[0]
    assert peaks[2] < 0.5 * peaks[0]
