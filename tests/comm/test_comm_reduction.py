"""Hierarchical sums and smaller gradients, by real ranks in "nodes": how exact they are, and that all ranks and all starts get the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prottrans_hpc import recipe
from prottrans_hpc.comm_reduction import node_members
from prottrans_hpc.errors import RankLostError

HIERARCHICAL = {"reduction": "hierarchical"}
SETTINGS: dict[str, dict[str, Any]] = {
    "flat": {},
    **{name: HIERARCHICAL | ({"compression": name} if name != "none" else {}) for name in ("none", "fp16", "bf16", "powersgd")},
    "flat-powersgd": {"compression": "powersgd"},
}


@pytest.fixture(scope="module")
def summed(reduction_starts, tmp_path_factory: pytest.TempPathFactory):
    """Every kind of sum by two nodes of two ranks."""
    ended = reduction_starts.run(tmp_path_factory.mktemp("sums"), "sums,scales,poisoned,feedback", SETTINGS)
    assert set(ended.codes) == {0}, ended.stderr
    return ended


@pytest.mark.parametrize("name", SETTINGS)
def test_all_ranks_have_the_same_bits(summed, name: str) -> None:
    assert len({report[name]["sums"]["straight"] for report in summed.reports}) == 1


@pytest.mark.parametrize("name", [name for name in SETTINGS if "powersgd" not in name])
def test_the_first_step_after_a_resume_has_the_bits_of_any_other(summed, name: str) -> None:
    for report in summed.reports:
        assert report[name]["sums"]["straight"] == report[name]["sums"]["resumed"] == report[name]["sums"]["again"]


@pytest.mark.parametrize("name", ["powersgd", "flat-powersgd"])
def test_what_low_rank_left_out_is_lost_at_a_resume_and_nothing_else(summed, name: str) -> None:
    for report in summed.reports:
        assert report[name]["sums"]["straight"] != report[name]["sums"]["resumed"]
        assert report[name]["sums"]["resumed"] == report[name]["sums"]["again"]


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("none", 0.0, 2e-6), ("fp16", 1e-5, 2.0**-11), ("bf16", 1e-4, 2.0**-8)],
)
def test_a_sum_is_as_exact_as_its_type(summed, name: str, least: float, most: float) -> None:
    assert least <= summed.reports[0][name]["sums"]["error"] <= most


def test_large_and_small_gradients_fit_into_fp16(summed) -> None:
    assert max(summed.reports[0]["fp16"]["scales"].values()) <= 2.0**-11


@pytest.mark.parametrize("name", SETTINGS)
def test_an_undefined_number_reaches_all_ranks_and_no_later_step(summed, name: str) -> None:
    assert [report[name]["poisoned"]["finite"] for report in summed.reports] == [[True, False, True]] * 4
    assert len({report[name]["poisoned"]["digest"] for report in summed.reports}) == 1


@pytest.mark.parametrize("name", ["powersgd", "flat-powersgd"])
def test_what_low_rank_leaves_out_comes_with_later_steps(summed, name: str) -> None:
    errors = summed.reports[0][name]["feedback"]["errors"]
    assert errors[-1] < errors[0] / 4


def test_unequal_nodes_sum_flat_and_say_so(reduction_starts, tmp_path: Path) -> None:
    narrow = {"bf16": {"compression": "bf16"}, "fp16": {"compression": "fp16"}}
    ended = reduction_starts.run(tmp_path, "sums", {"asked": HIERARCHICAL, "flat": {}, **narrow}, ((0, 0), (0, 1), (1, 0)))
    assert set(ended.codes) == {0}, ended.stderr
    assert ended.stderr.count("flat is used here") == 9  # three models on each of three ranks
    for report in ended.reports:
        assert report["asked"] == report["flat"]
        for name, most in (("fp16", 2.0**-11), ("bf16", 2.0**-8)):
            assert report[name]["sums"]["straight"] == report[name]["sums"]["resumed"] == ended.reports[0][name]["sums"]["straight"]
            assert 1e-5 < report[name]["sums"]["error"] <= most


def test_a_rank_that_dies_ends_the_others_in_time(reduction_starts, tmp_path: Path) -> None:
    ended = reduction_starts.run(tmp_path, "killed", {"none": HIERARCHICAL})
    assert ended.codes[:3] == [RankLostError.exit_code] * 3, ended.stderr
    assert [report["error"] for report in ended.reports] == ["RankLostError"] * 3


@pytest.mark.gpu
def test_four_gpus_get_the_same_bits_on_every_rank_and_in_every_start(reduction_starts, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 4:
        pytest.skip("two nodes of two ranks take four GPUs")
    ended = reduction_starts.run(tmp_path, "sums,poisoned", {name: SETTINGS[name] for name in ("none", "fp16", "bf16", "powersgd")}, gpus=True)
    assert set(ended.codes) == {0}, ended.stderr
    for name, most in (("none", 2e-6), ("fp16", 2.0**-11), ("bf16", 2.0**-8), ("powersgd", 2.0)):
        sums = [report[name]["sums"] for report in ended.reports]
        assert len({one["straight"] for one in sums}) == 1
        assert sums[0]["error"] <= most
        assert sums[0]["resumed"] == sums[0]["again"]
        assert [report[name]["poisoned"]["finite"] for report in ended.reports] == [[True, False, True]] * 4


@pytest.mark.parametrize(
    ("places", "nodes"),
    [
        ([(0, 0), (0, 1), (1, 0), (1, 1)], [[0, 1], [2, 3]]),
        ([(1, 0), (0, 0), (1, 1), (0, 1)], [[1, 3], [0, 2]]),
        ([(0, 0), (1, 0), (2, 0)], None),
        ([(0, 0), (0, 1)], None),
        ([(0, 0), (0, 1), (1, 0)], None),
    ],
    ids=["two nodes", "dealt out in turn", "one rank a node", "one node", "unequal"],
)
def test_where_a_hierarchy_gains_something(places, nodes) -> None:
    assert node_members(places) == nodes


def test_only_what_is_lossy_defines_the_experiment() -> None:
    def science(*settings: str) -> dict[str, Any]:
        return recipe.science(recipe.read_recipe("tiny_prot_bert", settings))

    assert science("parallel.reduction=hierarchical", "parallel.powersgd_rank=2") == science()
    assert science("parallel.compression=bf16") == {**science(), "compression": {"name": "bf16"}}
    assert science("parallel.compression=powersgd") == {**science(), "compression": {"name": "powersgd", "rank": 4}}


def test_low_rank_wants_gradients_of_one_scale() -> None:
    from prottrans_hpc.errors import ConfigError

    with pytest.raises(ConfigError, match="powersgd"):
        recipe.read_recipe("tiny_prot_bert", ("parallel.compression=powersgd", "precision=fp16"))


@pytest.mark.parametrize("precision", ["bf16_o2", "bf16_o3"])
def test_horovod_adds_up_no_gradients_in_bf16_and_what_to_take_is_said(precision: str) -> None:
    from prottrans_hpc.errors import ConfigError

    settings = ("parallel.comm=horovod", f"precision={precision}")
    with pytest.raises(ConfigError, match=r"does not add up: take bf16, whose gradients are fp32 \(parallel.compression = 'bf16'"):
        recipe.read_recipe("tiny_prot_bert", settings)
    assert recipe.read_recipe("tiny_prot_bert", ("parallel.comm=horovod", "precision=bf16", "parallel.compression=bf16")).parallel.compression == "bf16"
