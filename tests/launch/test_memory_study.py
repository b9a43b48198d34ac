"""Figure 3 as a command: the search finds the borders, by arithmetic and by real steps, and what is written agrees with what is printed."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from prottrans_hpc import architecture
from prottrans_hpc.architectures.growth import grown
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.launch import cli
from prottrans_hpc.launch.memory_findings import PUBLISHED, change
from prottrans_hpc.launch.memory_need import need_of
from prottrans_hpc.launch.memory_policies import POLICIES
from prottrans_hpc.launch.memory_room import GIB, MARGIN, Room
from prottrans_hpc.launch.memory_study import Finding, Setting, choose_policies, find, largest, room_text, sequences, setting_on
from prottrans_hpc.machine import read_machine
from prottrans_hpc.recipe import read_recipe

SUMMIT = read_machine("summit")


def setting(recipe: str = "prot_bert_bfd") -> Setting:
    return setting_on(read_recipe(recipe), SUMMIT, num_ranks=5616)


@pytest.mark.parametrize("border", [0, 1, 2, 3, 17, 64, 99, 100])
def test_the_largest_that_fits_is_found(border: int) -> None:
    assert largest(lambda number: number <= border, 100) == border


@pytest.mark.parametrize("policy", ["none", "every layer", "LMS"])
def test_one_more_does_not_fit(policy: str) -> None:
    chosen = setting()
    found, recipe = find(policy, POLICIES[policy], chosen), POLICIES[policy].of(chosen.recipe)
    for number in (found.local_batch, found.local_batch + 1):
        need = need_of(recipe, chosen.record, chosen.shape, [sequences(chosen, number)], chosen.rank)
        assert chosen.room.holds(need) == (number == found.local_batch)
    for layers in (found.num_layers, found.num_layers + 1):
        need = need_of(recipe, chosen.record, grown(chosen.shape, layers), [sequences(chosen, 1)], chosen.rank)
        assert chosen.room.holds(need) == (layers == found.num_layers)
    assert found.global_batch == 5616 * found.local_batch


@pytest.mark.parametrize("recipe", ["prot_bert_bfd", "prot_txl_bfd"])
def test_what_is_put_aside_fits_the_host_memory_of_a_node(recipe: str) -> None:
    chosen = setting(recipe)
    share = (1.0 - MARGIN) * 512 * GIB / 6
    for name in ("LMS", "LMS, host optimizer"):
        found, own = find(name, POLICIES[name], chosen), POLICIES[name].of(chosen.recipe)
        need = need_of(own, chosen.record, chosen.shape, [sequences(chosen, found.local_batch)], chosen.rank)
        assert 0 < need.moved <= need.on_host + need.moved <= share
        unlimited = find(name, POLICIES[name], replace(chosen, room=replace(chosen.room, host=None)))
        if recipe == "prot_bert_bfd":
            assert unlimited.local_batch > 2 * found.local_batch, "a profile that does not say sets no limit"
    assert "76.800 GiB of host memory" in room_text(chosen)
    assert "any amount of host memory (the profile has none)" in room_text(replace(chosen, room=replace(chosen.room, host=None)))


def test_the_hours_rest_on_the_rate_that_the_profile_says_was_seen() -> None:
    txl, bert = setting("prot_txl_bfd").speed, setting("prot_bert_bfd").speed
    assert (txl.flops_per_s, bert.flops_per_s) == (5.8e12, pytest.approx(0.3 * 15.7e12))
    assert "was seen to reach" in txl.source and "a guess" in bert.source


def test_large_model_support_gives_more_than_the_paper_had() -> None:
    for recipe, model in (("prot_txl_bfd", "ProtTXL"), ("prot_bert_bfd", "ProtBert")):
        chosen = setting(recipe)
        found = [find(name, POLICIES[name], chosen) for name in ("none", "LMS", "LMS, host optimizer")]
        assert (change(found, found[2], "parameters") or 0.0) > PUBLISHED["parameters"][model]
        assert (change(found, found[1], "local_batch") or 0.0) > 700.0
        assert (change(found, found[1], "epoch_hours") or 0.0) < 0.0, "larger batches sum gradients less often"


@pytest.mark.parametrize("name", sorted(architecture.BUILT_IN))
def test_every_family_grows_by_layers(name: str) -> None:
    record = architecture.get(name)
    shape = record.size("small").shape
    deeper = grown(shape, 2 * shape.num_layers)
    assert grown(shape, shape.num_layers) == shape
    assert record.num_parameters(deeper) > record.num_parameters(shape) or name == "prot_albert", "whose layers share their weights"
    assert record.activation_bytes(deeper, [100], "fp32") > 1.5 * record.activation_bytes(shape, [100], "fp32")


def test_a_policy_or_a_memory_that_nobody_knows_is_an_error_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"no policy is called 'lms'; there are 'none', .*'LMS'"):
        choose_policies(read_recipe("prot_bert"), ["lms"])
    with pytest.raises(ConfigError, match="give --budget-mib"):
        setting_on(read_recipe("prot_bert"), read_machine("laptop"), num_ranks=1)


def test_what_fits_nowhere_is_a_zero() -> None:
    found = find("none", POLICIES["none"], replace(setting(), room=Room(2**20, None)))
    assert found == Finding("none", 0, 0, 0, 0, None)


def test_the_files_say_what_the_table_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    code = cli.main(["memory", "study", "prot_txl_bfd", "--machine", "summit", "--racks", "52", "--policy", "LMS", "--out", str(tmp_path), "-q"])
    out = capsys.readouterr().out
    told = json.loads((tmp_path / "study.json").read_text())
    rows = list(csv.DictReader((tmp_path / "study.csv").open()))
    assert code == 0 and [row["policy"] for row in rows] == ["none", "LMS"] == [one["policy"] for one in told["policies"]]
    for row, one in zip(rows, told["policies"], strict=True):
        line = next(line for line in out.splitlines() if line.startswith(one["policy"]))
        assert f"{one['parameters']:,}" in line and f"{one['global_batch']:,}" in line and f"{one['epoch_hours']:,.2f}" in line
        assert int(row["parameters"]) == one["parameters"] and row["is_measured"] == "False"
    assert "+15.6%" in out and "+72.0%" in out
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG") and sorted(path.name for path in tmp_path.iterdir())[0] == "study.csv"


def test_real_steps_find_the_border_near_the_predicted_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    short = ("--set", "phases.0.max_residues=128", "--budget-mib", "8", "-q", "--json")
    found = {}
    for name, measure in (("predicted", ()), ("measured", ("--measure",))):
        code = cli.main(["memory", "study", "tiny_prot_bert", *measure, "--policy", "every layer", "--out", str(tmp_path / name), *short])
        assert code == 0
        found[name] = {one["policy"]: one for one in json.loads(capsys.readouterr().out)["policies"]}
    plain, again = found["measured"]["none"], found["measured"]["every layer"]
    assert again["parameters"] > plain["parameters"] and again["local_batch"] > plain["local_batch"] >= 1
    for policy, one in found["measured"].items():
        assert one["is_measured"] and one["epoch_hours"] > 0.0
        guess = found["predicted"][policy]
        assert one["local_batch"] == pytest.approx(guess["local_batch"], rel=0.25, abs=2)
        assert one["num_layers"] == pytest.approx(guess["num_layers"], rel=0.35, abs=2)
