"""A scaling study: which points are to be measured, in which order, and every file name of its folder.

The launch side writes `study.json` and starts the points, each a run with a directory of its own; the ranks' side reads
both and makes the report.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic.dataclasses import dataclass

from . import config, durable, json_lines
from .config import STRICT, Count, Natural
from .errors import CheckpointError, DataError
from .recipe import Phase, Recipe, Validation
from .run_dir import RunDir

FORMAT = 1

Mode = Literal["weak", "strong"]


@dataclass(frozen=True, config=STRICT)
class StudyPoint:
    """One run of a study."""

    nodes: Count
    repetition: Count

    @property
    def name(self) -> str:
        """Of its run directory."""
        return f"n{self.nodes:04d}-r{self.repetition}"


@dataclass(frozen=True, config=STRICT)
class Study:
    """What is to be measured."""

    recipe_name: str
    mode: Mode
    nodes: tuple[Count, ...]
    """Ascending."""
    repetitions: Count
    warmup: Natural
    """Steps at the beginning of each point that are not measured."""
    steps: Count
    """Measured steps of each point."""
    seed: Natural
    """Of the order."""

    @property
    def num_steps(self) -> int:
        """Of each run: warm-up, the measured ones, and a last one, which the checkpoint at a run's end belongs to."""
        return self.warmup + self.steps + 1

    def points(self) -> list[StudyPoint]:
        """In the order in which they run: each repetition has every size once, in an order of its own, so that a drift of the machine meets all sizes."""
        points = []
        for repetition in range(1, self.repetitions + 1):
            shuffled = sorted(self.nodes)
            random.Random(f"{self.seed} {repetition}").shuffle(shuffled)
            points += [StudyPoint(nodes, repetition) for nodes in shuffled]
        return points

    def recipe_of(self, recipe: Recipe, nodes: int) -> Recipe:
        """The recipe of a point: its first phase, so many steps of it, without validation.

        In a weak study the recipe's batch is that of one node. The learning rate warms up all the time: the weights hardly
        move, and no size diverges.
        """
        first, factor = recipe.phases[0], nodes if self.mode == "weak" else 1
        batch = {name: size * factor for name in ("global_batch_size", "global_batch_residues") if (size := getattr(first, name)) is not None}
        phase: Phase = replace(first, steps=self.num_steps, warmup_steps=self.num_steps, warmup_epochs=None, decay_steps=None, **batch)
        return replace(recipe, phases=(phase,), validation=Validation(), divergence=replace(recipe.divergence, action="log", window=10**9))


@dataclass(frozen=True)
class StudyDir:
    """The folder of a study by its path."""

    path: Path

    @property
    def study_json(self) -> Path:
        """The study."""
        return self.path / "study.json"

    @property
    def report_html(self) -> Path:
        """What a person reads."""
        return self.path / "report.html"

    @property
    def scaling_json(self) -> Path:
        """Every measured step."""
        return self.path / "scaling.json"

    @property
    def scaling_csv(self) -> Path:
        """A row a size."""
        return self.path / "scaling.csv"

    @property
    def projection_json(self) -> Path:
        """Sizes that were not measured, from `prottrans project-scaling`; absent where nobody asked for it."""
        return self.path / "projection.json"

    @property
    def job(self) -> RunDir:
        """The job script and log of a study that runs in one allocation."""
        return RunDir(self.path / "job")

    def attempts(self, point: StudyPoint) -> list[RunDir]:
        """The runs of a point, in the order of the attempts; all but the last have failed."""
        found = [path for path in (self.path / "points").glob(f"{point.name}*") if path.name.partition("-again")[0] == point.name]
        return [RunDir(path) for path in sorted(found, key=lambda path: int(path.name.partition("-again")[2] or 0))]

    def next_attempt(self, point: StudyPoint) -> RunDir:
        """A run directory that is not there yet."""
        number = len(self.attempts(point))
        return RunDir(self.path / "points" / (f"{point.name}-again{number}" if number else point.name))

    def measured(self, study: Study, point: StudyPoint) -> RunDir | None:
        """The run that has taken all steps of a point."""
        return next((run for run in self.attempts(point) if num_steps(run) >= study.num_steps), None)


def num_steps(run: RunDir) -> int:
    """The last step in metrics.jsonl; 0 when there is none."""
    try:
        return max((int(record["step"]) for record in json_lines.read(run.metrics)), default=0)
    except (OSError, ValueError, KeyError):
        return 0


def write_study(folder: StudyDir, study: Study) -> None:
    """Make the folder, and write study.json durably."""
    folder.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    durable.write_json(folder.study_json, {"format": FORMAT, **config.to_json(study)})


def read_study(folder: StudyDir) -> Study:
    """Read study.json. Raises CheckpointError when there is none, DataError or ConfigError when it is damaged."""
    if not folder.study_json.is_file():
        raise CheckpointError(f"{folder.path} is no scaling study: it has no {folder.study_json.name}; prottrans scale RECIPE --out makes one")
    values = durable.read_json(folder.study_json)
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise DataError(f"{folder.study_json} is no study of format {FORMAT}")
    return config.parse(Study, values, source=str(folder.study_json))


def united(old: Study, new: Study) -> Study:
    """What both ask for: sizes and repetitions may be added to a study."""
    return replace(new, nodes=tuple(sorted({*old.nodes, *new.nodes})), repetitions=max(old.repetitions, new.repetitions))


def parse_nodes(text: str) -> tuple[int, ...]:
    """Numbers of nodes from "1,2,4". Raises ValueError."""
    parts: Iterable[str] = text.split(",")
    nodes = tuple(sorted({int(part) for part in parts}))
    if nodes[0] < 1:
        raise ValueError(f"{nodes[0]} nodes")
    return nodes
