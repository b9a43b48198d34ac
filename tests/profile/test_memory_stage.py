"""What is measured where memory is short: a policy that does not fit is left out, and takes nothing with it."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from prottrans_hpc import config
from prottrans_hpc.errors import ResourceError
from prottrans_hpc.launch.memory_policies import POLICIES
from prottrans_hpc.profile import memory_stage, memory_step
from prottrans_hpc.profile.memory_step import Measured, Trainee
from prottrans_hpc.recipe import read_recipe

MOST_PARAMETERS = 400_000
Alive = list["weakref.ref[Trainee]"]


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Alive:
    """Trainees that were made; none may be left when the next is. Those of recipes without recomputation, of more than two sequences, or of too many
    parameters ask the allocator for more than any computer has."""
    made: Alive = []

    class Watched(Trainee):
        def __init__(self, recipe: Any, *arguments: Any, **named: Any) -> None:
            assert not any(one() for one in made), "the one before takes memory still"
            made.append(weakref.ref(self))
            super().__init__(recipe, *arguments, **named)
            self.itself = self  # as graphs and hooks do

    def measure(trainee: Trainee) -> Measured:
        too_deep = sum(parameter.numel() for parameter in trainee.trained) > MOST_PARAMETERS
        too_much = too_deep or trainee.recipe.memory.recompute_every == 0 or trainee.recipe.loading.bin_residues > 2 * 128
        if too_much and trainee.lms:
            trainee.lms.pool.take(1 << 60)
        torch.empty(1 << 60 if too_much else 1)
        return real(trainee)

    real = memory_step.measure
    monkeypatch.setattr(memory_stage, "Trainee", Watched)
    monkeypatch.setattr(memory_stage, "measure", measure)
    return made


def request(tmp_path: Path, small_corpus: Path, *policies: str) -> dict[str, Any]:
    recipe = read_recipe("tiny_prot_bert", ("phases.0.max_residues=128", "loading.bin_residues=256"))
    sections = {name: config.to_json(POLICIES[name].memory) for name in policies}
    return {"recipe": config.to_json(recipe), "policies": sections, "corpus": str(small_corpus), "out": str(tmp_path / "found.json")}


def test_a_policy_that_memory_is_too_small_for_is_none_and_the_others_are_measured(
    tmp_path: Path, small_corpus: Path, alive: Alive, capsys: pytest.CaptureFixture[str]
) -> None:
    memory_stage.measure_policies(request(tmp_path, small_corpus, "none", "every layer", "LMS", "attention"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["none"] is found["LMS"] is None
    assert found["every layer"]["peak"] > 0
    assert found["attention"]["step_s"] > 0.0
    assert "none: a step of it needs more memory" in capsys.readouterr().err
    assert len(alive) == 4


def test_where_nothing_fits_the_message_says_what_to_do(tmp_path: Path, small_corpus: Path, alive: Alive) -> None:
    with pytest.raises(ResourceError, match=r"256 residues .* --set loading\.bin_residues=N"):
        memory_stage.measure_policies(request(tmp_path, small_corpus, "none"))


def test_a_search_takes_what_runs_out_of_memory_for_too_large(tmp_path: Path, small_corpus: Path, alive: Alive) -> None:
    own = request(tmp_path, small_corpus, "every layer", "none") | {"budget_bytes": 1 << 40}
    guesses = {"every layer": {"layers": 1, "sequences": 3}, "none": {"layers": 1, "sequences": 1}}
    memory_stage.study_policies(own | {"guesses": guesses})
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["every layer"]["sequences"] == 2
    assert MOST_PARAMETERS - 60_000 < found["every layer"]["parameters"] <= MOST_PARAMETERS
    assert (found["none"]["layers"], found["none"]["sequences"], found["none"]["step_s"]) == (0, 0, None)


def test_another_error_goes_on(tmp_path: Path, small_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(memory_stage, "measure", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        memory_stage.measure_policies(request(tmp_path, small_corpus, "none"))
