"""Hierarchical sums and smaller gradients over Horovod, by real ranks under mpirun: the bits of the torch back end wherever the order of sums is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prottrans_hpc.errors import RankLostError

HERE = ((0, 0), (0, 1))
TWO_NODES = (*HERE, (1, 0), (1, 1))
NAMES = ("fp16", "bf16", "powersgd")
SETTINGS: dict[str, dict[str, Any]] = {
    "hierarchical": {"reduction": "hierarchical"},
    **{name: {"reduction": "hierarchical", "compression": name} for name in NAMES},
    "flat-powersgd": {"compression": "powersgd"},
    "flat": {},
}
"""The first wants process sets, so that one start of Horovod does for all."""

pytestmark = [pytest.mark.horovod, pytest.mark.mpi]


def run_both(starts, folder: Path, scenarios: str, settings: dict[str, dict[str, Any]], places) -> dict[str, list[dict[str, Any]]]:
    """The reports of each back end's ranks."""
    for name in ("torch", "horovod"):
        (folder / name).mkdir()
    by_torch = starts.run(folder / "torch", scenarios, settings, places)
    by_horovod = starts.run_mpirun(folder / "horovod", scenarios, settings, len(places), sum(node == 0 for node, _ in places))
    for ended in (by_torch, by_horovod):
        assert set(ended.codes) == {0}, ended.stderr
        assert len(ended.reports) == len(places)
    return {"torch": by_torch.reports, "horovod": by_horovod.reports}


@pytest.fixture(scope="module")
def on_two_nodes(reduction_starts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return run_both(reduction_starts, tmp_path_factory.mktemp("nodes"), "sums,scales,poisoned,forgotten", SETTINGS, TWO_NODES)


@pytest.fixture(scope="module")
def on_one_node(reduction_starts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return run_both(reduction_starts, tmp_path_factory.mktemp("node"), "sums,scales,poisoned,feedback", {name: {"compression": name} for name in NAMES}, HERE)


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_two_ranks_get_the_bits_of_the_torch_back_end(on_one_node, name: str) -> None:
    for scenario in ("sums", "scales", "poisoned"):
        assert on_one_node["horovod"][0][name][scenario] == on_one_node["torch"][0][name][scenario], scenario


def test_low_rank_is_as_near_as_on_the_torch_back_end(on_one_node) -> None:
    """Not its bits: which columns a first step looks for is drawn by bucket, and the back ends lay out their buckets in different orders."""
    by_torch, by_horovod = (on_one_node[back_end][0]["powersgd"] for back_end in ("torch", "horovod"))
    assert by_horovod["sums"]["error"] == pytest.approx(by_torch["sums"]["error"], rel=0.05)
    assert by_horovod["feedback"]["errors"][-1] == pytest.approx(by_torch["feedback"]["errors"][-1], rel=0.25)
    assert by_horovod["feedback"]["errors"][-1] < by_horovod["feedback"]["errors"][0] / 4


@pytest.mark.parametrize("name", SETTINGS)
def test_all_ranks_have_the_same_bits(on_two_nodes, name: str) -> None:
    reports = on_two_nodes["horovod"]
    for scenario, key in (("sums", "straight"), ("poisoned", "digest")):
        assert len({report[name][scenario][key] for report in reports}) == 1, scenario


@pytest.mark.parametrize("name", ["hierarchical", "fp16", "bf16"])
def test_two_nodes_of_two_get_the_bits_of_the_torch_back_end(on_two_nodes, name: str) -> None:
    """Within a node it is summed in the order of its ranks, and between two nodes there is one order only."""
    for scenario in ("sums", "scales"):
        assert on_two_nodes["horovod"][0][name][scenario] == on_two_nodes["torch"][0][name][scenario], scenario


@pytest.mark.parametrize(("name", "most"), [("hierarchical", 2e-6), ("fp16", 2.0**-11), ("bf16", 2.0**-8)])
def test_a_start_in_the_middle_has_the_bits_of_any_other(on_two_nodes, name: str, most: float) -> None:
    for report in on_two_nodes["horovod"]:
        sums = report[name]["sums"]
        assert sums["straight"] == sums["resumed"] == sums["again"]
        assert 0 < sums["error"] <= most


@pytest.mark.parametrize("back_end", ["torch", "horovod"])
@pytest.mark.parametrize("name", ["powersgd", "flat-powersgd"])
def test_a_return_within_the_process_is_one_in_a_new_process(on_two_nodes, back_end: str, name: str) -> None:
    for report in on_two_nodes[back_end]:
        assert report[name]["forgotten"] == report[name]["sums"]["resumed"] != report[name]["sums"]["straight"]


@pytest.mark.parametrize("name", SETTINGS)
def test_an_undefined_number_reaches_all_ranks_and_no_later_step(on_two_nodes, name: str) -> None:
    assert [report[name]["poisoned"]["finite"] for report in on_two_nodes["horovod"]] == [[True, False, True]] * 4


def test_ranks_whose_buckets_are_full_in_another_order_do_not_wait_for_one_another(reduction_starts, tmp_path: Path) -> None:
    ended = reduction_starts.run_mpirun(tmp_path, "late", {"fp16": {"compression": "fp16"}, "powersgd": {"compression": "powersgd"}}, 3, 3)
    assert ended.codes == [0], ended.stderr
    for name, most in (("fp16", 2.0**-11), ("powersgd", 2.0)):
        assert len({report[name]["late"]["digest"] for report in ended.reports}) == 1
        assert 0 < ended.reports[0][name]["late"]["error"] <= most


def test_a_rank_that_hangs_is_an_error_of_the_other_after_the_time_out(reduction_starts, tmp_path: Path) -> None:
    ended = reduction_starts.run_mpirun(tmp_path, "stopped", {"fp16": {"compression": "fp16", "timeout_s": 10}}, 2, 2)
    assert ended.codes == [RankLostError.exit_code], ended.stderr
    # mpirun wakes the stopped rank to end it, which may find time to give up, too.
    assert {report["error"] for report in ended.reports} == {"RankLostError"}


def test_a_rank_that_dies_ends_the_job(reduction_starts, tmp_path: Path) -> None:
    ended = reduction_starts.run_mpirun(tmp_path, "killed", {"fp16": {"compression": "fp16", "timeout_s": 20}}, 2, 2)
    assert ended.codes[0] not in (0, 124), ended.stderr
