"""Reads the tensors of one kind out of a checkpoint's files, whole or in part; every byte that is used was verified.

Files are read one after another and dropped, so that host memory holds the result and one file; and by a rank that needs pieces
only, the result and one tensor, however few the files are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import durable
from . import pieces, tensor_file
from .assembly import Assembly
from .division import volume
from .piece_plan import PiecePlan


@dataclass(frozen=True)
class Source:
    """Where tensors of one kind lie."""

    folder: Path
    kind: str
    files: tuple[str, ...]
    seals: Mapping[str, durable.FileSeal]
    plan: PiecePlan | None
    """Which file has which pieces; None where files hold whole tensors."""

    def read(self, name: str) -> dict[str, Tensor]:
        """A file's content. Raises ValueError, KeyError or OSError."""
        return tensor_file.read(self.folder / name, sha256=self.seals[name].sha256)

    def read_each(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """A file's tensors one by one. Raises ValueError, KeyError or OSError, for a damaged file behind the last."""
        return tensor_file.read_each(self.folder / name, sha256=self.seals[name].sha256)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the whole tensors."""
        if self.plan:
            return {name: division.shape for name, division in self.plan.divisions(self.kind).items()}
        return {name: shape for file in self.files for name, shape in tensor_file.read_shapes(self.folder / file).items()}


def read_whole(source: Source) -> dict[str, Tensor]:
    """All tensors. Raises ValueError, KeyError or OSError."""
    found: dict[str, Tensor] = {}
    if source.plan is None:
        for name in source.files:
            found |= source.read(name)
        return found
    assembly = Assembly({name: division.whole for name, division in source.plan.divisions(source.kind).items()})
    for name in source.files:
        assembly.take(source.read(name))
    return assembly.finish()


def read_own(source: Source, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's piece of each of `own`. What is not among them, or of another shape, comes without data, on the meta device.

    Raises ValueError, KeyError or OSError.
    """
    shapes = source.shapes()
    boxes = {name: pieces.division_of(tensor).box_of(pieces.own_rank()) for name, tensor in own.items() if shapes.get(name) == tuple(tensor.shape)}
    # Files of whole tensors are so few that every rank needs something of each.
    files = source.plan.files_with(source.kind, {name: box for name, box in boxes.items() if volume(box)}) if source.plan else source.files
    assembly = Assembly(boxes)
    for file in files:
        for name, tensor in source.read_each(file):
            assembly.take({name: tensor})
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items() if name not in boxes} | assembly.finish()
