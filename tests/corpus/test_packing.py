"""Plans: every sample in one bin of one rank, within the budget, with work and not only counts in balance."""

import cProfile
import heapq
import pstats

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prottrans_hpc.corpus.order import ArrayLengths, SampleOrder, SamplePosition, next_step
from prottrans_hpc.corpus.packing import plan_step, spread
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.recipe import Order, Phase

WORLD_SIZES = (1, 2, 3, 4, 8)


def protein_lengths(num, seed=0, longest=512):
    """Like UniRef: log-normal, mean 350, cut at the limit."""
    return np.clip(np.random.default_rng(seed).lognormal(np.log(350) - 0.245, 0.7, num), 20, longest).astype(np.int64)


def sums(plan, values):
    """The sum of `values` over each rank's samples."""
    return np.array([values[np.concatenate(plan.bins_of(rank))].sum() for rank in range(plan.num_ranks)])


def imbalance(plan, values):
    """How much longer the slowest rank works than the average one."""
    totals = sums(plan, values)
    return totals.max() / totals.mean()


@given(
    lengths=st.lists(st.integers(0, 100), max_size=200),
    bin_residues=st.integers(100, 1000),
    num_ranks=st.integers(1, 40),
)
def test_every_sample_once_within_the_budget_in_equally_many_micro_batches(lengths, bin_residues, num_ranks):
    lengths = np.array(lengths, np.int64)
    plan = plan_step(lengths, bin_residues=bin_residues, num_ranks=num_ranks)
    bins = [plan.bins_of(rank) for rank in range(num_ranks)]
    assert {len(of_rank) for of_rank in bins} == {plan.num_micro_batches}
    members = np.concatenate([members for of_rank in bins for members in of_rank])
    assert np.array_equal(np.sort(members), np.arange(len(lengths)))
    for of_rank in bins:
        residues = [int(lengths[members].sum()) for members in of_rank]
        assert max(residues) <= bin_residues
        # Empty bins come first: gradients are exchanged behind the last.
        assert [len(members) > 0 for members in of_rank] == sorted(len(members) > 0 for members in of_rank)
    if len(lengths) >= num_ranks and (lengths > 0).all():
        assert all(sum(map(len, of_rank)) > 0 for of_rank in bins)


@given(cost=st.lists(st.integers(0, 1000), max_size=150), num_bins=st.integers(1, 30))
def test_batches_of_assignments_are_those_of_the_plain_loop(cost, num_bins):
    bin_of = spread(np.array(cost, np.float64), num_bins)
    heap = [(0, number) for number in range(num_bins)]
    for item in sorted(cost, reverse=True):
        load, number = heap[0]
        heapq.heapreplace(heap, (load + item, number))
    assert np.sort(np.bincount(bin_of, weights=cost, minlength=num_bins)).tolist() == sorted(load for load, _ in heap)


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
@pytest.mark.parametrize(("global_batch", "longest", "bound"), [(4096, 512, 1.001), (4096, 2048, 1.001), (512, 512, 1.005), (512, 1024, 1.02), (64, 512, 1.04)])
def test_both_the_lengths_and_their_squares_are_balanced(num_ranks, global_batch, longest, bound):
    lengths = protein_lengths(global_batch, longest=longest)
    plan = plan_step(lengths, bin_residues=16384, num_ranks=num_ranks)
    assert imbalance(plan, lengths) < bound
    assert imbalance(plan, lengths**2) < bound


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
@pytest.mark.parametrize("bin_residues", [600, 4096, 16384, 100_000])
def test_bins_are_as_few_as_the_budget_allows_and_no_rank_idles(num_ranks, bin_residues):
    lengths = protein_lengths(1000)
    plan = plan_step(lengths, bin_residues=bin_residues, num_ranks=num_ranks)
    fewest = -(-lengths.sum() // (num_ranks * bin_residues))
    # At 600 a bin holds one long protein and little else; from a few proteins a bin on, nearly all of it is used.
    assert plan.num_micro_batches <= (1.4 * fewest if bin_residues == 600 else 1.03 * fewest + 1)
    assert sums(plan, lengths).min() > 0.99 * lengths.sum() / num_ranks


def test_long_uniform_samples_need_a_bin_each():
    plan = plan_step(np.full(100, 501), bin_residues=1000, num_ranks=3)
    assert plan.num_micro_batches == 34
    assert sorted(len(members) for rank in range(3) for members in plan.bins_of(rank)) == [0] * 2 + [1] * 100


def test_fewer_samples_than_ranks_leave_ranks_with_an_empty_bin():
    plan = plan_step(np.array([5, 9, 7]), bin_residues=10, num_ranks=5)
    assert plan.num_micro_batches == 1
    assert sorted(len(plan.bins_of(rank)[0]) for rank in range(5)) == [0, 0, 1, 1, 1]
    nothing = plan_step(np.zeros(0, np.int64), bin_residues=10, num_ranks=2)
    assert [len(members) for rank in range(2) for members in nothing.bins_of(rank)] == [0, 0]


def test_a_sample_over_the_budget_is_refused():
    with pytest.raises(ConfigError, match="101 residues does not fit into a bin of 100"):
        plan_step(np.array([3, 101]), bin_residues=100, num_ranks=1)


@settings(max_examples=25)
@given(
    batch=st.sampled_from([{"global_batch_size": 97}, {"global_batch_residues": 20_000}]),
    bin_residues=st.integers(512, 9000),
    long=st.sampled_from(["crop", "split"]),
)
def test_what_a_step_sees_depends_neither_on_ranks_nor_on_bins(batch, bin_residues, long):
    lengths = protein_lengths(300, longest=2000)
    phase = Phase(steps=5, max_residues=512, **batch)
    ledgers = []
    for num_ranks in WORLD_SIZES:
        order = SampleOrder(ArrayLengths(lengths), seed=4, order=Order(long_sequences=long, block_sequences=8, window_blocks=4), max_residues=512)
        position, ledger = SamplePosition(), []
        for _ in range(phase.steps):
            samples, position = next_step(order, position, phase)
            plan = plan_step(samples.lengths, bin_residues=bin_residues, num_ranks=num_ranks)
            dealt = np.concatenate([members for rank in range(num_ranks) for members in plan.bins_of(rank)])
            ledger.append(sorted(zip(samples.epochs[dealt].tolist(), samples.ids[dealt].tolist(), samples.starts[dealt].tolist(), strict=True)))
        ledgers.append((ledger, position))
    assert all(ledger == ledgers[0] for ledger in ledgers)


@pytest.fixture(scope="module")
def summit():
    """The papers' largest run: 5,616 GPUs, 44,928 sequences a step (8 a GPU)."""
    return 5616, 44_928


@pytest.mark.parametrize(("longest", "bound", "bound_squared"), [(512, 1.02, 1.02), (1024, 1.05, 1.2)])
def test_summit_is_balanced(summit, longest, bound, bound_squared):
    num_ranks, global_batch = summit
    lengths = protein_lengths(global_batch, longest=longest)
    plan = plan_step(lengths, bin_residues=16384, num_ranks=num_ranks)
    assert plan.num_micro_batches == 1 and np.array_equal(np.sort(plan.members), np.arange(global_batch))
    assert imbalance(plan, lengths) < bound
    assert imbalance(plan, lengths**2) < bound_squared
    # Dealing in order instead, as distributed samplers do, leaves the slowest rank with far more than its share.
    dealt_in_order = lengths.reshape(num_ranks, -1).sum(axis=1)
    assert dealt_in_order.max() / dealt_in_order.mean() > 1.5


def test_a_few_long_sequences_do_not_make_one_rank_wait_for_long(summit):
    """At 2,048 residues nothing can balance the squares of 8 sequences; the work of a 1,024-wide model can be."""
    num_ranks, global_batch = summit
    lengths = protein_lengths(global_batch, longest=2048)
    plan = plan_step(lengths, bin_residues=16384, num_ranks=num_ranks)
    work = lengths + lengths**2 / (6 * 1024)  # 24 h^2 FLOPs a token beside 4 h a pair of tokens
    assert imbalance(plan, work) < 1.05


def test_summit_sees_the_same_sequences_as_one_rank(summit):
    num_ranks, global_batch = summit
    phase = Phase(steps=1, max_residues=512, global_batch_size=global_batch)
    order = SampleOrder(ArrayLengths(protein_lengths(300_000, longest=3000)), seed=4, order=Order(), max_residues=512)
    position, seen = SamplePosition(), []
    for _ in range(6):
        samples, position = next_step(order, position, phase)
        plan = plan_step(samples.lengths, bin_residues=16384, num_ranks=num_ranks)
        seen += samples.ids[plan.members].tolist()
    assert len(set(seen)) == 6 * global_batch


def test_planning_for_summit_never_loops_over_sequences(summit):
    """Counted, not timed: the calls that planning a step and finding one's own bins takes, for 44,928 sequences."""
    num_ranks, global_batch = summit
    phase = Phase(steps=1, max_residues=512, global_batch_size=global_batch)
    order = SampleOrder(ArrayLengths(protein_lengths(300_000, longest=3000)), seed=4, order=Order(), max_residues=512)
    _, position = next_step(order, SamplePosition(), phase)
    profile = cProfile.Profile()
    profile.enable()
    samples, _ = next_step(order, position, phase)
    plan_step(samples.lengths, bin_residues=16384, num_ranks=num_ranks).bins_of(4711)
    profile.disable()
    assert pstats.Stats(profile).total_calls < global_batch / 10
