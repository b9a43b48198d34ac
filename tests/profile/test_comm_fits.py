"""Latency and bandwidth from samples whose truth is known; which node is slow."""

from __future__ import annotations

import random

import pytest

from prottrans_hpc.profile.comm_fits import ALONE, Sample, fastest_of, fit, fits_of, link_seconds, rounds_of, slow_nodes

SIZES = [1024 * 4**power for power in range(8)]


def samples(backend: str, latency_s: float, bytes_per_s: float, *, scatter: float = 0.0, seed: int = 0) -> list[Sample]:
    """Seven timings of each size with a relative scatter."""
    draw = random.Random(seed)

    def seconds(size: int) -> tuple[float, ...]:
        return tuple((latency_s + size / bytes_per_s) * draw.uniform(1 - scatter, 1 + scatter) for _ in range(7))

    return [Sample(backend, "all_reduce", "world", size, seconds(size)) for size in SIZES]


def test_an_exact_line_is_found() -> None:
    found = fit(samples("gloo", 50e-6, 2e9))
    assert found.latency_s == pytest.approx(50e-6, rel=1e-6)
    assert found.bytes_per_s == pytest.approx(2e9, rel=1e-6)
    assert found.r2 == pytest.approx(1.0)
    assert found.seconds(10**6) == pytest.approx(550e-6)


@pytest.mark.parametrize("seed", range(20))
def test_scatter_in_proportion_moves_both_numbers_little(seed: int) -> None:
    """Without the weights the largest message would leave the latency undetermined."""
    found = fit(samples("gloo", 50e-6, 2e9, scatter=0.2, seed=seed))
    assert found.latency_s == pytest.approx(50e-6, rel=0.2)
    assert found.bytes_per_s == pytest.approx(2e9, rel=0.2)


def test_neither_number_is_negative() -> None:
    falling = [Sample("gloo", "all_reduce", "world", size, (1.0 / size,)) for size in SIZES]
    assert fit(falling).bytes_per_s is None
    assert fit(falling).latency_s > 0
    bent = [Sample("gloo", "all_reduce", "world", size, (1e-9 * size**1.2,)) for size in SIZES]
    assert fit(bent).latency_s == 0.0
    assert fit([Sample("gloo", "all_reduce", "world", 1024, (1.0, 1.0))]).r2 is None


def test_the_fastest_is_named_with_its_reason() -> None:
    both = samples("gloo", 50e-6, 4e9, scatter=0.01) + samples("mpi", 10e-6, 1e9, scatter=0.01, seed=1)
    rows = fastest_of(both, fits_of(both))["world"]["all_reduce"]
    assert [row["bytes"] for row in rows] == SIZES
    assert (rows[0]["backend"], rows[-1]["backend"]) == ("mpi", "gloo")
    assert "times as fast as gloo: latency 10 us against 50 us" in rows[0]["why"]
    assert "times as fast as mpi: bandwidth 4 GB/s against 1 GB/s" in rows[-1]["why"].replace("3.99", "4").replace("4.01", "4").replace("0.999", "1")


def test_what_scatters_more_than_it_differs_is_not_called_better() -> None:
    spread = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
    alike = [Sample(name, "all_reduce", "world", size, tuple(mean * one for one in spread)) for name, mean in (("gloo", 1.0), ("mpi", 1.1)) for size in SIZES]
    assert all(row["why"].endswith("within the scatter") for row in fastest_of(alike, fits_of(alike))["world"]["all_reduce"])
    alone = samples("gloo", 50e-6, 1e9)
    assert fastest_of(alone, fits_of(alone))["world"]["all_reduce"][0]["why"] == ALONE


@pytest.mark.parametrize("num_nodes", [2, 3, 4, 7, 8, 19])
def test_in_a_tournament_all_pairs_meet_once_and_nobody_twice_a_round(num_nodes: int) -> None:
    rounds = rounds_of(num_nodes)
    assert sorted(pair for one in rounds for pair in one) == [(a, b) for a in range(num_nodes) for b in range(a + 1, num_nodes)]
    for pairs in rounds:
        assert len({node for pair in pairs for node in pair}) == 2 * len(pairs)


@pytest.mark.parametrize("num_nodes", [3, 4, 8, 19])
@pytest.mark.parametrize("slow", [0, 2])
def test_a_slow_link_is_told_from_its_partners(num_nodes: int, slow: int) -> None:
    draw = random.Random(num_nodes)
    met: list[list[tuple[int, float]]] = [[] for _ in range(num_nodes)]
    for one, other in (pair for pairs in rounds_of(num_nodes) for pair in pairs):
        seconds = draw.uniform(0.8, 1.2) * (20.0 if slow in (one, other) else 1.0)
        met[one].append((other, seconds))
        met[other].append((one, seconds))
    named = slow_nodes("link", link_seconds(met), [f"n{node}" for node in range(num_nodes)], factor=2.0)
    assert [(node.node, node.host) for node in named] == [(slow, f"n{slow}")]
    assert named[0].factor == pytest.approx(20.0, rel=0.5)


def test_scatter_alone_names_nobody() -> None:
    for seed in range(200):
        draw = random.Random(seed)
        seconds = [draw.lognormvariate(0.0, 0.3) for _ in range(8)]
        assert slow_nodes("compute", seconds, ["n"] * 8, factor=3.0) == []


def test_of_two_nodes_the_slower_is_named() -> None:
    assert [node.host for node in slow_nodes("compute", [1.0, 5.0], ["a", "b"], factor=2.0)] == ["b"]
