"""The embeddings file: assembled from the parts in the order of the input, sealed by a digest of each dataset.

Everything is written contiguous and uncompressed into a temporary sibling that is renamed when it is complete;
an HDF5 file is never appended to. The same input, weights and options give the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from .. import durable
from ..errors import DataError
from .compute import Totals
from .hdf5_disk import new_hdf5
from .options import STORED, Options
from .parts import Extract, PartsFolder, read_part
from .proteins import Window
from .stopping import StopRequest

FORMAT = 1
_BUFFER_BYTES = 32 << 20
_TEXT = h5py.string_dtype("utf-8")


@dataclass
class _Column:
    """A dataset that is filled from its start to its end, and the digest of what went in."""

    dataset: h5py.Dataset
    filled: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def append(self, values: npt.NDArray[Any] | Sequence[bytes]) -> None:
        """Add rows, or texts."""
        if len(values):
            self.dataset[self.filled : self.filled + len(values)] = values if isinstance(values, np.ndarray) else np.array(values, object)
            _digest(self.digest, values)
            self.filled += len(values)

    def seal(self) -> None:
        """Record the digest. A column that is not full is a fault of this program."""
        if self.filled != len(self.dataset):
            raise AssertionError(f"{self.dataset.name} has {self.filled} of {len(self.dataset)} rows")
        self.dataset.attrs["sha256"] = self.digest.hexdigest()


def _digest(digest: Any, values: npt.NDArray[Any] | Sequence[bytes]) -> None:
    """Numbers as they lie in memory (little-endian, row by row); of texts each one's length in bytes, a colon, its bytes."""
    if isinstance(values, np.ndarray):
        digest.update(np.ascontiguousarray(values).data)
    else:
        digest.update(b"".join(b"%d:%s" % (len(value), value) for value in values))


def assemble(
    windows: Iterable[Window], folder: PartsFolder, totals: Totals, options: Options, *, width: int, attributes: Mapping[str, Any], stop: StopRequest
) -> None:
    """Write the file. Raises OSError that names it, DataError for a part that was damaged since it was written."""
    with durable.new_file(options.out) as temporary:
        with new_hdf5(temporary) as file:
            columns = _create(file, totals, options, width)
            if options.per_residue:
                columns["offsets"].append(np.zeros(1, np.int64))
            for window in windows:
                stop.check(f"all results are kept in {folder.path}")
                _append_window(columns, window, _intact_extracts(folder, window.index))
            for column in columns.values():
                column.seal()
            file.attrs.update({"format": FORMAT, **attributes})
        _check_complete(temporary, totals)


def _create(file: h5py.File, totals: Totals, options: Options, width: int) -> dict[str, _Column]:
    stored = np.dtype(STORED[options.precision])
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {"names": ((totals.num_embedded,), _TEXT), "lengths": ((totals.num_embedded,), np.int64)}
    if options.mean:
        shapes["mean"] = ((totals.num_embedded, width), stored)
    if options.per_residue:
        shapes["offsets"] = ((totals.num_embedded + 1,), np.int64)
        shapes["residues"] = ((totals.num_residues, width), stored)
    shapes |= {"failed_names": ((totals.num_failed,), _TEXT), "failed_reasons": ((totals.num_failed,), _TEXT)}
    return {name: _Column(file.create_dataset(name, shape, dtype)) for name, (shape, dtype) in shapes.items()}


def _intact_extracts(folder: PartsFolder, window: int) -> list[Extract]:
    """The mapped parts of a window, their bytes checked."""
    parts = folder.parts.get(window, [])
    for part in parts:
        if not part.is_intact():
            part.path.unlink()
            raise DataError(f"{part.path} was damaged after it was written, and is removed now; the same command embeds its proteins again")
    return [read_part(part) for part in parts]


def _append_window(columns: dict[str, _Column], window: Window, extracts: list[Extract]) -> None:
    """Add a window's proteins in input order, whichever part each came from."""
    failed = dict(window.problems)
    for extract in extracts:
        failed |= extract.failed
    places = np.concatenate([extract.rows for extract in extracts] or [np.empty(0, np.int64)])
    order = np.argsort(places)
    embedded = places[order]
    if sorted([*embedded.tolist(), *failed]) != list(range(len(window.names))):
        raise AssertionError(f"window {window.index}: the parts do not hold every protein exactly once")
    lengths = window.lengths[embedded]
    columns["names"].append([window.names[place] for place in embedded.tolist()])
    columns["lengths"].append(lengths)
    if "mean" in columns and extracts:
        columns["mean"].append(np.concatenate([extract.mean for extract in extracts if extract.mean is not None])[order])
    if "residues" in columns:
        start = columns["residues"].filled
        columns["offsets"].append(start + np.cumsum(lengths))
        for rows in _residues_in_order(extracts, window.lengths):
            columns["residues"].append(rows)
    columns["failed_names"].append([window.names[place] for place in sorted(failed)])
    columns["failed_reasons"].append([failed[place].encode() for place in sorted(failed)])


def _residues_in_order(extracts: list[Extract], lengths: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[Any]]:
    """The rows of a window's proteins in input order, some megabytes at a time."""
    pieces: list[tuple[int, npt.NDArray[Any]]] = []
    for extract in extracts:
        if extract.residues is not None:
            ends = np.cumsum(lengths[extract.rows])
            pieces += zip(extract.rows.tolist(), np.split(extract.residues, ends[:-1]), strict=False)
    buffered: list[npt.NDArray[Any]] = []
    num_bytes = 0
    for _, piece in sorted(pieces, key=lambda item: item[0]):
        buffered.append(piece)
        num_bytes += piece.nbytes
        if num_bytes > _BUFFER_BYTES:
            yield np.concatenate(buffered)
            buffered, num_bytes = [], 0
    if buffered:
        yield np.concatenate(buffered)


def _check_complete(path: Path, totals: Totals) -> None:
    """The last look before the file gets its name: in = embedded + failed."""
    with h5py.File(path, "r") as file:
        counts = (len(file["names"]), len(file["failed_names"]), int(file.attrs["num_proteins"]))
    if counts[0] + counts[1] != counts[2] or counts[:2] != (totals.num_embedded, totals.num_failed):
        raise AssertionError(f"{counts[2]} proteins came in, but {counts[0]} are embedded and {counts[1]} have failed")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """Open for reading, with locks only where the file system has them. Raises DataError for a file that is no HDF5."""
    path.open("rb").close()  # an OSError here is the file system's; one below is the content's
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            yield file
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise DataError(f"{path} is damaged, or no file of `prottrans embed` ({' '.join(str(error).split())}): move it away, or give another --out") from error


def read_attributes(path: Path) -> dict[str, Any]:
    """The attributes of an embeddings file, its identity parsed. Raises DataError."""
    with _opened(path) as file:
        if int(file.attrs["format"]) != FORMAT:
            raise DataError(f"{path} has format {file.attrs['format']}; this version reads {FORMAT}")
        attributes = {name: value.item() if isinstance(value, np.generic) else value for name, value in file.attrs.items()}
        return attributes | {"identity": json.loads(attributes["identity"])}


def problems(path: Path) -> list[str]:
    """What is wrong with an embeddings file, one line a dataset; every byte of the data is read."""
    found = []
    with _opened(path) as file:
        for name, dataset in file.items():
            digest = hashlib.sha256()
            rows = max(1, _BUFFER_BYTES // max(1, dataset.dtype.itemsize * int(np.prod(dataset.shape[1:]))))
            for start in range(0, len(dataset), rows):
                values = dataset[start : start + rows]
                _digest(digest, list(values) if values.dtype == object else values)
            if digest.hexdigest() != dataset.attrs["sha256"]:
                found.append(f"{path}: the dataset {name} is damaged: its SHA-256 is not the one that was written")
    return found
