"""The tracker's counts, held against what must be alive."""

from __future__ import annotations

import threading

import torch
from torch.utils.checkpoint import checkpoint

from prottrans_hpc.profile.storage_tracker import StorageTracker

KIB = 1024


def test_views_and_operations_in_place_count_once_and_the_dead_not_at_all() -> None:
    beside = torch.zeros(256)
    with StorageTracker(beside) as tracker:
        first = torch.ones(256)
        view, half = first.view(16, 16)[3], first.chunk(2)
        first.add_(1)
        beside.mul_(2)
        inside = beside[5:]
        assert tracker.live_bytes == KIB
        second = first + 1
        assert tracker.live_bytes == 2 * KIB == tracker.peak_bytes
        del first
        assert tracker.live_bytes == 2 * KIB, "its views are alive"
        del view, half
        assert tracker.live_bytes == KIB
        tracker.reset_peak()
        assert tracker.peak_bytes == KIB
    del second, inside
    assert tracker.live_bytes == 0


def test_what_a_graph_keeps_is_alive_until_its_backward_pass() -> None:
    weight = torch.ones(64, 64, requires_grad=True)
    weight.grad = torch.zeros(64, 64)
    rows = torch.ones(256, 64)

    def kept(recomputed: bool) -> tuple[int, int]:
        with StorageTracker(weight, weight.grad, rows) as tracker:

            def layer(x: torch.Tensor) -> torch.Tensor:
                return (x @ weight).sigmoid().tanh()

            result = checkpoint(layer, rows, use_reentrant=False) if recomputed else layer(rows)
            loss = result.sum()
            result = None
            after_forward = tracker.live_bytes - loss.untyped_storage().nbytes()
            loss.backward()
            del loss
            assert tracker.live_bytes == 0
        return after_forward, tracker.peak_bytes

    saved, peak = kept(recomputed=False)
    assert saved == 2 * 64 * KIB, "the sigmoid's and the tanh's result"
    assert peak >= 3 * 64 * KIB
    # Without the graph nothing of the layer remains: its input was there before.
    assert kept(recomputed=True)[0] == 0


def test_storages_may_die_on_other_threads() -> None:
    with StorageTracker() as tracker:
        parts = [torch.zeros(256) for _ in range(200)]
    threads = [threading.Thread(target=parts.clear) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tracker.live_bytes, tracker.peak_bytes) == (0, 200 * KIB)
