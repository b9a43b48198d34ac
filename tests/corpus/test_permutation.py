from math import factorial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prottrans_hpc.corpus.permutation import invert, permute, round_keys


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**56), epoch=st.integers(0, 1000))
def test_it_is_a_permutation_with_an_inverse(size, seed, epoch):
    keys, points = round_keys(seed, epoch), np.arange(size)
    images = permute(points, size, keys)
    assert np.array_equal(np.sort(images), points)
    assert np.array_equal(invert(images, size, keys), points)


@given(size=st.integers(2**20, 2**45), seed=st.integers(0, 2**32), data=st.data())
def test_single_points_of_huge_domains(size, seed, data):
    points = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True)))
    keys = round_keys(seed, 0)
    images = permute(points, size, keys)
    assert images.min() >= 0 and images.max() < size and len(set(images.tolist())) == len(points)
    assert np.array_equal(invert(images, size, keys), points)


@pytest.mark.parametrize("size", [3, 4])
def test_all_small_permutations_are_about_equally_likely(size):
    each = 60
    trials = each * factorial(size)
    seen: dict[tuple[int, ...], int] = {}
    for epoch in range(trials):
        image = tuple(permute(np.arange(size), size, round_keys(11, epoch)).tolist())
        seen[image] = seen.get(image, 0) + 1
    assert len(seen) == factorial(size)
    chi_squared = sum((count - each) ** 2 / each for count in seen.values())
    assert chi_squared < {3: 25.7, 4: 58.6}[size]  # p = 1e-4 at 5 and 23 degrees of freedom


def test_neighbours_end_up_far_apart():
    size = 100_000
    images = permute(np.arange(size), size, round_keys(5, 2))
    # Distances of independent uniform points: mean size/3, standard deviation size/sqrt(18).
    assert abs(np.abs(np.diff(images)).mean() / size - 1 / 3) < 5 / np.sqrt(18 * size)
    assert abs(np.corrcoef(np.arange(size), images)[0, 1]) < 5 / np.sqrt(size)


def test_epochs_and_seeds_give_unrelated_orders():
    size = 50_000
    orders = [permute(np.arange(size), size, round_keys(seed, epoch)) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(orders[one], orders[other])[0, 1]) < 5 / np.sqrt(size)
