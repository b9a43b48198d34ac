"""The formulas of all-reduces, held against what the sources say of them and against a simulation of the messages."""

from __future__ import annotations

import math

import numpy as np
import pytest

from prottrans_hpc.profile.collectives import ALGORITHMS, Fabric, Wire, halving_doubling, hierarchical, recursive_doubling, ring, tree

LINK = Wire(5e-6, 10e9)
FLAT = Fabric(1, LINK)
NODES_OF_SIX = Fabric(6, Wire(6e-6, 25e9), Wire(3e-6, 50e9))


def simulated_ring_s(num_bytes: float, num_ranks: int, link: Wire) -> float:
    """Send the chunks of a ring one by one: a rank sends on what it got in the step before."""
    free = [0.0] * num_ranks
    for _ in range(2 * (num_ranks - 1)):
        sent = [time + link.latency_s + num_bytes / num_ranks / link.bytes_per_s for time in free]
        free = [max(sent[rank], sent[rank - 1]) for rank in range(num_ranks)]
    return max(free)


@pytest.mark.parametrize("num_ranks", [2, 3, 8, 13])
def test_the_ring_takes_as_long_as_its_messages_do(num_ranks):
    assert ring(1e8, num_ranks, FLAT) == pytest.approx(simulated_ring_s(1e8, num_ranks, LINK))


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"recursive_doubling"}))
@pytest.mark.parametrize("num_nodes", [2, 4, 8, 64])
def test_no_all_reduce_beats_the_lower_bounds(name, num_nodes):
    """Patarasuk and Yuan 2009: 2 (p - 1) / p n bytes; and nothing is known everywhere before ceil(log2 p) messages."""
    assert ALGORITHMS[name](1e9, num_nodes, FLAT) >= 2 * (num_nodes - 1) / num_nodes * 1e9 / LINK.bytes_per_s
    assert ALGORITHMS[name](0.0, num_nodes, FLAT) >= math.ceil(math.log2(num_nodes)) * LINK.latency_s


def test_small_messages_want_few_steps_and_large_ones_few_bytes():
    """Thakur et al. 2005: recursive doubling for short messages, Rabenseifner's for long ones; a ring's latency grows with the ranks."""
    small, large, nodes = 64.0, 1e9, 64
    assert recursive_doubling(small, nodes, FLAT) < halving_doubling(small, nodes, FLAT) < ring(small, nodes, FLAT)
    assert halving_doubling(large, nodes, FLAT) < recursive_doubling(large, nodes, FLAT)
    assert ring(large, nodes, FLAT) == pytest.approx(halving_doubling(large, nodes, FLAT), rel=0.01)


def test_one_node_never_touches_the_link_between_nodes():
    slow = Fabric(6, Wire(1.0, 1.0), NODES_OF_SIX.within)
    for name in set(ALGORITHMS) - {"recursive_doubling"}:
        assert ALGORITHMS[name](1e8, 1, slow) < 0.1
    assert recursive_doubling(1e8, 1, slow) < 0.1


def test_the_hierarchy_shares_the_nodes_link_among_its_ranks():
    """Between nodes each of the six has a sixth, and all six go over one link: as the whole over the whole link."""
    inside = 2 * 5 * (3e-6 + 1e8 / 6 / 50e9)
    assert hierarchical(1e8, 8, NODES_OF_SIX) - inside == pytest.approx(halving_doubling(1e8, 8, Fabric(1, NODES_OF_SIX.between)))


def test_what_trees_send_does_not_grow_with_the_nodes():
    assert tree(1e9, 936, NODES_OF_SIX) < 1.01 * tree(1e9, 2, NODES_OF_SIX)
    assert ring(1e6, 936, NODES_OF_SIX) > 100 * ring(1e6, 2, NODES_OF_SIX)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_arrays_of_links_cost_what_each_does(name):
    latency, rate = np.array([1e-6, 2e-6, 9e-6]), np.array([1e9, 5e9, 3e10])
    costs = ALGORITHMS[name](1e7, 4, Fabric(2, Wire(latency, rate), Wire(1e-6, 1e10)))
    single = [float(ALGORITHMS[name](1e7, 4, Fabric(2, Wire(a, b), Wire(1e-6, 1e10)))) for a, b in zip(latency, rate, strict=True)]
    assert np.allclose(costs, single)
