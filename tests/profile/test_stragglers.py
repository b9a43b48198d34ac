"""The wait for the slowest of N, held against drawn node times."""

from __future__ import annotations

import numpy as np
import pytest

from prottrans_hpc.profile import stragglers

DRAWS = {
    "gumbel": lambda generator, shape: generator.gumbel(1.0, 0.01, shape),
    "normal": lambda generator, shape: generator.normal(1.0, 0.01, shape),
}


def drawn_waits(family: str, sizes: list[int]) -> dict[int, float]:
    """Mean over many steps of the slowest of N less the mean node."""
    generator = np.random.default_rng(1)
    times = {nodes: DRAWS[family](generator, (20_000, nodes)) for nodes in sizes}
    return {nodes: float((drawn.max(axis=1) - drawn.mean(axis=1)).mean()) for nodes, drawn in times.items()}


@pytest.mark.parametrize("family", sorted(DRAWS))
def test_what_few_nodes_show_tells_what_many_wait(family):
    spread = stragglers.fit(drawn_waits(family, [2, 4, 8, 16]))
    assert spread.family == family
    assert spread.scale_s == pytest.approx(0.01, rel=0.05)
    assert spread.wait_s(512) == pytest.approx(drawn_waits(family, [512])[512], rel=0.05)


def test_one_size_is_taken_to_have_the_heavier_tail():
    spread = stragglers.fit({1: 0.0, 4: 0.02})
    assert spread.family == "gumbel"
    assert spread.wait_s(4) == pytest.approx(0.02)


def test_equal_nodes_and_one_node_wait_for_nobody():
    assert stragglers.fit({1: 0.0}).wait_s(936) == 0.0
    assert stragglers.fit({2: 0.0, 4: 0.0}).wait_s(936) == 0.0
    assert stragglers.fit({2: 0.1, 4: 0.2}).wait_s(1) == 0.0


def test_waits_grow_with_the_nodes():
    for family in stragglers.FAMILIES.values():
        assert family(1) == pytest.approx(0.0)
        assert 0 < family(2) < family(8) < family(936)
