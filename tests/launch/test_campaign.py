"""Preprocessing campaigns: the published numbers, arithmetic that a real corpus keeps to the byte, and use by plan and preprocess."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import pytest

from prottrans_hpc import config
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.launch import campaign, campaign_text
from prottrans_hpc.launch.campaign import Campaign, Expected, Rules, look_ahead, read_campaign
from prottrans_hpc.machine import read_machine

if TYPE_CHECKING:
    from tests.conftest import Prottrans

NAMES = [name for name in config.shipped_names("jobs") if name.startswith("preprocess_")]
# Elnaggar et al. 2021, table 1 and section 2: sequences, residues, GB of text; Xiao et al. 2021 for Pfam.
PUBLISHED = {
    "preprocess_uniref50": (45e6, 14e9, [26.0]),
    "preprocess_uniref100": (216e6, 88e9, [150.0]),
    "preprocess_bfd": (2122e6, 393e9, [527.0, 572.0, 734.0]),
    "preprocess_pfam": (32_593_668 + 1_715_454, None, []),
}


def test_the_campaigns_are_the_published_ones() -> None:
    assert set(NAMES) == set(PUBLISHED)
    for name, (sequences, residues, text_gb) in PUBLISHED.items():
        read = read_campaign(name)
        assert (read.expected.sequences, list(read.published.text_gb)) == (sequences, text_gb)
        assert read.expected.residues == residues or (residues is None and read.expected.residues_are_assumed)
        assert campaign.is_campaign(name) and read.description
        assert 100 < read.corpus_bytes / read.rules.shards / 2**20 < 160, "a shard has about 128 MiB of residues"
        assert 40_000 <= round(read.rules.validation * read.expected.sequences) <= 2e6


def test_the_records_of_bfd_were_56_bytes_a_residue_and_the_corpus_is_one() -> None:
    bfd = read_campaign("preprocess_bfd")
    assert bfd.published.records_tb is not None
    assert round(bfd.published.records_tb * 1e12 / bfd.expected.residues) == 56
    assert bfd.corpus_bytes / bfd.expected.residues == pytest.approx(1.05, abs=0.01)
    said = "\n".join(text for _, text in campaign_text.describe(look_ahead(bfd, read_machine("rhea"), 2)))
    for words in ("22 TB of records in 6,000 files: 56 bytes a residue, 54 times", "7.5 months", "2,928 to train on", "409.98 GB, 1.043 bytes a residue"):
        assert words in said


def test_the_rate_is_the_measured_one(repository: Path) -> None:
    measured = json.loads((repository / "benchmarks" / "results" / "preprocess.json").read_text())["end_to_end"]["mb_per_cpu_s"]
    assert pytest.approx(measured, rel=0.1) == campaign.MB_PER_CPU_S


@pytest.mark.parametrize("names", [True, False])
def test_the_bytes_are_those_of_a_real_corpus(names: bool, small_fasta: Path, tmp_path: Path, prottrans: Prottrans) -> None:
    prottrans("preprocess", str(small_fasta), "--out", str(tmp_path / "corpus"), "--validation", "0", *([] if names else ["--no-names"]))
    index = json.loads((tmp_path / "corpus" / "index.json").read_text())
    lines = small_fasta.read_bytes().split(b"\n")
    num_name_bytes = sum(len(line.split()[0]) - 1 for line in lines if line.startswith(b">"))
    expected = Expected(source="test", sequences=600, residues=index["residues"], header_bytes=1, name_bytes=round(num_name_bytes / 600))
    planned = Campaign(description="test", expected=expected, rules=Rules(shards=1, validation=0.0, names=names)).corpus_bytes
    planned += num_name_bytes - 600 * expected.name_bytes if names else 0
    with h5py.File(tmp_path / "corpus" / "train-00000.h5") as shard:
        stored = sum(dataset.nbytes for dataset in shard.values())
    assert stored - planned == (16 if names else 8), "each table of offsets has one more than there are sequences"
    assert planned == pytest.approx(index["bytes"], rel=0.05)


def test_more_nodes_end_sooner_until_the_file_system_limits() -> None:
    bfd, rhea = read_campaign("preprocess_bfd"), read_machine("rhea")
    one, two = look_ahead(bfd, rhea, 1), look_ahead(bfd, rhea, 2)
    assert one.work_hours == 2 * two.work_hours == pytest.approx(bfd.input_bytes / 193e6 / 16 / 3600)
    assert one.hours == two.hours == bfd.disk_hours and two.node_hours == 2 * one.node_hours
    with pytest.raises(ConfigError, match="at most 384 nodes, not 385"):
        look_ahead(bfd, rhea, 385)


def test_plan_says_it_and_gives_it_as_json(prottrans: Prottrans) -> None:
    said = prottrans("plan", "preprocess_uniref50", "--machine", "laptop").stdout
    assert said.startswith("preprocess_uniref50 on laptop: UniRef50: 45 M clusters, 14 billion residues")
    assert "104 to train on" in said and "node-hours" in said
    values = json.loads(prottrans("plan", "preprocess_bfd", "--machine", "rhea", "--nodes", "2", "--set", "rules.shards=3000", "--json").stdout)
    assert (values["num_nodes"], values["shards"], values["corpus_bytes"]) == (2, 3000, 409_976_000_000)


def test_preprocess_follows_the_campaign_and_its_own_options_overrule_it(small_fasta: Path, tmp_path: Path, prottrans: Prottrans) -> None:
    recipe = tmp_path / "few.toml"
    recipe.write_text((config.find_file("jobs", "preprocess_bfd")).read_text().replace("2_928", "3").replace("5e-05", "0.1"))
    done = prottrans("preprocess", "--campaign", str(recipe), str(small_fasta), "--out", str(tmp_path / "a"))
    assert "2,122,000,000 sequences and 393,000,000,000 residues are expected" in done.stderr
    assert "the corpus has 600 sequences, 2.8e-05 % of the 2,122,000,000 of BFD" in done.stderr
    index = json.loads((tmp_path / "a" / "index.json").read_text())
    assert (index["rules"]["shards"], index["rules"]["names"], index["rules"]["invalid"], index["split"]["validation"]) == (3, False, "x", 0.1)
    assert index["sources"][0]["release"].startswith("BFD (Steinegger")
    prottrans("preprocess", "--campaign", str(recipe), str(small_fasta), "--out", str(tmp_path / "b"), "--shards", "2", "--release", "mine")
    other = json.loads((tmp_path / "b" / "index.json").read_text())
    assert (other["rules"]["shards"], other["rules"]["names"], other["sources"][0]["release"]) == (2, False, "mine")


def test_a_corpus_of_about_the_expected_size_is_not_remarked_on() -> None:
    uniref50 = read_campaign("preprocess_uniref50")
    assert campaign_text.comparison(uniref50, 44_700_000) == ""
    assert "has 63,000,000 sequences, 140 % of the 45,000,000 of UniRef50" in campaign_text.comparison(uniref50, 63_000_000)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("rules.shards=0", "rules.shards = 0"),
        ("rules.validation=0.6", "validation must be from 0 to 0.5"),
        ("rules.dedupe=true", "did you mean 'dedup'"),
        ("expected.sequences=-1", "expected.sequences"),
    ],
)
def test_a_campaign_is_read_strictly(change: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_campaign("preprocess_bfd", (change,))


def test_a_recipe_of_the_other_kind_is_told_apart(prottrans: Prottrans) -> None:
    with pytest.raises(ConfigError, match="recipe for training"):
        read_campaign("tiny_prot_bert")
    assert not campaign.is_campaign("tiny_prot_bert")
    done = prottrans("pretrain", "preprocess_bfd", "--corpus", "nowhere", code=64)
    assert "preprocess_bfd is a recipe for a corpus: use it with prottrans preprocess --campaign preprocess_bfd" in done.stderr
