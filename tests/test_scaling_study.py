"""Which points a study has, in which order, and where they lie."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from prottrans_hpc import scaling_study
from prottrans_hpc.errors import CheckpointError, ConfigError, DataError
from prottrans_hpc.recipe import read_recipe
from prottrans_hpc.scaling_study import Study, StudyDir, StudyPoint

STUDY = Study("tiny_prot_bert", "weak", (1, 2, 4), repetitions=3, warmup=2, steps=5, seed=42)


def test_every_repetition_has_every_size_once_in_an_order_of_its_own():
    points = STUDY.points()
    blocks = [points[start : start + 3] for start in (0, 3, 6)]
    assert [sorted(point.nodes for point in block) for block in blocks] == [[1, 2, 4]] * 3
    assert [{point.repetition for point in block} for block in blocks] == [{1}, {2}, {3}]
    assert points == STUDY.points()
    orders = Counter(tuple(point.nodes for point in replace(STUDY, seed=seed, repetitions=1).points()) for seed in range(60))
    assert len(orders) == 6


def test_sizes_and_repetitions_can_be_added():
    more = scaling_study.united(STUDY, replace(STUDY, nodes=(2, 8), repetitions=1))
    assert (more.nodes, more.repetitions) == ((1, 2, 4, 8), 3)
    assert set(STUDY.points()) < set(more.points())


@pytest.mark.parametrize("name", ["tiny_prot_bert", "tiny_prot_t5", "prot_bert"])
def test_a_point_is_the_first_phase_with_a_batch_that_fits_its_mode(name):
    recipe = read_recipe(name)
    first = recipe.phases[0]
    key = "global_batch_size" if first.global_batch_size else "global_batch_residues"
    for mode, factor in (("weak", 4), ("strong", 1)):
        point = replace(STUDY, mode=mode).recipe_of(recipe, 4)
        (phase,) = point.phases
        assert (phase.steps, phase.warmup_steps, phase.max_residues) == (8, 8, first.max_residues)
        assert getattr(phase, key) == factor * getattr(first, key)
        assert (point.optimizer, point.loading, point.parallel) == (recipe.optimizer, recipe.loading, recipe.parallel)


def test_a_point_is_measured_when_a_run_of_it_has_taken_every_step(tmp_path):
    folder, point = StudyDir(tmp_path), StudyPoint(2, 1)
    assert folder.attempts(point) == []
    for steps, expected in ((7, None), (8, "n0002-r1-again1")):
        run = folder.next_attempt(point)
        run.path.mkdir(parents=True)
        run.metrics.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, steps + 1)) + '{"step": 9')
        found = folder.measured(STUDY, point)
        assert (found.path.name if found else None) == expected
    folder.next_attempt(StudyPoint(2, 11)).path.mkdir()
    assert [run.path.name for run in folder.attempts(point)] == ["n0002-r1", "n0002-r1-again1"]


def test_the_study_comes_back_as_it_was_written(tmp_path):
    folder = StudyDir(tmp_path / "new" / "study")
    scaling_study.write_study(folder, STUDY)
    assert scaling_study.read_study(folder) == STUDY


def test_what_is_no_study_is_told(tmp_path):
    with pytest.raises(CheckpointError, match=r"study\.json"):
        scaling_study.read_study(StudyDir(tmp_path))
    (tmp_path / "study.json").write_text('{"format": 9}')
    with pytest.raises(DataError, match="format 1"):
        scaling_study.read_study(StudyDir(tmp_path))
    (tmp_path / "study.json").write_text('{"format": 1, "mode": "sideways"}')
    with pytest.raises(ConfigError, match="mode"):
        scaling_study.read_study(StudyDir(tmp_path))


@pytest.mark.parametrize("text", ["", "1,", "0,1", "-2", "1;2", "two"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match=r".*"):
        scaling_study.parse_nodes(text)


def test_sizes_are_sorted_and_single():
    assert scaling_study.parse_nodes("4,1, 2,1") == (1, 2, 4)
