"""The C kernels of the optimizers, or for LAMB the news that they were not built: which tensors they take, and their addresses.

`_lamb` gets raw addresses, so everything that it assumes (fp32, on the CPU, contiguous, equal sizes) is checked here.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)


@functools.cache
def extension() -> ModuleType | None:
    """The compiled module; None where it was not built."""
    try:
        return importlib.import_module("._lamb", __package__)
    except ImportError:
        return None


def can_update(tensors: Sequence[Tensor]) -> bool:
    """`can_take` for an update of LAMB, which says once what a kernel that was not built costs. The norm of gradients is slower too, but little of a step."""
    if extension() is None and tensors and tensors[0].device.type == "cpu":
        _tell_missing()
    return can_take(tensors)


@functools.cache
def _tell_missing() -> None:
    log.warning("the C kernel of LAMB is not built: the Python loop gives the same steps, several times slower on a CPU")


def can_take(tensors: Sequence[Tensor]) -> bool:
    """Whether the kernel exists and all tensors are of the kind that it reads."""
    return all(t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in tensors) and extension() is not None


def addresses(*columns: Sequence[Tensor]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    """uint64 [tensors, columns]: where each tensor's first element lies."""
    return np.array([[tensor.data_ptr() for tensor in row] for row in zip(*columns, strict=True)], dtype=np.uint64)


def sizes(*columns: Sequence[Tensor]) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """int64 [tensors]: elements of each tensor, which must be the same in every column."""
    counts = [[tensor.numel() for tensor in column] for column in columns]
    if any(column != counts[0] for column in counts):
        raise ValueError("a parameter, its gradient and its moments differ in size")
    return np.array(counts[0], dtype=np.int64)


def sum_of_squares(tensors: Sequence[Tensor]) -> float:
    """The sum of squares of all elements, in fp64, in an order that the sizes alone decide."""
    module = extension()
    assert module is not None  # can_take said so
    return float(module.sum_of_squares(addresses(tensors), sizes(tensors), torch.get_num_threads()))
