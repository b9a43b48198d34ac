"""The stages behind `prottrans memory --measure`: a recipe's step under each of some policies, watched and timed; and how large a model and a
batch each makes possible under a budget of bytes, found by steps that are watched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import architecture, durable, terminal
from ..architectures.growth import grown
from ..config import parse
from ..corpus.reader import Corpus
from ..recipe import Recipe, recipe_from_json
from ..recipe_memory import Memory
from ..stage import Request
from .memory_step import Trainee, measure, some_corpus, step_seconds


def measure_policies(request: Request) -> None:
    """Write what each policy took, by name, to the file `out`; None for one that this computer cannot run.

    `recipe` and `policies` (name -> the recipe's section of memory) are JSON; `corpus` is a folder or None.
    """
    recipe = recipe_from_json(request["recipe"], source="the request")
    folder = Path(request["corpus"]) if request["corpus"] else None
    found: dict[str, Any] = {}
    with some_corpus(folder, num_residues=num_residues(recipe)) as corpus:
        for name, values in request["policies"].items():
            terminal.note(f"measuring: {name}")
            trainee = Trainee(replace(recipe, memory=parse(Memory, values, source=name)), corpus)
            found[name] = asdict(measure(trainee)) | {"step_s": step_seconds(trainee), "device": trainee.device.type}
    durable.write_json(Path(request["out"]), found)


def num_residues(recipe: Recipe) -> int:
    """Of a full micro batch and of all lanes."""
    longest = max(phase.max_residues for phase in recipe.phases)
    bins = max(recipe.loading.bin_residues, longest)
    # Each lane reads a part of the corpus of its own, piece after piece.
    return 4 * bins if architecture.get(recipe.architecture.name).lanes else bins


def study_policies(request: Request) -> None:
    """Write the largest model and micro batch that `budget_bytes` has room for under each policy to the file `out`.

    As `measure_policies`; `guesses` has by policy the number of layers and of sequences at which the search begins. A step's time is that of
    the largest micro batch.
    """
    recipe = recipe_from_json(request["recipe"], source="the request")
    record = architecture.get(recipe.architecture.name)
    shape = record.size(recipe.architecture.size).shape
    longest = max(phase.max_residues for phase in recipe.phases)
    most = max(guess["sequences"] for guess in request["guesses"].values())
    found: dict[str, Any] = {}
    with some_corpus(Path(request["corpus"]) if request["corpus"] else None, num_residues=8 * (most + 2) * longest) as corpus:
        for name, values in request["policies"].items():
            terminal.note(f"searching: {name}")
            own, guess = replace(recipe, memory=parse(Memory, values, source=name)), request["guesses"][name]
            room = _Room(own, corpus, shape, longest, request["budget_bytes"])
            deep, wide = largest_near(guess["layers"], room.has_layers), largest_near(guess["sequences"], room.has_sequences)
            trainee = Trainee(_sized(own, wide * longest), corpus) if wide else None
            parameters = record.num_parameters(grown(shape, deep)) if deep else 0
            found[name] = {"layers": deep, "parameters": parameters, "sequences": wide, "step_s": step_seconds(trainee) if trainee else None}
    durable.write_json(Path(request["out"]), found)


def largest_near(guess: int, fits: Callable[[int], bool]) -> int:
    """The largest number that fits, searched step by step from a guess; 0 where 1 does not."""
    number = max(1, guess)
    if fits(number):
        while fits(number + 1):
            number += 1
        return number
    while number > 1:
        number -= 1
        if fits(number):
            return number
    return 0


def _sized(recipe: Recipe, bin_residues: int) -> Recipe:
    return replace(recipe, loading=replace(recipe.loading, bin_residues=bin_residues))


@dataclass(frozen=True)
class _Room:
    """A budget, and what is tried in it."""

    recipe: Recipe
    corpus: Corpus
    shape: Any
    longest: int
    budget_bytes: int

    def has_layers(self, number: int) -> bool:
        return self._peak(grown(self.shape, number), 1) <= self.budget_bytes

    def has_sequences(self, number: int) -> bool:
        return self._peak(self.shape, number) <= self.budget_bytes

    def _peak(self, shape: Any, num_sequences: int) -> int:
        return measure(Trainee(_sized(self.recipe, num_sequences * self.longest), self.corpus, shape=shape)).peak
