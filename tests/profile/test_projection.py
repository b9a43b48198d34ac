"""`prottrans project-scaling`: files, text, refusals; and the form of the published figure from Summit's numbers."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from prottrans_hpc.launch import cli

STUDY = Path(__file__).with_name("scaling.json")
SIZES = [1, 2, 4, 8, 18, 72, 288, 936]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["project-scaling", *arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


def summit(capsys, recipe: str, *more: str) -> dict:
    code, out, err = run(capsys, recipe, "--machine", "summit", "--nodes", ",".join(map(str, SIZES)), "--json", *more)
    assert code == 0, err
    return json.loads(out)


def test_the_form_of_the_published_figure(capsys):
    """Elnaggar et al. 2021, Figure 2: overhead rises from 1 to 2 nodes, then stays to 936; ProtBert's is above ProtTXL's."""
    curves = {}
    for recipe in ("prot_txl", "prot_txl_bfd", "prot_bert"):
        projection = summit(capsys, recipe)
        assert projection["basis"] == "assumed"
        overhead = [point["overhead"] for point in projection["points"]]
        assert overhead[0] == 0.0
        assert all(later >= earlier - 1e-12 for earlier, later in pairwise(overhead)), "never falls"
        assert overhead[1] > 0.5 * overhead[-1], "most of it comes with the second node"
        assert overhead[-1] - overhead[1] < 0.005, "and then half a percent of a step at most"
        assert projection["points"][-1]["ranks"] == 5616
        assert projection["points"][-1]["efficiency"] > 0.99
        curves[recipe] = overhead
    assert all(bert > txl for bert, txl in zip(curves["prot_bert"][1:], curves["prot_txl"][1:], strict=True))
    assert all(bert > txl for bert, txl in zip(curves["prot_bert"][1:], curves["prot_txl_bfd"][1:], strict=True))


def test_layers_that_are_computed_again_take_their_time(capsys):
    plain, again = (summit(capsys, "prot_bert", *more)["points"][0]["step_s"] for more in ((), ("--set", "memory.recompute_every=1")))
    assert again == pytest.approx(4 / 3 * plain, rel=0.02)


def test_a_flat_ring_would_not_have_had_that_form(capsys):
    rows = summit(capsys, "prot_bert", "--what-if")["what_if"]
    by_change = {row["change"]: row["overhead"] for row in rows}
    assert by_change["flat ring over all ranks"] > 1.0 > by_change["as it is"]


def test_every_assumption_is_printed(capsys):
    code, out, _ = run(capsys, "prot_txl", "--machine", "summit", "--nodes", "1,936")
    assert code == 0
    assert "from assumed numbers, none of them measured" in out
    for said in ("4 sequences a rank", "5.8 TFLOP/s", "409 M of 2 bytes", "25 GB/s and 6.6 us", "it is no confidence interval"):
        assert said in out
    assert "5,616" in out


def test_recipe_settings_change_the_projection(capsys):
    flat = summit(capsys, "prot_bert")
    half = summit(capsys, "prot_bert", "--set", "parallel.compression=fp16")
    hierarchical = summit(capsys, "prot_bert", "--set", "parallel.reduction=hierarchical")
    assert half["points"][-1]["communication_s"] < 0.6 * flat["points"][-1]["communication_s"]
    assert (flat["algorithm"], hierarchical["algorithm"]) == ("ring_or_tree", "hierarchical")


def test_a_model_cut_within_nodes_scales_and_one_cut_over_all_ranks_does_not(capsys):
    """Over 5,616 ranks a ring has as many messages for every layer; within a node it has five, and only sums of a sixth cross."""
    rows = summit(capsys, "prot_bert", "--what-if")["what_if"]
    by_change = {row["change"]: row["overhead"] for row in rows}
    over_all, within = by_change["the model cut over all ranks"], by_change["the model cut within each node, a copy on every node"]
    assert over_all > 1.0 > 0.05 > within
    for settings, overhead in (("full", over_all), ("hybrid", within)):
        projection = summit(capsys, "prot_bert", "--set", f"parallel.sharding={settings}", "--what-if")
        assert projection["points"][-1]["overhead"] == pytest.approx(overhead)
        assert any("31 equal parts" in line for line in projection["assumptions"])  # 30 layers and the rest
        changes = [row["change"] for row in projection["what_if"]]
        assert "every rank holds the whole model" in changes
        assert not any("bucket" in change for change in changes)


def test_low_rank_sends_factors_and_computes_them(capsys):
    whole, low = (summit(capsys, "prot_bert", *more)["points"][-1] for more in ((), ("--set", "parallel.compression=powersgd")))
    assert low["communication_s"] < whole["communication_s"] / 4  # of 17 thousandths of the bytes, most is latency
    assert low["exposed_comm_s"] > 0
    ranks = (summit(capsys, "prot_bert", "--set", "parallel.compression=powersgd", "--set", f"parallel.powersgd_rank={rank}") for rank in (4, 32))
    four, many = (projection["points"][-1]["exposed_comm_s"] for projection in ranks)
    assert four < many


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prot_bert", "--machine", "nvl72", "--nodes", "2"], "no [network] section"),
        (["prot_bert", "--machine", "summit", "--nodes", "9999"], "at most 4,608 nodes"),
        (["prot_bert", "--machine", "summit", "--nodes", "2", "--set", "precision=bf16"], "does not compute in bf16"),
        (["prot_bert", "--machine", "summit", "--nodes", "3", "--set", "parallel.sharding=hybrid", "--set", "parallel.shard_ranks=12"], "take 2 or 4 nodes"),
        (["prot_bert", "--machine", "summit", "--nodes", "2", "--set", "parallel.tensor_ranks=4"], "does not divide a node of 6 ranks"),
        (["prot_bert", "--machine", "summit", "--nodes", "2", "--comm", "links"], "with --machine the links are those of the profile"),
        (["prot_bert", "--machine", "summit", "--nodes", "two"], "not a list of numbers of nodes"),
        (["somewhere", "--nodes", "2", "--set", "seed=1"], "a measured study has its own"),
    ],
)
def test_what_cannot_be_projected_is_refused(capsys, arguments, said):
    code, _, err = run(capsys, *arguments)
    assert code == 64
    assert said in err


def test_a_study_gets_its_projection_beside_it(capsys, tmp_path):
    shutil.copy(STUDY, tmp_path / "scaling.json")
    code, out, _ = run(capsys, str(tmp_path), "--nodes", "1,8,936", "--what-if")
    assert code == 0
    projection = json.loads((tmp_path / "projection.json").read_text())
    assert (projection["format"], projection["basis"], projection["hold_out"]["nodes"]) == (1, "measured", 8)
    assert [point["nodes"] for point in projection["points"]] == [1, 8, 936]
    assert "from measured points" in out
    assert f"{100 * projection['hold_out']['error']:+.1f} %" in out


def test_a_folder_without_a_study_is_told(capsys, tmp_path):
    code, _, err = run(capsys, str(tmp_path), "--nodes", "936")
    assert code == 66
    assert "prottrans scale" in err
