"""A projection from measured points finds what the points were made from, says how wrong it was, and refuses too few of them.

The points are drawn from stated links, stragglers and noise, bucket by bucket: what is true is known here, and nowhere else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest

from prottrans_hpc.errors import CheckpointError, ConfigError, DataError
from prottrans_hpc.profile import measured, measured_steps
from prottrans_hpc.profile.collectives import Fabric, Wire, ring
from prottrans_hpc.profile.cost_model import MIB, Manner, Work, reduction
from prottrans_hpc.profile.known_links import AllReduce, read_all_reduce
from prottrans_hpc.profile.scaling import Ledger, NodeShare, Point, Scaling, Sharing
from prottrans_hpc.profile.scaling_collect import shared
from prottrans_hpc.profile.sharded_cost import Cut

PLAIN = Sharing()
_WORK, _LINK = Work(0.20, 0.40, 0.03, 200 * MIB), Wire(4e-3, 0.9e9)


@dataclass(frozen=True)
class World:
    """What is true, and what a fit should find."""

    work: Work = _WORK
    link: Wire = _LINK
    bucket_mib: int = 25
    jitter_s: float = 0.004
    """Scale of the node times, drawn from a Gumbel distribution."""
    noise: float = 0.003
    """Of every part, as a share."""
    sharing: float = 0.0
    """By how much more a node's own work takes on each further node."""
    mode: str = "weak"
    says: Sharing = PLAIN
    """What the study says of what ranks sent."""
    comm: str = "torch"
    manner: Manner | None = None
    """What is really sent; None: whole gradients in buckets, by rings."""

    def passes(self, nodes: int) -> float:
        """How much of the two passes a node has to do."""
        return 1 / nodes if self.mode == "strong" else 1 + self.sharing * (nodes - 1)

    def exposed_s(self, nodes: int) -> float:
        """What reductions really add."""
        work = replace(self.work, backward_s=self.passes(nodes) * self.work.backward_s)
        return float(reduction(work, self.manner or Manner(self.bucket_mib * MIB, "ring"), Fabric(1, self.link), nodes)[1])

    def step_s(self, nodes: int) -> float:
        """Mean of a step."""
        own = self.passes(nodes) * (self.work.forward_s + self.work.backward_s) + self.work.other_s
        return own + self.exposed_s(nodes) + self.jitter_s * float(np.log(nodes))


def study(world: World, sizes: tuple[int, ...] = (1, 2, 4, 8), *, steps: int = 40, repetitions: int = 3, seed: int = 0) -> Scaling:
    """As `prottrans scale` would have written it."""
    generator = np.random.default_rng(seed)
    points = [_point(world, nodes, repetition, steps, generator) for repetition in range(1, repetitions + 1) for nodes in sizes]
    return Scaling(
        recipe="tiny_prot_bert",
        machine="laptop",
        mode=world.mode,
        comm=world.comm,
        precision="fp32",
        parameters=50 * MIB,
        gradient_bytes=int(world.work.gradient_bytes),
        bucket_mib=world.bucket_mib,
        ranks_per_node=1,
        residues_per_node_step=1000.0 if world.mode == "weak" else None,
        peak_tflops_rank=None,
        hardware={},
        versions={},
        points=tuple(points),
        sharing=world.says,
    )


def _point(world: World, nodes: int, repetition: int, steps: int, generator: np.random.Generator) -> Point:
    def noisy(value: float) -> np.ndarray:
        return value * (1.0 + world.noise * generator.standard_normal(steps))

    # A cut model talks within its passes: there the ledger has it.
    in_passes, behind = (world.exposed_s(nodes), 0.0) if world.says.is_cut else (0.0, world.exposed_s(nodes))
    nodes_times = generator.gumbel(0.0, world.jitter_s, (steps, nodes))
    slowest = nodes_times.max(axis=1)
    alone = noisy(behind)
    parts = {
        "data_wait_s": noisy(0.001),
        "forward_s": noisy(world.passes(nodes) * world.work.forward_s + in_passes / 3),
        "backward_s": noisy(world.passes(nodes) * world.work.backward_s + in_passes * 2 / 3),
        "exposed_comm_s": alone + slowest - nodes_times.mean(axis=1),
        "optimizer_s": noisy(world.work.other_s - 0.001),
        "checkpoint_s": np.where(np.arange(steps) % 10 == 0, 0.05, 0.0),
        "other_s": np.zeros(steps),
    }
    return Point(
        nodes=nodes,
        ranks=nodes,
        repetition=repetition,
        order=1,
        steps=steps,
        step_s=tuple(np.sum(list(parts.values()), axis=0).tolist()),
        residues=(1000 * nodes,) * steps,
        tokens=(1000 * nodes,) * steps,
        flops=None,
        ledger=Ledger(**{name: tuple(values.tolist()) for name, values in parts.items()}),
        skew_s=tuple((slowest - np.median(nodes_times, axis=1)).tolist()),
        per_node=tuple(NodeShare(node=number, host=f"n{number}", compute_s=0.6) for number in range(nodes)),
        run_dir="simulated",
        reduction_s=tuple(alone.tolist()),
    )


WORLD = World()


def older(scaling: Scaling) -> Scaling:
    """As it was written before nodes told what their last rank waits."""
    return replace(scaling, points=tuple(replace(point, reduction_s=None) for point in scaling.points))


@pytest.mark.parametrize("told", [study, lambda world: older(study(world))], ids=["now", "older"])
def test_the_wait_for_the_slowest_is_no_communication(told):
    even, uneven = (measured_steps.sizes_of(scaling, measured_steps.all_steps(scaling)) for scaling in (told(replace(WORLD, jitter_s=0.0)), told(WORLD)))
    for one, other in zip(even[1:], uneven[1:], strict=True):
        assert other.exposed_comm_s == pytest.approx(one.exposed_comm_s, rel=0.2)


def test_a_wait_for_one_node_that_is_very_slow_does_not_hide_the_reduction():
    uneven = study(replace(WORLD, jitter_s=20 * WORLD.jitter_s))
    sizes = measured_steps.sizes_of(uneven, measured_steps.all_steps(uneven))
    assert [size.exposed_comm_s for size in sizes[1:]] == pytest.approx([WORLD.exposed_s(nodes) for nodes in (2, 4, 8)], rel=0.05)


def test_links_and_stragglers_are_found_again():
    fit = measured.project(study(WORLD), [8], with_changes=False)["fit"]
    assert fit["latency_s"] == pytest.approx(WORLD.link.latency_s, rel=0.15)
    assert fit["bytes_per_s"] == pytest.approx(WORLD.link.bytes_per_s, rel=0.15)
    assert fit["straggler_scale_s"] == pytest.approx(WORLD.jitter_s, rel=0.35)


def test_sizes_that_were_not_measured_are_predicted_within_the_stated_range():
    projection = measured.project(study(WORLD), [1, 2, 8, 16, 64], with_changes=False)
    assert abs(projection["hold_out"]["error"]) < 0.03
    assert projection["hold_out"]["nodes"] == 8
    for point in projection["points"]:
        assert point["step_s"] == pytest.approx(WORLD.step_s(point["nodes"]), rel=0.06)
        assert point["step_s_low"] <= point["step_s"] <= point["step_s_high"]
        assert point["efficiency"] == pytest.approx(1 / (1 + point["overhead"]))
    assert projection["warnings"] == []


FULL = Sharing(sharding="full", units=7)
FACTORS = Sharing(compression="powersgd", units=7, sent_bytes=10 * MIB)
SENT = {
    "cut over all": World(says=FULL, manner=Manner(25 * MIB, "ring", cut=Cut(None, 7, 200 * MIB, overlaps=False, scatter_rounds=2))),
    "copies over two": World(
        says=replace(FULL, sharding="hybrid", shard_ranks=2),
        manner=Manner(25 * MIB, "ring", cut=Cut(2, 7, 200 * MIB, overlaps=False, scatter_rounds=2)),
    ),
    "strong, cut": World(mode="strong", says=FULL, manner=Manner(25 * MIB, "ring", cut=Cut(None, 7, 200 * MIB, overlaps=False, scatter_rounds=2))),
    "PowerSGD": World(says=FACTORS, manner=Manner(25 * MIB, "ring", 0.05, sums=2), link=Wire(4e-3, 2e7)),
    "fp16 over Horovod": World(
        says=Sharing(compression="fp16", sent_bytes=100 * MIB), comm="horovod", manner=Manner(25 * MIB, "ring", 0.5), link=Wire(4e-3, 3e8)
    ),
}


@pytest.mark.parametrize("world", SENT.values(), ids=SENT)
def test_what_ranks_send_is_modelled_as_the_study_says(world):
    """Not only the measured sizes: a model of whole gradients in buckets would fit those as well, and miss what lies beyond."""
    made = study(world)
    manner, candidates = measured.manner_of(made)
    assert manner == world.manner
    assert manner.algorithm in candidates
    projection = measured.project(made, [16, 64], with_changes=True)
    assert projection["fit"]["latency_s"] == pytest.approx(world.link.latency_s, rel=0.2)
    assert projection["fit"]["bytes_per_s"] == pytest.approx(world.link.bytes_per_s, rel=0.2)
    assert abs(projection["hold_out"]["error"]) < 0.2  # of 1, 2 and 4 nodes latency and bandwidth are hard to tell apart where copies reach over two
    for point in projection["points"]:
        assert point["step_s"] == pytest.approx(world.step_s(point["nodes"]), rel=0.08)
    changes = {row["change"] for row in projection["what_if"]}
    assert ("every rank holds the whole model" in changes) == world.says.is_cut
    assert ("the model cut over all ranks" in changes) == (world.comm == "torch" and world.says.sharding != "full")


def test_reductions_within_nodes_first_are_projected_as_such():
    several = replace(study(WORLD), ranks_per_node=4, sharing=Sharing(reduction="hierarchical"))
    assert measured.manner_of(several)[1] == ("hierarchical",)
    assert measured.manner_of(replace(several, sharing=Sharing(compression="bf16")))[1] == ("hierarchical",)


@pytest.mark.parametrize("says", [PLAIN, FULL], ids=["whole", "cut"])
def test_on_a_small_machine_whose_nodes_share_cores_ranks_take_turns(says):
    """Two cores: on four nodes everything takes twice as long, on eight four times. The size left out is found, and what is projected is said."""
    alone = {nodes: replace(WORLD, says=says, jitter_s=1e-5, work=_times(WORLD.work, max(1.0, nodes / 2))) for nodes in (1, 2, 4, 8)}
    points = tuple(point for nodes, world in alone.items() for point in study(world, (nodes,)).points)
    made = replace(study(WORLD), points=points, sharing=says)
    here = replace(made, hardware=shared(8, 2))
    sharing, unknowing = (measured.project(one, [16], with_changes=False) for one in (here, made))
    assert abs(sharing["hold_out"]["error"]) < 0.1 < abs(unknowing["hold_out"]["error"])
    assert any("shared the 2 cores of one computer" in line for line in sharing["warnings"])
    assert "times the ranks for each of the cores that all nodes share" in sharing["assumptions"][0]
    assert sharing["points"][0]["local_s"] == pytest.approx(8 * WORLD.work.local_s, rel=0.02)
    assert made.turns(8) == here.turns(2) == 1.0


def _times(work: Work, factor: float) -> Work:
    return Work(factor * work.forward_s, factor * work.backward_s, factor * work.other_s, work.gradient_bytes)


def test_tensor_groups_that_reach_over_nodes_are_refused_with_another_way():
    with pytest.raises(ConfigError, match=r"groups of 2 ranks reach over nodes of 1.*--machine"):
        measured.project(replace(study(WORLD), sharing=Sharing(tensor_ranks=2, units=7)), [16], with_changes=False)


def test_the_error_of_the_size_left_out_is_real():
    """Eight nodes that are slower than any model of the smaller ones can know: the error says so, and widens the range."""
    smooth = study(WORLD)
    slower = [
        replace(point, step_s=tuple(1.3 * value for value in point.step_s), ledger=replace(point.ledger, other_s=tuple(0.3 * value for value in point.step_s)))
        for point in smooth.at(8)
    ]
    odd = replace(smooth, points=(*(point for point in smooth.points if point.nodes < 8), *slower))
    before, after = (measured.project(made, [16], with_changes=False) for made in (smooth, odd))
    assert after["hold_out"]["error"] == pytest.approx(1 / 1.3 - 1, abs=0.03)

    def width(projection):
        return projection["points"][0]["step_s_high"] / projection["points"][0]["step_s"] - 1

    assert width(after) > 0.2 > width(before)
    assert any("took" in line and "longer on 8 nodes" in line for line in after["warnings"])


@pytest.mark.parametrize(
    ("sizes", "said"),
    [((1, 2, 4), "at least 4 sizes"), ((2, 4, 8, 16), "1 node, which overhead is relative to"), ((1,), "1 size .1 nodes., too few")],
)
def test_too_few_sizes_are_refused_with_what_is_needed(sizes, said):
    with pytest.raises(ConfigError, match=said):
        measured.project(study(WORLD, sizes, steps=5), [936], with_changes=False)


def test_links_that_left_no_trace_are_warned_of():
    hidden = replace(WORLD, link=Wire(1e-7, 1e11), work=Work(0.2, 0.4, 0.03, 4 * MIB))
    warnings = measured.project(study(hidden), [936], with_changes=False)["warnings"]
    assert any("left no trace" in line for line in warnings)


@pytest.mark.parametrize(("sharing", "said"), [(0.3, "longer on 8 nodes than on one: they share"), (-0.05, "less on 8 nodes than on one: something else")])
def test_work_that_does_not_stay_the_same_is_warned_of(sharing, said):
    warnings = measured.project(study(replace(WORLD, sharing=sharing), steps=10), [16], with_changes=False)["warnings"]
    assert any(said in line for line in warnings)


def test_a_strong_study_has_less_to_do_on_each_node_and_more_overhead():
    world = replace(WORLD, mode="strong", link=Wire(1e-3, 4e9))
    point = measured.project(study(world), [16], with_changes=False)["points"][0]
    assert point["step_s"] == pytest.approx(world.step_s(16), rel=0.06)
    assert point["overhead"] == pytest.approx(16 * point["step_s"] / world.step_s(1) - 1, rel=0.02)


def test_what_if_changes_one_thing_at_a_time():
    rows = measured.project(study(WORLD), [16], with_changes=True)["what_if"]
    by_change = {row["change"]: row for row in rows}
    assert rows[0]["change"] == "as it is"
    assert rows[0]["speed"] == 1.0
    assert by_change["gradients sent in half the bytes"]["speed"] > 1.0
    assert by_change["buckets of 5 MiB"]["exposed_comm_s"] > rows[0]["exposed_comm_s"], "more messages of a slow link"
    assert not any("hierarchical" in change for change in by_change), "with one rank a node it is the flat one"
    assert by_change["4 times the micro batches a step"]["overhead"] < rows[0]["overhead"]


def communication_study(**changes) -> dict:
    """What `prottrans comm` would have written of the same links on two nodes, twice as fast as they are in training."""
    fast, fabric = Wire(_LINK.latency_s / 2, _LINK.bytes_per_s * 2), Fabric(1, Wire(0.0, 1.0))
    seconds_a_byte = float(ring(1.0, 2, fabric)) / fast.bytes_per_s
    line = {"backend": "gloo", "collective": "all_reduce", "scope": "world", "latency_s": 2 * fast.latency_s, "bytes_per_s": 1 / seconds_a_byte, "r2": 1.0}
    return {"format": 1, "nodes": 2, "ranks": 2, "ranks_per_node": 1, "fits": [line]} | changes


def test_a_communication_study_stands_in_for_a_size(tmp_path):
    (tmp_path / "comm.json").write_text(json.dumps(communication_study()))
    known = read_all_reduce(tmp_path, "gloo")
    assert known.link("ring").latency_s == pytest.approx(_LINK.latency_s / 2)
    assert known.link("ring").bytes_per_s == pytest.approx(_LINK.bytes_per_s * 2)
    projection = measured.project(study(WORLD, (1, 2, 4)), [16], with_changes=False, known=known)
    assert projection["fit"]["latency_s"] == pytest.approx(_LINK.latency_s, rel=0.1)
    assert projection["fit"]["bytes_per_s"] == pytest.approx(_LINK.bytes_per_s, rel=0.1)
    assert projection["points"][0]["step_s"] == pytest.approx(WORLD.step_s(16), rel=0.06)


def test_links_whose_bandwidth_left_no_trace_cost_their_latency_alone():
    assert AllReduce("gloo", 2, 1, 1e-3, float("inf")).link("ring") == Wire(5e-4, float("inf"))


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"nodes": 1}, ConfigError, "says nothing of the links between nodes"),
        ({"fits": []}, ConfigError, "no all-reduce of gloo"),
        ({"format": 2}, DataError, "format 1"),
        ({"fits": [{"backend": "gloo"}]}, DataError, "collective"),
    ],
)
def test_a_communication_study_that_cannot_help_is_refused(tmp_path, changes, error, said):
    (tmp_path / "comm.json").write_text(json.dumps(communication_study(**changes)))
    with pytest.raises(error, match=said):
        read_all_reduce(tmp_path, "gloo")


def test_a_missing_communication_study_names_the_command(tmp_path):
    with pytest.raises(CheckpointError, match="prottrans comm"):
        read_all_reduce(tmp_path, "gloo")
