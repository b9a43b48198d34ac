"""Tensors put together from the pieces that files hold: whole ones, or what one rank holds of them.

Files are taken one after another and dropped, so that host memory holds the result and one file.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .division import Box, intersection, volume


class Assembly:
    """Owns tensors that fill up piece by piece."""

    def __init__(self, wanted: Mapping[str, Box]) -> None:
        """`wanted` says by name which part of each whole tensor is to be there in the end."""
        self._wanted = wanted
        self._tensors: dict[str, Tensor] = {}
        self._missing = {name: volume(box) for name, box in wanted.items()}

    def take(self, content: Mapping[str, Tensor]) -> None:
        """Copy what is wanted out of a file's tensors, which are named by `pieces.piece_name`. Raises ValueError for a name that is not."""
        for full_name, tensor in content.items():
            name, box = parse_name(full_name, tuple(tensor.shape))
            if name in self._wanted:
                self._put(name, box, tensor)

    def _put(self, name: str, box: Box, tensor: Tensor) -> None:
        wanted = self._wanted[name]
        if box == wanted:
            self._tensors[name] = tensor
            self._missing[name] = 0
            return
        common = intersection(box, wanted)
        if not volume(common):
            return
        if name not in self._tensors:
            self._tensors[name] = tensor.new_empty([end - begin for begin, end in wanted])
        target = self._tensors[name][_within(common, wanted)]
        target.copy_(tensor[_within(common, box)])
        self._missing[name] -= volume(common)

    def finish(self) -> dict[str, Tensor]:
        """The tensors. Raises ValueError naming what is not there."""
        missing = sorted(name for name, number in self._missing.items() if number)
        if missing:
            more = f" and of {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(f"pieces of {', '.join(missing[:3])}{more} are not there")
        for name, box in self._wanted.items():
            self._tensors.setdefault(name, torch.empty([end - begin for begin, end in box]))
        return self._tensors


def _within(box: Box, outer: Box) -> tuple[slice, ...]:
    return tuple(slice(begin - start, end - start) for (begin, end), (start, _) in zip(box, outer, strict=True))


def parse_name(full_name: str, shape: tuple[int, ...]) -> tuple[str, Box]:
    """The tensor and the box that a piece's name says. Raises ValueError where it is not of the shape that the name says."""
    if not full_name.endswith("]"):
        return full_name, tuple((0, size) for size in shape)
    name, _, text = full_name[:-1].rpartition("[")
    bounds = [tuple(map(int, part.split(":"))) for part in text.split(",")]
    if [end - begin for begin, end in bounds] != list(shape):
        raise ValueError(f"the piece {full_name} has the shape {shape}")
    return name, tuple((begin, end) for begin, end in bounds)
