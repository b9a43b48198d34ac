import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prottrans_hpc.corpus.counter_rng import WORD, Purpose, below, draw, philox4x32, threshold

PUBLISHED = [  # Random123's kat_vectors, philox4x32 10: counter, key, output
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def numbers(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED)
def test_published_known_answers(counter, key, expected):
    words = np.array(numbers(counter), np.uint64)[:, None].repeat(5, axis=1)
    philox4x32(words, tuple(numbers(key)))
    assert words.T.tolist() == [numbers(expected)] * 5


def philox_by_the_paper(counter, key):
    """Figure 2 of Salmon et al. in plain integers, written independently of the vectorised one."""
    c, k = list(counter), list(key)
    for _ in range(10):
        left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(right >> 32) ^ c[1] ^ k[0], right % WORD, (left >> 32) ^ c[3] ^ k[1], left % WORD]
        k = [(k[0] + 0x9E3779B9) % WORD, (k[1] + 0xBB67AE85) % WORD]
    return c


@given(
    seed=st.integers(0, 2**60),
    purpose=st.sampled_from(Purpose),
    epoch=st.integers(0, 2**32 - 1),
    ids=st.lists(st.integers(0, 2**62), min_size=1, max_size=4),
    counter=st.integers(0, 2**32 - 1),
)
def test_an_address_is_counter_sample_epoch_under_seed_and_purpose(seed, purpose, epoch, ids, counter):
    words = draw(seed, purpose, epochs=epoch, sample_ids=np.array(ids), counters=counter)
    key = (seed % WORD, ((seed >> 32) % 2**24) << 8 | purpose)
    assert words.T.tolist() == [philox_by_the_paper((counter, i % WORD, i >> 32, epoch), key) for i in ids]


def test_a_draw_does_not_depend_on_its_neighbours():
    ids, epochs, counters = np.arange(40_000) % 977, np.arange(40_000) % 3, np.arange(40_000)
    together = draw(7, Purpose.TARGETS, epochs=epochs, sample_ids=ids, counters=counters)
    picks = np.array([0, 1, 8191, 8192, 20_000, 39_999])
    assert np.array_equal(together[:, picks], draw(7, Purpose.TARGETS, epochs=epochs[picks], sample_ids=ids[picks], counters=counters[picks]))
    assert draw(7, Purpose.TARGETS, epochs=0, sample_ids=np.arange(0), counters=0).shape == (4, 0)


def test_streams_of_neighbouring_addresses_are_unrelated():
    ids = np.arange(20_000)
    base = draw(1, Purpose.CROP, epochs=0, sample_ids=ids, counters=0)[0] / WORD
    others = [
        draw(2, Purpose.CROP, epochs=0, sample_ids=ids, counters=0)[0],
        draw(1, Purpose.TARGETS, epochs=0, sample_ids=ids, counters=0)[0],
        draw(1, Purpose.CROP, epochs=1, sample_ids=ids, counters=0)[0],
        draw(1, Purpose.CROP, epochs=0, sample_ids=ids + 1, counters=0)[0],
        draw(1, Purpose.CROP, epochs=0, sample_ids=ids, counters=1)[0],
        draw(1 << 32 | 1, Purpose.CROP, epochs=0, sample_ids=ids, counters=0)[0],
        draw(1, Purpose.CROP, epochs=0, sample_ids=ids, counters=0)[1],
    ]
    # The correlation of independent streams has a standard deviation of 1/sqrt(n); five of them.
    for other in others:
        assert abs(np.corrcoef(base, other / WORD)[0, 1]) < 5 / np.sqrt(len(ids))


def test_below_covers_its_range_evenly():
    words = draw(3, Purpose.REPLACEMENT, epochs=0, sample_ids=np.arange(100_000), counters=0)[1]
    counts = np.bincount(below(words, 20), minlength=20)
    assert len(counts) == 20
    assert ((counts - 5000.0) ** 2 / 5000).sum() < 50  # chi-squared, 19 degrees of freedom: p = 1e-4 at 50.8
    assert below(np.array([0, WORD - 1], np.uint64), 7).tolist() == [0, 6]
    assert (threshold(0.0), threshold(0.5), threshold(1.0)) == (0, WORD // 2, WORD)
