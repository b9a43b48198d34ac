"""What a cut model sends, against closed forms, and how much of it is hidden, against a walk through the passes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prottrans_hpc import architecture
from prottrans_hpc.comm_compression import LowRank
from prottrans_hpc.profile.collectives import Fabric, Wire
from prottrans_hpc.profile.cost_model import MIB, Manner, Work, predict, reduction
from prottrans_hpc.profile.model_facts import model_facts
from prottrans_hpc.profile.sharded_cost import Cut, Passes, gather, num_shards, traffic
from prottrans_hpc.recipe_parallel import Parallel
from prottrans_hpc.stage import find

GRADIENTS, UNITS = 310 * MIB, 31
BETWEEN, WITHIN = Wire(1e-5, 5e9), Wire(2e-6, 5e10)
PASSES = Passes(0.1, 0.2, GRADIENTS, 1, "ring")


def cut(shards, **changes) -> Cut:
    return Cut(shards, UNITS, GRADIENTS, **changes)


def test_full_sharding_on_nodes_of_one_rank_sends_three_times_what_a_ring_gathers():
    """Rajbhandari et al. 2020, section 7.2.2: 1.5 times the volume of an all-reduce, less the unit that stays together."""
    latency_free = Fabric(1, Wire(0.0, BETWEEN.bytes_per_s))
    total, exposed = traffic(cut(None, overlaps=False), PASSES, latency_free, 8)
    gathered = 7 / 8 * GRADIENTS / BETWEEN.bytes_per_s
    assert total == exposed == pytest.approx((3 - 1 / UNITS) * gathered)
    messages = traffic(cut(None, overlaps=False), PASSES, Fabric(1, Wire(1e-5, float("inf"))), 8)[0]
    assert messages == pytest.approx((3 * UNITS - 1) * 7 * 1e-5)


def test_the_bytes_of_real_ranks_are_those_of_the_model():
    """Counted in a network of their own, three ranks over gloo: what the formula says, and a percent of headers."""
    space = ["unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), "--net"]
    if not shutil.which("ip") or not shutil.which("unshare") or subprocess.run([*space, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network of its own can be made here")
    program = [sys.executable, str(Path(__file__).with_name("cut_bytes.py")), "3", "4"]
    done = subprocess.run(["timeout", "-k", "5", "200", *space, *program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    of_gloo = Cut(None, 4, 1.0, overlaps=False, scatter_rounds=2)
    modelled = traffic(of_gloo, Passes(0.0, 0.0, 1.0, 1, "ring"), Fabric(1, Wire(0.0, 1.0)), 3)[0]
    assert float(done.stdout) == pytest.approx(modelled, rel=0.02)


def test_a_reduce_scatter_that_is_an_all_reduce_inside_sends_twice():
    once, twice = (traffic(cut(None, scatter_rounds=rounds), PASSES, Fabric(1, BETWEEN), 4)[0] for rounds in (1, 2))
    assert twice - once == pytest.approx(UNITS * gather(GRADIENTS / UNITS, 4, BETWEEN))


def test_a_copy_within_a_node_leaves_only_sums_of_gradients_between_nodes():
    """Each of r ranks sums its part over N nodes, at once over the node's link: in bytes a ring of whole gradients over N nodes."""
    free_within = Fabric(4, Wire(0.0, BETWEEN.bytes_per_s))
    total, _ = traffic(cut(4), PASSES, free_within, 8)
    assert total == pytest.approx(2 * 7 / 8 * GRADIENTS / BETWEEN.bytes_per_s)
    assert traffic(cut(4), PASSES, free_within, 1)[0] == 0.0
    inside, _ = traffic(cut(4), PASSES, Fabric(4, BETWEEN, WITHIN), 1)
    assert inside == pytest.approx((3 * UNITS - 1) * gather(GRADIENTS / UNITS, 4, WITHIN))


def test_a_copy_over_two_nodes_sums_half_as_much_over_half_as_many():
    fabric = Fabric(4, Wire(0.0, BETWEEN.bytes_per_s))
    over_two = traffic(cut(8), PASSES, fabric, 8)[0]
    within_copies = (3 - 1 / UNITS) * 7 / 8 * GRADIENTS / BETWEEN.bytes_per_s
    assert over_two == pytest.approx(within_copies + 2 * 3 / 4 * GRADIENTS / 2 / BETWEEN.bytes_per_s)


def test_tensor_groups_sum_activations_four_times_a_layer_and_cut_what_each_ring_carries():
    fabric = Fabric(4, Wire(0.0, BETWEEN.bytes_per_s), Wire(0.0, WITHIN.bytes_per_s))
    passes = Passes(0.1, 0.2, GRADIENTS, 3, "ring")
    plain, tensor = (traffic(cut(2, tensor_ranks=2, activation_bytes=size), passes, fabric, 1) for size in (0.0, 8 * MIB))
    sums = 3 * 4 * (UNITS - 1) * 2 * (1 / 2) * 8 * MIB / WITHIN.bytes_per_s
    assert tensor[0] - plain[0] == pytest.approx(sums)
    assert tensor[1] - plain[1] == pytest.approx(sums)
    assert plain[0] == pytest.approx(3 * (3 - 1 / UNITS) * (1 / 2) * GRADIENTS / 2 / WITHIN.bytes_per_s)


def walked_exposed_s(passes: Passes, fabric: Fabric, nodes: int) -> float:
    """Unit after unit: the next one's weights travel while one is computed, its gradients with the weights of the one after it."""
    weights = gradients = gather(GRADIENTS / UNITS, nodes, fabric.between)
    waited = 0.0
    for _ in range(passes.micro_batches):
        forward, backward = (value / passes.micro_batches / UNITS for value in (passes.forward_s, passes.backward_s))
        waited += weights
        for _ in range(UNITS - 1):
            waited += max(forward, weights) - forward
        for _ in range(UNITS - 1):
            waited += max(backward, weights + gradients) - backward
        waited += gradients
    return waited


@pytest.mark.parametrize("bytes_per_s", [5e8, 5e9, 5e10])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_exposed_communication_is_what_the_walk_finds(bytes_per_s, micro_batches):
    passes, fabric = Passes(0.1, 0.2, GRADIENTS, micro_batches, "ring"), Fabric(1, Wire(1e-5, bytes_per_s))
    total, exposed = traffic(cut(None), passes, fabric, 8)
    assert exposed == pytest.approx(walked_exposed_s(passes, fabric, 8))
    assert exposed <= total


def test_a_step_of_a_cut_model_holds_its_traffic_and_one_rank_has_none():
    work, manner, fabric = Work(0.1, 0.2, 0.02, GRADIENTS), Manner(25 * MIB, "ring", cut=cut(None)), Fabric(1, BETWEEN)
    assert predict(work, manner, fabric, 4).exposed_comm_s == pytest.approx(float(traffic(cut(None), PASSES, fabric, 4)[1]))
    assert predict(work, manner, fabric, 1).step_s == pytest.approx(0.32)


@pytest.mark.parametrize(("shards", "tensor", "ranks", "found"), [(None, 1, 12, 12), (None, 2, 12, 6), (4, 1, 12, 4), (6, 2, 4, 2), (4, 1, 1, 1)])
def test_how_many_share_a_copy(shards, tensor, ranks, found):
    assert num_shards(cut(shards, tensor_ranks=tensor), ranks) == found


def test_two_sums_of_factors_have_twice_the_messages_and_compute_on_top():
    work, fabric = Work(0.1, 0.2, 0.0, GRADIENTS), Fabric(1, BETWEEN)
    one, two = (reduction(work, Manner(1e12, "ring", 0.1, sums=sums), fabric, 8) for sums in (1, 2))
    assert two[0] - one[0] == pytest.approx(14 * BETWEEN.latency_s)
    assert reduction(work, Manner(1e12, "ring", 0.1, sums=2, compress_s=0.5), fabric, 8)[1] == pytest.approx(two[1] + 0.5)


@pytest.mark.parametrize("name", ["prot_bert", "prot_t5"])
def test_facts_of_a_model_are_what_its_compression_and_its_cut_have(name):
    """Counted by the compression itself, on real gradients of a tiny model whose sums are counted and not made."""
    chosen = architecture.get(name)
    shape = chosen.size("tiny").shape
    facts = model_facts(chosen, shape, Parallel(powersgd_rank=2))
    sent = []

    def count(tensor):
        sent.append(tensor.numel())
        yield from ()

    module = find(chosen.build)(shape)
    gradients = [torch.randn_like(parameter) for parameter in module.parameters() if parameter.requires_grad]
    list(LowRank(2, 2, count).steps(0, torch.empty(0), gradients))
    assert sum(sent) == facts.factor_numbers
    assert facts.units == 1 + shape.num_layers + getattr(shape, "num_decoder_layers", 0)
