"""Weight files of other libraries, read without ever running what is in them.

safetensors is data by design. A pytorch_model.bin is a pickle, a program: it is read with torch's restricted
unpickler (`weights_only`), which knows tensors and plain containers and refuses the rest unexecuted.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .. import durable
from ..errors import CheckpointError, DataError

SAFETENSORS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLE = "pytorch_model.bin"

Tensors = dict[str, torch.Tensor]


def read_weights(folder: Path) -> Tensors:
    """All tensors of a model folder by the names they have there.

    Raises CheckpointError when there is no weight file, DataError when one is damaged, not finite or no plain data.
    """
    if (folder / SAFETENSORS).is_file():
        tensors = _read_safetensors(folder / SAFETENSORS)
    elif (folder / _INDEX).is_file():
        tensors = _read_sharded(folder / _INDEX)
    elif (folder / _PICKLE).is_file():
        tensors = _read_pickle(folder / _PICKLE)
    else:
        raise CheckpointError(f"{folder} has no {SAFETENSORS} (or {_INDEX}) and no {_PICKLE}: other weight formats are not read")
    poisoned = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not bool(tensor.isfinite().all())]
    if poisoned:
        raise DataError(f"the weights in {folder} hold numbers that are not finite: {listed(poisoned)}")
    return tensors


def listed(names: list[str], limit: int = 6) -> str:
    """A few names for a message, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _read_safetensors(path: Path) -> Tensors:
    _check_seal(path)
    try:
        tensors: Tensors = load_file(path)
    except (SafetensorError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    return tensors


def _read_sharded(index: Path) -> Tensors:
    try:
        names = sorted({str(name) for name in durable.read_json(index)["weight_map"].values()})
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index} is damaged: it has no weight_map") from error
    tensors: Tensors = {}
    for name in names:
        if Path(name).name != name:
            raise DataError(f"{index} names {name!r}, which is not a file beside it")
        if not (index.parent / name).is_file():
            raise DataError(f"{index} names {name}, which is missing")
        tensors |= _read_safetensors(index.parent / name)
    return tensors


def _read_pickle(path: Path) -> Tensors:
    _check_seal(path)
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(f"{path} is refused: it holds more than tensors, and running what it holds is not safe ({_first_line(error)})") from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        raise DataError(f"{path} is damaged or no PyTorch weight file ({_first_line(error)})") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in values.items()):
        raise DataError(f"{path} is not a table of named tensors")
    return dict(values)


def _check_seal(path: Path) -> None:
    """A folder that `prottrans export` wrote has a manifest: then a flipped bit in the weights is found."""
    if (path.parent / durable.MANIFEST).is_file():
        seal = durable.read_manifest(path.parent).get(path.name)
        if seal and seal.sha256 != durable.sha256_of(path):
            raise DataError(f"{path} is damaged: its SHA-256 is not the one in {durable.MANIFEST}")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
