"""The published run's 936 nodes x 6 ranks, all 5,616 of them simulated in one process: places, GPUs, batches, files."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from prottrans_hpc import rank
from prottrans_hpc.launch.demand import Demand
from prottrans_hpc.launch.job import Job
from prottrans_hpc.launch.planner import allocate
from prottrans_hpc.launch.starters import STARTERS
from prottrans_hpc.machine import read_machine
from prottrans_hpc.rank import RankContext
from prottrans_hpc.run_dir import RunDir

if TYPE_CHECKING:
    from collections.abc import Sequence

NODES, RANKS_PER_NODE = 936, 6
RANKS = NODES * RANKS_PER_NODE
FAKE_SCHEDULER = Path(__file__).resolve().parent / "fake_scheduler"


@pytest.fixture(scope="module", params=["rank", "node"])
def environments(request: pytest.FixtureRequest) -> list[dict[str, str]]:
    """What jsrun tells every rank, for one resource set a rank and for one a node: from the words that our job script calls it with."""
    sys.path.insert(0, str(FAKE_SCHEDULER))
    try:
        import jsrun
    finally:
        sys.path.remove(str(FAKE_SCHEDULER))
    summit = replace(read_machine("summit"), resource_set=request.param)
    job = Job("pretrain", "run", RunDir(Path("/runs/run")), summit, allocate(summit, Demand(num_racks=52)), "/venv/bin/python", account="BIO123")
    asked = jsrun.parse(STARTERS["jsrun"].argv(job)[1:])
    jsrun.check(asked, num_hosts=NODES, cores=42, gpus=6)
    found: list[dict[str, str]] = jsrun.environments(asked, NODES, "4711.1")
    return found


@pytest.fixture(scope="module")
def ranks(environments: Sequence[Mapping[str, str]]) -> list[RankContext]:
    return [rank.detect(environment) for environment in environments]


def test_every_rank_knows_its_place(ranks: Sequence[RankContext]) -> None:
    assert [context.rank for context in ranks] == list(range(RANKS)) and RANKS == 5616
    assert {(context.world_size, context.local_world_size, context.num_nodes, context.starter) for context in ranks} == {(RANKS, 6, NODES, "jsrun")}
    assert [(context.node_rank, context.local_rank) for context in ranks] == [(node, local) for node in range(NODES) for local in range(RANKS_PER_NODE)]
    assert sum(context.is_main for context in ranks) == 1
    assert sum(context.is_node_main for context in ranks) == NODES


def test_every_rank_has_a_gpu_of_its_own(ranks: Sequence[RankContext], environments: Sequence[Mapping[str, str]]) -> None:
    """The rule of comm.default_device, on the GPUs that the resource set shows."""
    taken = set()
    for context, environment in zip(ranks, environments, strict=True):
        visible = environment["CUDA_VISIBLE_DEVICES"].split(",")
        taken.add((context.node_rank, visible[context.local_rank % len(visible)]))
    assert len(taken) == RANKS


def test_one_log_a_node(ranks: Sequence[RankContext]) -> None:
    logs = Counter(RunDir(Path("/runs/run")).node_log(context.node_rank) for context in ranks)
    assert len(logs) == NODES and set(logs.values()) == {RANKS_PER_NODE}


def test_few_ranks_write_a_checkpoint_and_no_two_the_same_file(ranks: Sequence[RankContext]) -> None:
    import torch

    from prottrans_hpc import architecture
    from prottrans_hpc.stage import find
    from prottrans_hpc.train.saving import MAX_WRITERS, plan_files

    record = architecture.get("prot_bert")
    with torch.device("meta"):
        module: Any = find(record.build)(record.size("prot_bert_bfd").shape)
    model = {name: 4 * parameter.numel() for name, parameter in module.named_parameters()}
    sizes = {"model": model, "optimizer": {f"{moment}.{name}": size for moment in ("exp_avg", "exp_avg_sq") for name, size in model.items()}}
    plans = plan_files(sizes, RANKS)
    assert len({plan.name for plan in plans}) == len(plans) <= 2 * MAX_WRITERS
    assert Counter(name for plan in plans for name in plan.tensors) == Counter([*sizes["model"], *sizes["optimizer"]])
    writers = {plan.rank for plan in plans}
    assert len(writers) <= MAX_WRITERS
    assert len({ranks[writer].node_rank for writer in writers}) == len(writers), "each on a node of its own"
    assert plan_files(sizes, RANKS) == plans, "every rank plans the same"


@pytest.mark.parametrize("global_batch", [44_928, 1000])
def test_a_step_is_shared_out_without_loss(global_batch: int) -> None:
    """The published global batch, and one with fewer sequences than ranks."""
    from prottrans_hpc.corpus.packing import plan_step

    lengths = np.random.default_rng(0).integers(20, 512, size=global_batch, dtype=np.int64)
    plan = plan_step(lengths, bin_residues=4096, num_ranks=RANKS)
    seen = np.concatenate([members for index in range(RANKS) for members in plan.bins_of(index)])
    assert sorted(seen.tolist()) == list(range(global_batch))
    assert {len(plan.bins_of(index)) for index in range(RANKS)} == {plan.num_micro_batches}
    residues = [sum(int(lengths[members].sum()) for members in plan.bins_of(index)) for index in range(RANKS)]
    assert max(residues) <= 4096 * plan.num_micro_batches
