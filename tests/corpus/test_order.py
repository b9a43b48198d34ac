"""The order of samples: exactly once an epoch, the same from any resume point, and never more than a window in memory."""

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prottrans_hpc.corpus.order import ArrayLengths, SampleOrder, SamplePosition, enter_phase, next_step, position_from_json
from prottrans_hpc.errors import CheckpointError, DataError
from prottrans_hpc.recipe import Order, Phase


def some_lengths(num, seed=0, longest=3000):
    return np.clip(np.random.default_rng(seed).lognormal(5.6, 0.7, num), 5, longest).astype(np.int64)


def make_order(lengths, *, seed=1, max_residues=512, **order):
    order = {"block_sequences": 4, "window_blocks": 3} | order
    return SampleOrder(ArrayLengths(lengths), seed=seed, order=Order(**order), max_residues=max_residues)


def phase(**batch):
    return Phase(steps=10, max_residues=512, **batch)


def rows(samples):
    return list(zip(samples.epochs.tolist(), samples.ids.tolist(), samples.starts.tolist(), samples.lengths.tolist(), strict=True))


def take(order, position, sizes):
    """The samples of one step after the other, and the positions before and behind each."""
    steps, positions = [], [position]
    for size in sizes:
        samples, position = next_step(order, position, phase(global_batch_size=size))
        steps.append(rows(samples))
        positions.append(position)
    return steps, positions


corpora = st.builds(
    lambda num, seed, block, window, long: (some_lengths(num, seed), {"block_sequences": block, "window_blocks": window, "long_sequences": long}),
    st.integers(5, 150),
    st.integers(0, 50),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from(["crop", "split"]),
)


@settings(max_examples=60)
@given(corpus=corpora, seed=st.integers(0, 2**40), max_residues=st.integers(50, 700))
def test_every_residue_of_every_sequence_once_an_epoch_or_one_crop_of_it(corpus, seed, max_residues):
    lengths, options = corpus
    order = make_order(lengths, seed=seed, max_residues=max_residues, **options)
    for epoch in (0, 1, 7):
        stretches: dict[int, list[tuple[int, int]]] = {i: [] for i in range(len(lengths))}
        for _, i, start, length in sorted(rows(next_step(order, SamplePosition(epoch), phase(global_batch_size=order.num_samples(epoch)))[0])):
            stretches[i].append((start, length))
        for i, length in enumerate(lengths.tolist()):
            if options["long_sequences"] == "crop":
                ((start, cropped),) = stretches[i]
                assert cropped == min(length, max_residues) and 0 <= start <= length - cropped
            else:
                ends = list(itertools.accumulate(fragment for _, fragment in stretches[i]))
                assert [start for start, _ in stretches[i]] == [0, *ends[:-1]] and ends[-1] == length
                sizes = [fragment for _, fragment in stretches[i]]
                assert max(sizes) <= max_residues and max(sizes) - min(sizes) <= 1


@settings(max_examples=60)
@given(corpus=corpora, sizes=st.lists(st.integers(1, 90), min_size=1, max_size=5))
def test_steps_of_any_size_give_the_same_samples_in_the_same_order(corpus, sizes):
    lengths, options = corpus
    order = make_order(lengths, **options)
    steps, _ = take(order, SamplePosition(), sizes)
    together = [row for step in steps for row in step]
    assert [len(step) for step in steps] == sizes
    assert together == rows(next_step(make_order(lengths, **options), SamplePosition(), phase(global_batch_size=len(together)))[0])


@pytest.mark.parametrize("long", ["crop", "split"])
def test_exactly_once_ledger_stopping_at_every_offset(long):
    """Three epochs; stopped and resumed by a fresh object behind every single sample, with another batch size each time."""
    lengths = some_lengths(29, seed=3)
    reference = make_order(lengths, long_sequences=long)
    total = 3 * reference.num_samples(0)
    ledger = rows(next_step(reference, SamplePosition(), phase(global_batch_size=total))[0])
    for epoch in range(3):
        assert len({row for row in ledger if row[0] == epoch}) == reference.num_samples(epoch)
    for stop in range(1, total):
        before, position = next_step(make_order(lengths, long_sequences=long), SamplePosition(), phase(global_batch_size=stop))
        position = position_from_json(position.to_json())
        resumed = make_order(lengths, long_sequences=long)
        steps, _ = take(resumed, position, [7] * ((total - stop) // 7) + [(total - stop) % 7 or 1])
        assert rows(before) + [row for step in steps for row in step][: total - stop] == ledger


@settings(max_examples=25)
@given(corpus=corpora, budget=st.integers(1, 9_000), stop=st.integers(1, 6))
def test_a_residue_budget_is_filled_but_not_exceeded(corpus, budget, stop):
    lengths, options = corpus
    order, position, ledger = make_order(lengths, **options), SamplePosition(), []
    for number in range(7):
        if number == stop:
            order = make_order(lengths, **options)
        samples, position = next_step(order, position, phase(global_batch_residues=budget))
        following = next_step(order, position, phase(global_batch_size=1))[0]
        residues = int(samples.lengths.sum())
        assert len(samples) == 1 or residues <= budget
        assert residues + int(following.lengths[0]) > budget
        ledger += rows(samples)
    assert ledger == rows(next_step(order, SamplePosition(), phase(global_batch_size=len(ledger)))[0])


def test_orders_of_epochs_and_seeds_differ_and_are_fixed_for_ever():
    lengths = some_lengths(200)
    first = [row[1] for row in take(make_order(lengths), SamplePosition(), [200])[0][0]]
    assert first != [row[1] for row in take(make_order(lengths), SamplePosition(1), [200])[0][0]]
    assert first != [row[1] for row in take(make_order(lengths, seed=2), SamplePosition(), [200])[0][0]]
    # Golden: if this changes, every run that is resumed sees other data than before.
    assert first[:12] == [180, 80, 87, 84, 82, 182, 181, 83, 85, 86, 81, 183]
    assert [row[2] for row in take(make_order(np.full(200, 5000)), SamplePosition(), [200])[0][0]][:6] == [1007, 1990, 2068, 260, 2268, 4392]


def test_samples_of_a_window_come_from_its_blocks_and_are_mixed():
    """What a window needs from disk is `window_blocks` stretches of `block_sequences` neighbours; within it, no order remains."""
    order = make_order(np.full(64 * 40, 100), block_sequences=64, window_blocks=10)
    for window in range(4):
        ids = order.window(0, window).ids
        assert len(ids) == 640 and len(set((ids // 64).tolist())) == 10
        assert abs(np.corrcoef(np.arange(640), np.argsort(np.argsort(ids)))[0, 1]) < 5 / np.sqrt(640)


def test_crops_are_uniform_and_new_in_every_epoch():
    order = make_order(np.full(20_000, 612), max_residues=512, block_sequences=64, window_blocks=512)
    starts = [next_step(order, SamplePosition(epoch), phase(global_batch_size=20_000))[0] for epoch in (0, 1)]
    counts = np.bincount(starts[0].starts, minlength=101)
    expected = 20_000 / 101
    assert len(counts) == 101
    assert ((counts - expected) ** 2 / expected).sum() < 160  # chi-squared, 100 degrees of freedom: p = 1e-4 at 161.3
    by_id = [samples.starts[np.argsort(samples.ids)] for samples in starts]
    assert abs(np.corrcoef(*by_id)[0, 1]) < 5 / np.sqrt(20_000)


@dataclass
class Enormous:
    """Lengths of 2.1 billion sequences by a formula; counts how many are asked for."""

    num_sequences: int = 2_122_000_007
    asked: int = 0
    largest_id: int = field(default=0)

    def lengths_of(self, ids):
        self.asked += len(ids)
        self.largest_id = max(self.largest_id, int(ids.max()))
        return 20 + ids * 2654435761 % 700


def test_a_place_in_two_billion_sequences_is_found_with_one_window_in_memory():
    source = Enormous()
    order = SampleOrder(source, seed=9, order=Order(), max_residues=512)
    assert order.num_samples(0) == source.num_sequences
    position = SamplePosition(2, 1_234_567_890)
    samples, after = next_step(order, position, phase(global_batch_size=1000))
    assert after == SamplePosition(2, 1_234_568_890) and len(set(samples.ids.tolist())) == 1000
    assert source.asked <= 2 * 64 * 512 and source.largest_id < source.num_sequences
    resumed = SampleOrder(Enormous(), seed=9, order=Order(), max_residues=512)
    assert rows(next_step(resumed, SamplePosition(2, position.consumed + 990), phase(global_batch_size=10))[0]) == rows(samples)[990:]
    # Over the end of the epoch: the partial block is somewhere else in each, and nothing is lost.
    last, after = next_step(order, SamplePosition(2, source.num_sequences - 5), phase(global_batch_size=9))
    assert last.epochs.tolist() == [2] * 5 + [3] * 4 and after == SamplePosition(3, 4)


def test_an_epoch_of_split_samples_reads_each_length_once():
    source = Enormous(num_sequences=300_001)
    order = SampleOrder(source, seed=9, order=Order(long_sequences="split"), max_residues=512)
    total = order.num_samples(0)
    assert total == int(np.maximum(-(-(20 + np.arange(300_001) * 2654435761 % 700) // 512), 1).sum())
    order.num_samples(1)
    assert source.asked == source.num_sequences


def test_phases_of_cropped_samples_go_on_where_the_last_one_stopped():
    lengths = some_lengths(100)
    short, long = make_order(lengths, max_residues=64), make_order(lengths, max_residues=2048)
    first, position = next_step(short, SamplePosition(), phase(global_batch_size=37))
    position = enter_phase(long, position, previous=short)
    second, position = next_step(long, position, phase(global_batch_size=63))
    assert sorted(first.ids.tolist() + second.ids.tolist()) == list(range(100))
    assert position == SamplePosition(1, 0)


@given(consumed=st.integers(0, 400), limits=st.tuples(st.integers(30, 600), st.integers(30, 600)))
def test_phases_of_split_samples_repeat_nothing_and_leave_out_less_than_a_window(consumed, limits):
    lengths = some_lengths(100, seed=5)
    before, behind = (make_order(lengths, max_residues=limit, long_sequences="split") for limit in limits)
    consumed = min(consumed, before.num_samples(0) - 1)
    first, position = next_step(before, SamplePosition(), phase(global_batch_size=consumed)) if consumed else (None, SamplePosition())
    entered = enter_phase(behind, position, previous=before)
    seen = set(first.ids.tolist()) if first else set()
    later: set[int] = set()
    if entered.epoch == 0:
        later = set(next_step(behind, entered, phase(global_batch_size=behind.num_samples(0) - entered.consumed))[0].ids.tolist())
    if limits[0] == limits[1]:
        assert entered == position
    else:
        assert not seen & later
        assert len(set(range(100)) - seen - later) < 4 * 3


@pytest.mark.parametrize(
    "values", [None, {}, {"epoch": 0}, {"epoch": 0, "consumed": -1}, {"epoch": "0", "consumed": 1}, {"epoch": True, "consumed": 1}, [0, 1]]
)
def test_a_damaged_position_is_refused(values):
    with pytest.raises(CheckpointError, match="not a position"):
        position_from_json(values)


def test_impossible_requests_are_refused():
    with pytest.raises(DataError, match="no sequences"):
        make_order(np.zeros(0, np.int64))
    with pytest.raises(CheckpointError, match="position 11 lies behind the 10 samples"):
        next_step(make_order(some_lengths(10)), SamplePosition(0, 11), phase(global_batch_size=1))
