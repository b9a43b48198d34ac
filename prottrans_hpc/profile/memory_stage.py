"""The stage behind `prottrans memory --measure`: a recipe's step under each of some policies, watched and timed."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .. import architecture, durable, terminal
from ..config import parse
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
