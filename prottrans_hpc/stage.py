"""The table of stages: where each kind of work starts on the ranks' side.

The launch side knows the stages by name only; it never imports what they do, so that a login node needs
neither torch nor numpy. A stage is a function of one request (a JSON-like mapping) that returns when the
work is done and raises a ProttransError when it is not.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from .errors import ConfigError, missing_package

Request = Mapping[str, Any]

STAGES = {
    "preprocess": "prottrans_hpc.corpus.stage:preprocess",
    "corpus-show": "prottrans_hpc.corpus.stage:show",
    "corpus-check": "prottrans_hpc.corpus.stage:check",
    "pretrain": "prottrans_hpc.train.stage:pretrain",
    "embed": "prottrans_hpc.embed.stage:embed",
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
