"""How much of the reductions a backward pass hides, held against a simulation bucket by bucket."""

from __future__ import annotations

import pytest

from prottrans_hpc.profile.collectives import ALGORITHMS, Fabric, Wire
from prottrans_hpc.profile.cost_model import MIB, Manner, Work, bucket_sizes, predict, reduction, with_micro_batches
from prottrans_hpc.profile.stragglers import Spread

WORK = Work(0.1, 0.2, 0.02, 400 * MIB)
FABRIC = Fabric(1, Wire(1e-5, 5e9))


def simulated_exposed_s(work: Work, manner: Manner, fabric: Fabric, num_nodes: int) -> float:
    """Walk through the backward pass: a bucket that is full waits until the wire is free."""
    done_bytes, wire_is_free = 0.0, 0.0
    began = work.backward_s * (1 - 1 / manner.micro_batches)
    for size in bucket_sizes(work.gradient_bytes, manner.bucket_bytes):
        done_bytes += size
        full_at = began + done_bytes / work.gradient_bytes * (work.backward_s - began)
        wire_is_free = max(wire_is_free, full_at) + float(ALGORITHMS[manner.algorithm](size * manner.sent_fraction, num_nodes, fabric))
    return wire_is_free - work.backward_s


@pytest.mark.parametrize("bucket_mib", [3, 25, 64, 400, 1000])
@pytest.mark.parametrize("bytes_per_s", [5e8, 3e9, 5e10])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_exposed_communication_is_what_the_walk_finds(bucket_mib, bytes_per_s, micro_batches):
    manner, fabric = Manner(bucket_mib * MIB, "ring", 0.5, micro_batches), Fabric(2, Wire(1e-5, bytes_per_s), Wire(1e-6, 1e11))
    assert reduction(WORK, manner, fabric, 4)[1] == pytest.approx(simulated_exposed_s(WORK, manner, fabric, 4))


def test_buckets_hold_all_gradients():
    for bucket in (25 * MIB, 400 * MIB, 1e12):
        sizes = bucket_sizes(WORK.gradient_bytes, bucket)
        assert sizes.sum() == pytest.approx(WORK.gradient_bytes)
        assert (sizes > 0).all()
        assert sizes.max() <= bucket


def test_one_rank_reduces_nothing_and_waits_for_nobody():
    step = predict(WORK, Manner(25 * MIB, "ring"), FABRIC, 1, Spread("gumbel", 0.1))
    assert (step.communication_s, step.exposed_comm_s, step.straggler_s) == (0.0, 0.0, 0.0)
    assert step.step_s == WORK.local_s


def test_a_single_bucket_hides_nothing():
    total, exposed = reduction(WORK, Manner(1e12, "ring"), FABRIC, 8)
    assert exposed == pytest.approx(total)


def test_accumulation_spreads_the_reduction_over_more_work():
    manner = Manner(100 * MIB, "ring")
    before = predict(WORK, manner, FABRIC, 8)
    after = predict(*with_micro_batches(WORK, manner, 4), FABRIC, 8)
    assert after.local_s == pytest.approx(4 * (WORK.forward_s + WORK.backward_s) + WORK.other_s)
    assert after.exposed_comm_s / after.step_s < before.exposed_comm_s / before.step_s
