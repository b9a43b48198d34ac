"""The stages behind `prottrans memory --measure`: a recipe's step under each of some policies, watched and timed; and how large a model and a
batch each makes possible under a budget of bytes, found by steps that are watched."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from .. import architecture, durable, terminal
from ..architectures.growth import grown
from ..config import parse
from ..corpus.reader import Corpus
from ..errors import ResourceError, is_out_of_memory
from ..recipe import Recipe, recipe_from_json
from ..recipe_memory import Memory
from ..stage import Request
from .memory_step import Trainee, measure, some_corpus, step_seconds

Result = TypeVar("Result")


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
            own = replace(recipe, memory=parse(Memory, values, source=name))
            found[name] = _unless_too_much(partial(_measured, own, corpus))
            if found[name] is None:
                terminal.warn(f"{name}: a step of it needs more memory than there is here; it is left out")
    if found and not any(found.values()):
        raise ResourceError(
            f"no policy's step of micro batches of {recipe.loading.bin_residues:,} residues fits the memory here: take smaller ones, "
            "--set loading.bin_residues=N, or measure on a larger computer; without --measure all is predicted"
        )
    durable.write_json(Path(request["out"]), found)


def _measured(recipe: Recipe, corpus: Corpus) -> dict[str, Any]:
    trainee = Trainee(recipe, corpus)
    return asdict(measure(trainee)) | {"step_s": step_seconds(trainee), "device": trainee.device.type}


def _unless_too_much(work: Callable[[], Result]) -> Result | None:
    """What work gives; None where memory ran out. It begins with as much room as the one before: nothing that is dead stays."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        return work()
    except Exception as error:
        # Large model support says so in its own words, of the host.
        if not is_out_of_memory(error) and not (isinstance(error, ResourceError) and error.__cause__ and is_out_of_memory(error.__cause__)):
            raise
        return None


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
            step_s = _unless_too_much(partial(_step_seconds, _sized(own, wide * longest), corpus)) if wide else None
            parameters = record.num_parameters(grown(shape, deep)) if deep else 0
            found[name] = {"layers": deep, "parameters": parameters, "sequences": wide, "step_s": step_s}
    durable.write_json(Path(request["out"]), found)


def _step_seconds(recipe: Recipe, corpus: Corpus) -> float:
    return step_seconds(Trainee(recipe, corpus))


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
        return self._holds(grown(self.shape, number), 1)

    def has_sequences(self, number: int) -> bool:
        return self._holds(self.shape, number)

    def _holds(self, shape: Any, num_sequences: int) -> bool:
        """What this computer itself has no memory for is too much, too."""
        peak = _unless_too_much(partial(self._peak, shape, num_sequences))
        return peak is not None and peak <= self.budget_bytes

    def _peak(self, shape: Any, num_sequences: int) -> int:
        return measure(Trainee(_sized(self.recipe, num_sequences * self.longest), self.corpus, shape=shape)).peak
