"""One shard: an HDF5 file of flat arrays that readers map instead of reading.

Datasets: `residues` uint8 (upper-case ASCII letters, end to end), `offsets` uint64 [N + 1], and unless names were
left out `names` uint8 with `name_offsets` uint64 [N + 1]. All are contiguous and uncompressed, so that a reader
maps them; the file holds no time stamp, so that equal sequences give equal bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from ..errors import DataError

FORMAT = 1
_TYPES = {"residues": "u1", "offsets": "<u8", "names": "u1", "name_offsets": "<u8"}
_ALIGNMENT = 64  # bytes, a cache line: mapped arrays start aligned


@dataclass(frozen=True)
class ShardSizes:
    """What a shard will hold; known before its first byte is written."""

    num_sequences: int
    num_residues: int
    num_name_bytes: int | None
    """None when names are left out."""

    def elements(self) -> dict[str, int]:
        """Elements of each dataset."""
        elements = {"residues": self.num_residues, "offsets": self.num_sequences + 1}
        if self.num_name_bytes is not None:
            elements |= {"names": self.num_name_bytes, "name_offsets": self.num_sequences + 1}
        return elements


@dataclass(frozen=True)
class Shard:
    """The mapped arrays of a shard."""

    residues: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.uint64]
    names: npt.NDArray[np.uint8] | None
    name_offsets: npt.NDArray[np.uint64] | None

    def name(self, i: int) -> bytes:
        """Name of sequence `i`; empty when the corpus keeps no names."""
        if self.names is None or self.name_offsets is None:
            return b""
        return self.names[int(self.name_offsets[i]) : int(self.name_offsets[i + 1])].tobytes()


def create_shard(path: Path, sizes: ShardSizes) -> dict[str, int]:
    """Make the file with every dataset in its place but without content; returns where each begins, in bytes."""
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_alignment(1, _ALIGNMENT)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    # The oldest file format: smallest metadata, and no feature that a later HDF5 could write differently.
    access.set_libver_bounds(h5py.h5f.LIBVER_EARLIEST, h5py.h5f.LIBVER_V110)
    file = h5py.h5f.create(os.fsencode(path), h5py.h5f.ACC_EXCL, fapl=access)
    try:
        root = h5py.h5g.open(file, b"/")
        _write_format(root)
        places = {name: _create_dataset(root, name, num) for name, num in sizes.elements().items()}
    finally:
        file.close()
    # HDF5 leaves a file short whose last dataset was never written.
    end = max(places[name] + num * np.dtype(_TYPES[name]).itemsize for name, num in sizes.elements().items())
    if path.stat().st_size < end:
        os.truncate(path, end)
    return places


def _write_format(root: Any) -> None:
    space = h5py.h5s.create(h5py.h5s.SCALAR)
    attribute = h5py.h5a.create(root, b"format", h5py.h5t.STD_I64LE, space)
    attribute.write(np.array(FORMAT, "<i8"))


def _create_dataset(root: Any, name: str, num: int) -> int:
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    kind = h5py.h5t.STD_U8LE if _TYPES[name] == "u1" else h5py.h5t.STD_U64LE
    dataset = h5py.h5d.create(root, name.encode(), kind, h5py.h5s.create_simple((num,)), dcpl=properties)
    return int(dataset.get_offset() or 0)


def map_shard(path: Path) -> Shard:
    """Map a shard's arrays, read-only. Raises DataError that names a file which is no shard or is cut short."""
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            if int(file.attrs["format"]) != FORMAT:
                raise DataError(f"{path} has shard format {file.attrs['format']}; this version reads {FORMAT}")
            places = {name: (file[name].id.get_offset(), file[name].shape, file[name].dtype) for name in _TYPES if name in file}
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except (OSError, KeyError, ValueError, RuntimeError, AttributeError) as error:
        raise DataError(f"{path} is damaged: it cannot be read as a shard ({error})") from error
    size = path.stat().st_size
    arrays = dict(_mapped(path, places, size))
    if not {"residues", "offsets"} <= arrays.keys():
        raise DataError(f"{path} is damaged: it lacks residues or offsets")
    return Shard(arrays["residues"], arrays["offsets"], arrays.get("names"), arrays.get("name_offsets"))


def _mapped(path: Path, places: Mapping[str, Any], size: int) -> Iterator[tuple[str, Any]]:
    for name, (place, shape, dtype) in places.items():
        if dtype != np.dtype(_TYPES[name]) or len(shape) != 1:
            raise DataError(f"{path} is damaged: {name} is {dtype} {shape}")
        if shape[0] == 0:
            yield name, np.empty(0, dtype)
            continue
        if place is None or place + shape[0] * dtype.itemsize > size:
            raise DataError(f"{path} is damaged: {name} does not lie within its {size} bytes")
        # A plain view of the mapping: slicing np.memmap objects costs three times as much.
        yield name, np.asarray(np.memmap(path, dtype, "r", place, shape))
