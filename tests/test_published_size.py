"""The published run's 936 nodes x 6 ranks, all 5,616 of them simulated in one process: places, GPUs, batches, files."""

from __future__ import annotations

import resource
import sys
import threading
import time
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
from prottrans_hpc.machine import Machine, read_machine
from prottrans_hpc.rank import RankContext
from prottrans_hpc.run_dir import RunDir

if TYPE_CHECKING:
    from collections.abc import Sequence

NODES, RANKS_PER_NODE = 936, 6
RANKS = NODES * RANKS_PER_NODE
FAKE_SCHEDULER = Path(__file__).resolve().parent / "fake_scheduler"


def job_of(machine: Machine) -> Job:
    return Job("pretrain", "run", RunDir(Path("/runs/run")), machine, allocate(machine, Demand(num_racks=52)), "/venv/bin/python", account="BIO123")


def told_by_srun() -> list[dict[str, str]]:
    """What srun tells every rank of a step over 936 nodes, by its block distribution (the names are those that a real one was seen to set)."""
    words = STARTERS["srun"].argv(job_of(replace(read_machine("summit"), scheduler="slurm", starter="srun", rack_placement="switches", header_lines=())))
    options = dict(word.partition("=")[::2] for word in words if word.startswith("--"))
    nodes, tasks, per_node = (int(options[f"--{name}"]) for name in ("nodes", "ntasks", "ntasks-per-node"))
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": f"{tasks}", "SLURM_STEP_NUM_NODES": f"{nodes}", "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{nodes})"}
    places = [{"SLURM_PROCID": f"{index}", "SLURM_NODEID": f"{index // per_node}", "SLURM_LOCALID": f"{index % per_node}"} for index in range(tasks)]
    gpus = ",".join(map(str, range(6)))  # each task of a node sees all of them
    return [{**step, **place, "CUDA_VISIBLE_DEVICES": gpus} for place in places]


@pytest.fixture(scope="module", params=["jsrun, a resource set a rank", "jsrun, a resource set a node", "srun"])
def environments(request: pytest.FixtureRequest) -> list[dict[str, str]]:
    """What the starter tells every rank, from the words that our job script calls it with."""
    if request.param == "srun":
        return told_by_srun()
    sys.path.insert(0, str(FAKE_SCHEDULER))
    try:
        import jsrun
    finally:
        sys.path.remove(str(FAKE_SCHEDULER))
    job = job_of(replace(read_machine("summit"), resource_set=request.param.split()[-1]))
    asked = jsrun.parse(STARTERS["jsrun"].argv(job)[1:])
    jsrun.check(asked, num_hosts=NODES, cores=42, gpus=6)
    found: list[dict[str, str]] = jsrun.environments(asked, NODES, "4711.1")
    return found


@pytest.fixture(scope="module")
def ranks(environments: Sequence[Mapping[str, str]]) -> list[RankContext]:
    return [rank.detect(environment) for environment in environments]


def test_every_rank_knows_its_place(ranks: Sequence[RankContext]) -> None:
    assert [context.rank for context in ranks] == list(range(RANKS)) and RANKS == 5616
    assert {(context.world_size, context.local_world_size, context.num_nodes) for context in ranks} == {(RANKS, 6, NODES)}
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


def test_one_reader_a_node_stages_the_corpus_and_each_begins_elsewhere(ranks: Sequence[RankContext], monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand nodes must not all ask the shared file system for the same shard first."""
    from prottrans_hpc.corpus.index import Index
    from prottrans_hpc.train import staging

    begun: list[float] = []
    monkeypatch.setattr(staging, "Staging", lambda index, folder, *, rehash, begin_at: begun.append(begin_at))
    monkeypatch.setenv("USER", "somebody")
    index, summit = Index(Path("/corpora/bfd"), "a" * 64, {}, {}), read_machine("summit")
    folders = {staging._begin(index, summit, context).folder for context in ranks}
    assert [str(folder).startswith("/mnt/bb/somebody/") for folder in folders] == [True], "the same place on every node's own disk"
    assert begun == [node / NODES for node in range(NODES)]


def test_a_rank_of_each_node_meets_the_others_through_one_file(tmp_path: Path) -> None:
    """For real, over 935 connections: rank 0 tells its address in a file, the others come, and the file is gone again."""
    from prottrans_hpc import comm_rendezvous

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4 * NODES:
        pytest.skip(f"a process may open {hard} files here; {NODES} ranks in one need {4 * NODES}")
    stores: dict[int, Any] = {}
    seen = set[str]()

    def meet(index: int) -> None:
        place = RankContext(index, NODES, 0, 1, index, NODES, "localhost", "jsrun")
        stores[index] = comm_rendezvous.connect(place, timeout_s=300, run_dir=tmp_path, environment={"PROTTRANS_NONCE": "ab" * 16})

    threads = [threading.Thread(target=meet, args=(index,), daemon=True) for index in range(NODES)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        for thread in threads[:-1]:
            thread.start()
        deadline = time.monotonic() + 240
        while not seen and time.monotonic() < deadline:  # it stays until the last has come
            seen.update(path.name for path in tmp_path.glob(".rendezvous-*.json"))
        threads[-1].start()
        for thread in threads:
            thread.join(300)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sorted(stores) == list(range(NODES))
    assert len(seen) == 1 and not list(tmp_path.iterdir())
    stores[NODES - 1].set("from the last", "to the first")
    assert stores[0].get("from the last") == b"to the first"


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


def test_every_rank_reads_eight_lanes_of_its_own_and_few_ranks_would_read_the_same() -> None:
    """The published global batch of ProtTXL as lanes; what a rank reads is looked at for one rank in 400."""
    from prottrans_hpc.corpus.lanes import LaneOrder
    from prottrans_hpc.corpus.order import ArrayLengths, SamplePosition
    from prottrans_hpc.recipe import Order
    from prottrans_hpc.train.lane_memory import own_lanes

    num_lanes, tokens = 44_928, 512
    own = [own_lanes(num_lanes, index, RANKS) for index in range(RANKS)]
    assert [lane for lanes in own for lane in lanes] == list(range(num_lanes)) and {len(lanes) for lanes in own} == {8}
    lengths = ArrayLengths(np.random.default_rng(0).integers(20, 1200, size=200_000))

    def read(lanes: range) -> list[list[int]]:
        order = LaneOrder(lengths, seed=4, order=Order(), num_lanes=num_lanes, piece_tokens=tokens, num_specials=2)
        pieces = order.pieces(SamplePosition(0, 1), np.array(lanes))
        assert np.bincount(pieces.piece_of, weights=pieces.num_tokens).tolist() == [tokens + 1] * len(lanes)
        return [pieces.ids.tolist(), pieces.offsets.tolist(), pieces.num_tokens.tolist()]

    for index in range(0, RANKS, 400):
        doubled = read(own_lanes(num_lanes, index // 2, RANKS // 2))  # half as many ranks: this one's lanes and a neighbour's
        mine = read(own[index])
        assert [column[: len(part)] for column, part in zip(doubled, mine, strict=True)] == mine
