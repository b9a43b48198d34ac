"""The table of stages: where each kind of work starts on the ranks' side.

The launch side knows the stages by name only; it never imports what they do, so that a login node needs
neither torch nor numpy. A stage is a function of one request (a JSON-like mapping) that returns when the
work is done and raises a ProttransError when it is not.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError, missing_package

Request = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """One independent piece of a stage's work, for a process of its own, anywhere that sees the same files."""

    stage: str
    request: Request
    """JSON."""
    output: Path
    """A file that appears under this name, whole, when the item is done."""


@dataclass(frozen=True)
class Farm:
    """Where a stage may send items of its work. The launch side makes it and hands it over in the request."""

    folder: Path
    """Seen by all nodes, ours alone; for whatever the items need and leave."""
    num_items: int
    """Into so many the work should be cut."""
    num_workers: int
    """Processes or threads that an item has cores for."""
    run: Callable[[str, Sequence[Item]], None]
    """`run(name, items)` returns when every output is there; items whose output is there already are not run again.

    Raises a ProttransError with the exit code of the first item that failed for good.
    """


STAGES = {
    "preprocess": "prottrans_hpc.corpus.stage:preprocess",
    "preprocess-item": "prottrans_hpc.corpus.task_folder:run_item",
    "corpus-show": "prottrans_hpc.corpus.stage:show",
    "corpus-check": "prottrans_hpc.corpus.stage:check",
    "pretrain": "prottrans_hpc.train.stage:pretrain",
    "lr-range": "prottrans_hpc.train.lr_range:report",
    "comm": "prottrans_hpc.profile.comm_stage:study",
    "preflight": "prottrans_hpc.profile.preflight_stage:check",
    "project-scaling": "prottrans_hpc.profile.projection:project",
    "scale-report": "prottrans_hpc.profile.scaling_stage:report",
    "memory-measure": "prottrans_hpc.profile.memory_stage:measure_policies",
    "memory-study": "prottrans_hpc.profile.memory_stage:study_policies",
    "memory-picture": "prottrans_hpc.profile.memory_picture:draw",
    "embed": "prottrans_hpc.embed.stage:embed",
    "embed-item": "prottrans_hpc.embed.farm:run_item",
    "export": "prottrans_hpc.train.convert:export",
    "import": "prottrans_hpc.train.convert:import_",
}

_EXTRA_OF = {"torch": "train", "numpy": "train", "h5py": "train", "safetensors": "train", "psutil": "train", "mpi4py": "mpi", "horovod": "horovod"}


def find(target: str) -> Any:
    """The object that a "module:attribute" string names."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def run_stage(name: str, request: Request) -> None:
    """Run a stage in this process; raises what the stage raises, and names the install command of a missing package."""
    if name not in STAGES:
        raise ConfigError(f"no stage is called {name!r}; the stages are {', '.join(STAGES)}")
    try:
        stage: Callable[[Request], None] = find(STAGES[name])
        stage(request)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA_OF:
            raise
        raise missing_package(package, _EXTRA_OF[package], f"the stage {name}") from error
