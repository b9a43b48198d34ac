"""Weight files of other libraries: written a tensor at a time, read without ever running what is in them.

safetensors is data by design. It is written by hand (a length, a JSON header, the bytes): the library's own writer takes
one more copy of all tensors, hides why a disk refused them, and makes a file that its owner alone may read. A
pytorch_model.bin is a pickle, a program: it is read with torch's restricted unpickler (`weights_only`), which knows
tensors and plain containers and refuses the rest unexecuted.
"""

from __future__ import annotations

import json
import pickle
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .. import durable
from ..errors import CheckpointError, DataError

SAFETENSORS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLE = "pytorch_model.bin"

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

Tensors = dict[str, torch.Tensor]


def write_weights(path: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Write a safetensors file durably, as `dtype`; of the converted tensors one at a time is in memory.

    Raises DataError when a weight leaves the range of `dtype`, OSError naming `path` for a full disk.
    """
    beyond = []
    with durable.new_file(path) as temporary, temporary.open("wb") as file:
        file.write(_header(tensors, dtype))
        for name, tensor in tensors.items():
            converted = tensor.detach().to("cpu", dtype).contiguous()
            beyond += [name] if not bool(converted.isfinite().all()) else []
            file.write(converted.reshape(-1).view(torch.uint8).numpy().data)
        if beyond:
            raise DataError(f"weights leave the range of {dtype}: {listed(beyond)}; export them as bf16 or fp32")


def _header(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * dtype.itemsize
        entries[name] = {"dtype": _DTYPES[dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that every tensor is aligned
    return struct.pack("<Q", len(text)) + text


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
        with warnings.catch_warnings():
            # What torch cannot read of a newer pickle it refuses, and that is told below.
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Not in torch's words, which tell how to run the file.
        raise DataError(
            f"{path} is refused: it holds more than tensors, and reading the rest would run it as a program. Take a {SAFETENSORS} from where the model "
            "comes from, or make one (safetensors.torch.save_file) from a state_dict that you trust, on a machine where a wrong one does no harm"
        ) from error
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
