"""Which sequences are held out for validation: by a hash of the sequence, or of its cluster.

The hash is a property of the sequence alone, so a sequence never moves between the splits as a corpus grows. With
a cluster file (representative, member) the hash of the representative's name decides for all members, so that no
close relative of a training sequence is in the validation split; a sequence that is in no cluster is one of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, DataError
from ..terminal import printable
from . import kernel
from .compression import Stream
from .pieces import Digests, write_all
from .sorted_runs import SortedRuns
from .sources import Source, inspect_text

TRAIN, VALIDATION = 0, 1
_BLOCK = 1 << 22
_COLUMNS = {"key": "<u8", "low": "<u8", "held_out": "u1"}
"""Of the table: both words of a member's digest, ascending, and whether its cluster is held out."""


@dataclass(frozen=True)
class Holdout:
    """The rule that assigns records to splits."""

    share: float
    """Of the sequences, or of the clusters, on average."""
    clusters: str | None
    """Path of the table that `build_clusters` wrote, without the columns' names."""

    @property
    def needs_digests(self) -> bool:
        """Whether the hash of the sequence decides."""
        return self.share > 0 and self.clusters is None


def is_held_out(digests: Digests, share: float) -> npt.NDArray[np.bool_]:
    """Whether each digest falls into the share: its first word as a fraction of 2^64."""
    threshold = min(int(share * 2.0**64), 2**64 - 1)
    return digests[:, 0] < np.uint64(threshold)


def assign(holdout: Holdout, sequences: Digests | None, names: npt.NDArray[np.uint8], name_offsets: npt.NDArray[np.int64]) -> tuple[Any, int]:
    """The split of each record, uint8, and how many are in no cluster."""
    num = len(name_offsets) - 1
    if holdout.share <= 0:
        return np.zeros(num, np.uint8), 0
    if holdout.clusters is None:
        assert sequences is not None
        return is_held_out(sequences, holdout.share).astype(np.uint8), 0
    own = kernel.digest(names, name_offsets)
    found, held_out = _look_up(holdout.clusters, own)
    # UniProt's "sp|P69905|HBA_HUMAN" is "P69905" in MMseqs2's tables.
    text, borders = names.tobytes(), name_offsets.tolist()
    for i in np.flatnonzero(~found).tolist():
        parts = text[borders[i] : borders[i + 1]].split(b"|")
        if len(parts) == 3:
            accession = np.frombuffer(parts[1], np.uint8)
            digest = kernel.digest(accession, np.array([0, len(accession)]))
            (found[i],), (held_out[i],) = _look_up(holdout.clusters, digest)
    split = np.where(found, held_out, is_held_out(own, holdout.share))
    return split.astype(np.uint8), int((~found).sum())


def _look_up(stem: str, digests: Digests) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Whether each name is in the table, and what the table says."""
    high, low, flags = (np.memmap(f"{stem}.{name}", dtype, "r") for name, dtype in _COLUMNS.items())
    at = np.minimum(np.searchsorted(high, digests[:, 0]), len(high) - 1)
    return np.asarray((high[at] == digests[:, 0]) & (low[at] == digests[:, 1])), np.asarray(flags[at] != 0)


def build_clusters(path: Path, stem: Path, share: float) -> tuple[Source, str]:
    """Turn a cluster file into a sorted table of member digests with the split of each; also gives its SHA-256.

    The table is a file a column; it takes 17 bytes a member, and as much again while it is made. Memory is bounded.
    Raises DataError naming the line that is not "representative TAB member", or the members of two clusters.
    """
    if not path.exists():
        raise ConfigError(f"there is no cluster file {path}")
    source = inspect_text(path)
    members = SortedRuns(stem.parent, list(_COLUMNS.items()))
    line = 1
    with source.open(hashing=True) as stream:
        for block in _line_blocks(stream):
            members.add(_members(*_fields(block, path, line), share))
            line += block.count(b"\n")
    source.check_unchanged()
    if line == 1:
        raise DataError(f"{path} holds no cluster: each line is a representative, a tab, and a member")
    _write_table(stem, members, path)
    return source, stream.sha256.hexdigest()


def _members(fields: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], share: float) -> npt.NDArray[Any]:
    digests = kernel.digest(fields, offsets)
    rows = np.empty(len(digests) // 2, list(_COLUMNS.items()))
    rows["key"], rows["low"] = digests[1::2, 0], digests[1::2, 1]
    rows["held_out"] = is_held_out(digests[0::2], share)
    return rows


def _line_blocks(stream: Stream) -> Iterator[bytes]:
    """Whole lines, with LF ends."""
    rest, buffer = b"", bytearray(_BLOCK)
    with memoryview(buffer) as view:
        while num := stream.read_into(view):
            data = rest + bytes(view[:num])
            cut = data.rfind(b"\n") + 1
            rest = data[cut:]
            if cut:
                yield data[:cut].replace(b"\r\n", b"\n")
    if rest.strip():
        yield rest.rstrip(b"\r") + b"\n"


def _fields(block: bytes, path: Path, line: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """All fields of the block end to end, two a line, and where each begins."""
    text = np.frombuffer(block, np.uint8)
    separators = np.flatnonzero((text == 9) | (text == 10))
    kinds = text[separators]
    lengths = np.diff(separators, prepend=-1) - 1
    if len(kinds) % 2 or (kinds[0::2] != 9).any() or (kinds[1::2] != 10).any() or (lengths == 0).any():
        for number, content in enumerate(block.split(b"\n")[:-1], line):
            if len(content.split(b"\t")) != 2 or not all(content.split(b"\t")):
                raise DataError(f"{path}, line {number}, is not a representative, a tab and a member: {printable(content, 80)!r}")
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return np.frombuffer(block.translate(None, b"\t\n"), np.uint8), offsets


def _write_table(stem: Path, members: SortedRuns, path: Path) -> None:
    num_repeated, do_part = 0, False
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(f"{stem}.{name}", "wb", buffering=0)) for name in _COLUMNS}
        for rows in members.ranges():
            rows = rows[np.lexsort((rows["low"], rows["key"]))]
            same = (rows["key"][1:] == rows["key"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
            num_repeated += int(same.sum())
            do_part |= bool((same & (rows["held_out"][1:] != rows["held_out"][:-1])).any())
            first = np.concatenate((np.ones(min(len(rows), 1), bool), ~same))
            for name, file in files.items():
                write_all(file.fileno(), np.ascontiguousarray(rows[name][first]).data)
    if do_part:
        raise DataError(f"{path} puts {num_repeated} members into more than one cluster, so that they could be in both splits")
