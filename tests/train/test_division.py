"""Who holds and who writes which piece, as pure arithmetic, against brute force, and at the published size."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prottrans_hpc.train.division import Cut, Division, first_holders, holder, intersection, num_holders, volume
from prottrans_hpc.train.piece_plan import MAX_WRITERS, MIN_BYTES_A_WRITER, from_json, plan_pieces
from prottrans_hpc.train.saving import plan_piece_files

GRIDS = [(6,), (2, 3), (3, 2), (2, 2, 2), (1, 4), (4, 1, 2)]


@st.composite
def divided(draw: st.DrawFn) -> tuple[Division, int]:
    """A tensor cut along some of the axes of a grid of ranks, in any order."""
    grid = draw(st.sampled_from(GRIDS))
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)))
    axes = draw(st.permutations(range(len(grid))))[: draw(st.integers(0, len(grid)))]
    cuts = tuple(Cut(draw(st.integers(0, len(shape) - 1)), grid[axis], int(np.prod(grid[axis + 1 :], initial=1))) for axis in axes)
    return Division(shape, cuts), int(np.prod(grid))


@given(divided(), st.randoms())
def test_pieces_cover_a_tensor_once_and_who_holds_them_is_known(case: tuple[Division, int], dice: Any) -> None:
    division, world_size = case
    boxes = [division.box_of(rank) for rank in range(world_size)]
    counted = np.zeros(division.shape, dtype=int)
    for rank in {division.first_holder(rank) for rank in range(world_size)}:
        counted[tuple(slice(*bounds) for bounds in boxes[rank])] += 1
    assert (counted == 1).all()
    for rank in range(world_size):
        others = [other for other in range(world_size) if division.first_holder(other) == division.first_holder(rank)]
        copies = num_holders(division.cuts, world_size)
        assert [holder(division.cuts, world_size, others[0], number) for number in range(copies)] == others
        assert {boxes[other] for other in others} == {boxes[rank]}
    assert set(first_holders(division.cuts)) == {division.first_holder(rank) for rank in range(world_size)}
    wanted = tuple(sorted((dice.randint(0, size), dice.randint(0, size))) for size in division.shape)
    wanted = tuple((begin, end) for begin, end in wanted)
    expected = {(division.first_holder(rank), box) for rank, box in enumerate(boxes) if volume(intersection(box, wanted))}
    assert set(division.holders_of(wanted)) == expected


@settings(max_examples=50)
@given(st.sampled_from(GRIDS), st.integers(0, 20), st.integers(0, 2**32))
def test_every_piece_is_written_once_by_a_rank_that_holds_it(grid: tuple[int, ...], num_tensors: int, seed: int) -> None:
    random, world_size = np.random.default_rng(seed), int(np.prod(grid))
    tensors: dict[str, dict[str, tuple[Division, int]]] = {"model": {}, "optimizer": {}}
    for number in range(num_tensors):
        axes = [axis for axis in range(len(grid)) if random.integers(2)]
        shape = tuple(int(size) for size in random.integers(1, 9, size=2))
        division = Division(shape, tuple(Cut(int(random.integers(2)), grid[axis], int(np.prod(grid[axis + 1 :], initial=1))) for axis in axes))
        tensors[str(random.choice(["model", "optimizer"]))][f"t{number}"] = (division, int(random.integers(1, 64 * MIN_BYTES_A_WRITER)))
    plan = plan_pieces(tensors, world_size)
    again = from_json(json.loads(json.dumps(plan.to_json())))
    for kind, named in tensors.items():
        written: Counter[tuple[str, Any]] = Counter()
        files = {file.name: file for file in plan_piece_files(plan) if file.kind == kind}
        for file in files.values():
            written.update((name, named[name][0].box_of(file.rank)) for name in file.tensors if volume(named[name][0].box_of(file.rank)))
        whole = {(name, division.box_of(rank)) for name, (division, _) in named.items() for rank in range(world_size)}
        assert written == Counter(piece for piece in whole if volume(piece[1]))
        for name, (division, _) in named.items():
            wanted = division.box_of(world_size - 1)
            if not volume(wanted):
                continue
            found = again.files_with(kind, {name: wanted})
            assert found == sorted(file.name for file in files.values() if name in file.tensors and volume(intersection(wanted, division.box_of(file.rank))))


def test_copies_are_dealt_out_over_the_nodes() -> None:
    # 64 nodes of 6 ranks, a copy of the model on each node.
    cuts = (Cut(0, 6, 1),)
    tensors = {"model": {f"w{i}": (Division((600, 1000), cuts), 2_400_000) for i in range(100)}}
    plan = plan_pieces(tensors, 384)
    files = plan_piece_files(plan)
    nodes = Counter(file.rank // 6 for file in files)
    assert len(nodes) == MAX_WRITERS // 6 and set(nodes.values()) == {6}
    assert sorted(nodes) == [number * 64 // len(nodes) for number in range(len(nodes))], "evenly over the machine"
    assert Counter(len(file.tensors) for file in files) == Counter({10: 60})


@pytest.fixture(scope="module")
def prot_t5_xl() -> dict[str, tuple[int, ...]]:
    import torch

    from prottrans_hpc import architecture
    from prottrans_hpc.stage import find

    record = architecture.get("prot_t5")
    with torch.device("meta"):
        module: Any = find(record.build)(record.size("prot_t5_xl_bfd").shape)
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("grid", [(5616,), (936, 6), (52, 108), (702, 8)], ids=lambda grid: "x".join(map(str, grid)))
def test_no_plan_of_all_ranks_at_the_published_size(prot_t5_xl: dict[str, tuple[int, ...]], grid: tuple[int, ...], record_property: Any) -> None:
    """What every one of 5,616 ranks computes and what state.json holds, for ProtT5-XL cut over all ranks, nodes, racks or tensor groups."""
    cuts = (Cut(0, grid[-1], 1),)
    model = {name: (Division(shape, cuts), 4 * volume(Division(shape).whole)) for name, shape in prot_t5_xl.items()}
    optimizer = {f"{moment}.{name}": entry for moment in ("exp_avg", "exp_avg_sq") for name, entry in model.items()}
    began = time.process_time()
    plan = plan_pieces({"model": model, "optimizer": optimizer}, 5616)
    files = plan_piece_files(plan)
    planning_s = time.process_time() - began
    described = json.dumps({"pieces": plan.to_json(), "files": {kind: [file.name for file in files if file.kind == kind] for kind in plan.groups}}, indent=1)
    # A reader of another layout (8 ranks) and one of the same find their files.
    began = time.process_time()
    again = from_json(json.loads(described)["pieces"])
    own = again.files_with("model", {name: division.box_of(4321) for name, (division, _) in model.items()})
    others = again.files_with("optimizer", {name: Division(division.shape, (Cut(0, 8, 1),)).box_of(5) for name, (division, _) in optimizer.items()})
    finding_s = time.process_time() - began
    for figure, value in {"planning_s": planning_s, "finding_s": finding_s, "state_bytes": len(described), "files": len(files)}.items():
        record_property(figure, value)
    writers = {file.rank for file in files}
    assert len(writers) == max(grid[-1], MAX_WRITERS // grid[-1] * grid[-1])
    assert len(files) == 2 * len(writers)
    assert len(described) < 5_000_000
    assert 1 <= len(own) <= len(writers) // grid[-1], "nobody opens another part's files to go on as before"
    assert len(others) <= len(writers)
    # The status all-reduce of a step during a save stays small beside a step's gradients.
    assert len(files) * 7 * 8 < 1_000_000
