"""The models of an extraction, one or two: of two, each residue gets the numbers of the first, then those of the second.

Two that read in opposite directions see, together, all of a protein around a residue.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from . import model
from .model import Model, Source

_SECOND = "also"
"""Says in the identity and in the names of attributes that something is of the second model."""


@dataclass(frozen=True)
class Models:
    """Models ready to be run, all on one device."""

    models: tuple[Model, ...]

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.models[0].device

    @property
    def width(self) -> int:
        """Numbers in an embedding, of all models together."""
        return sum(each.width for each in self.models)

    @property
    def max_residues(self) -> int | None:
        """The longest protein that every one of them can read; None: no limit."""
        return _smallest(each.max_residues for each in self.models)

    def hidden(self, proteins: list[bytes]) -> torch.Tensor:
        """The last hidden states of the proteins' residues, model beside model: [sum of lengths, width], fp32."""
        first, *others = [each.hidden(proteins) for each in self.models]
        return torch.cat([first, *others], dim=1) if others else first


def find_sources(first: Path, second: Path | None) -> tuple[Source, ...]:
    """The checkpoints that a person named. Raises CheckpointError, and ConfigError when both are the same."""
    sources = tuple(model.find_source(path) for path in (first, second) if path is not None)
    if len({source.manifest_sha256 for source in sources}) < len(sources):
        raise ConfigError(f"--also {second} is the checkpoint {sources[0].path} again: its numbers would only be there twice")
    return sources


def read_max_residues(sources: tuple[Source, ...]) -> int | None:
    """The longest protein that the models of all checkpoints can read, without loading their weights; None: no limit."""
    return _smallest(model.read_max_residues(source) for source in sources)


def load(sources: tuple[Source, ...], *, device: torch.device, precision: str) -> Models:
    """Build the checkpoints' models and load their weights. Raises CheckpointError."""
    return Models(tuple(model.load(source, device=device, precision=precision) for source in sources))


def describe_identity(sources: tuple[Source, ...]) -> dict[str, Any]:
    """Which weights the numbers in a file depend on."""
    names = ("checkpoint", _SECOND)
    return {
        name: {"run_id": source.run_id, "step": source.step, "manifest_sha256": source.manifest_sha256} for name, source in zip(names, sources, strict=False)
    }


def describe(sources: tuple[Source, ...], models: Models) -> dict[str, Any]:
    """The attributes that say which models the embeddings come from; `width` is that of all, what is of the second begins with also_."""
    first, *others = [model.describe(source, each) for source, each in zip(sources, models.models, strict=True)]
    return first | {"width": models.width} | {f"{_SECOND}_{name}": value for other in others for name, value in other.items() if name != "torch"}


def _smallest(limits: Iterable[int | None]) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
