"""scaling.json in and out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from prottrans_hpc.errors import CheckpointError, DataError
from prottrans_hpc.profile.scaling import Sharing, read_scaling, write_scaling

SAMPLE = Path(__file__).with_name("scaling.json")
"""Numbers that were drawn, not measured: 1, 2, 4 and 8 nodes three times each; node 5 of the eight is slow."""


def test_the_file_comes_back_as_it_was_written(tmp_path):
    study = read_scaling(SAMPLE)
    write_scaling(tmp_path / "scaling.json", study)
    assert (tmp_path / "scaling.json").read_bytes() == SAMPLE.read_bytes()
    assert study.node_counts == (1, 2, 4, 8)
    assert [point.repetition for point in study.at(8)] == [1, 2, 3]


def test_what_was_sent_is_written_where_the_study_says_it(tmp_path):
    sharing = Sharing(compression="powersgd", sharding="hybrid", shard_ranks=4, units=3, sent_bytes=1000)
    study = replace(read_scaling(SAMPLE), sharing=sharing)
    write_scaling(tmp_path / "scaling.json", study)
    assert read_scaling(tmp_path) == study


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda values: values.update(format=2), "no scaling study of format 1"),
        (lambda values: values["points"][0]["step_s"].pop(), "so many numbers"),
        (lambda values: values.pop("points"), "missing key points"),
        (lambda values: values["points"][0].update(step_s=[0.0] * 10), "greater than 0"),
    ],
)
def test_a_damaged_file_is_told(tmp_path, change, said):
    values = json.loads(SAMPLE.read_text())
    change(values)
    (tmp_path / "scaling.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=said):
        read_scaling(tmp_path)


def test_a_missing_file_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(CheckpointError, match="prottrans scale"):
        read_scaling(tmp_path)
