"""Where a rank stands among replicas, shards and tensor groups."""

from __future__ import annotations

import itertools

import pytest

from prottrans_hpc.parallel_layout import ParallelLayout


def test_every_rank_has_a_place_of_its_own() -> None:
    layout = ParallelLayout(num_replicas=3, num_shards=4, num_tensor=2)
    places = {(layout.data_rank(rank), layout.tensor_index(rank)) for rank in range(layout.num_ranks)}
    assert places == set(itertools.product(range(12), range(2))) and layout.num_ranks == 24 and layout.num_data_ranks == 12


@pytest.mark.parametrize(("layout", "is_plain"), [(ParallelLayout(5), True), (ParallelLayout(5, 2), False), (ParallelLayout(5, 1, 2), False)])
def test_plain_is_what_every_rank_holds_whole(layout: ParallelLayout, is_plain: bool) -> None:
    assert layout.is_plain is is_plain


def test_neighbours_share_matrix_products_first() -> None:
    layout = ParallelLayout(num_replicas=2, num_shards=3, num_tensor=2)
    assert [layout.data_rank(rank) for rank in range(4)] == [0, 0, 1, 1]
