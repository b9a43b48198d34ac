"""Which sequences are held out for validation: by a hash of the sequence, or of its cluster.

The hash is a property of the sequence alone, so a sequence never moves between the splits as a corpus grows. With
a cluster file (representative, member) the hash of the representative's name decides for all members, so that no
close relative of a training sequence is in the validation split; a sequence that is in no cluster is one of its own.
"""

from __future__ import annotations

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
from .pieces import Digests, write_array
from .sources import Source, inspect_text

TRAIN, VALIDATION = 0, 1
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Holdout:
    """The rule that assigns records to splits."""

    share: float
    """Of the sequences, or of the clusters, on average."""
    clusters: str | None
    """Path of the table that `build_clusters` wrote."""

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


def _look_up(path: str, digests: Digests) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Whether each name is in the table, and what the table says."""
    num = Path(path).stat().st_size // 17
    high = np.memmap(path, "<u8", "r", 0, (num,))
    low = np.memmap(path, "<u8", "r", 8 * num, (num,))
    flags = np.memmap(path, np.uint8, "r", 16 * num, (num,))
    at = np.minimum(np.searchsorted(high, digests[:, 0]), num - 1)
    return np.asarray((high[at] == digests[:, 0]) & (low[at] == digests[:, 1])), np.asarray(flags[at] != 0)


def build_clusters(path: Path, table: Path, share: float) -> tuple[Source, str]:
    """Turn a cluster file into a sorted table of member digests with the split of each, 17 bytes a member; also gives its SHA-256.

    Raises DataError naming the line that is not "representative TAB member", or the member of two clusters.
    """
    if not path.exists():
        raise ConfigError(f"there is no cluster file {path}")
    source = inspect_text(path)
    members, flags = [], []
    line = 1
    with source.open(hashing=True) as stream:
        for block in _line_blocks(stream):
            fields, offsets = _fields(block, path, line)
            digests = kernel.digest(fields, offsets)
            members.append(digests[1::2])
            flags.append(is_held_out(digests[0::2], share))
            line += block.count(b"\n")
    source.check_unchanged()
    if not members:
        raise DataError(f"{path} holds no cluster: each line is a representative, a tab, and a member")
    _write_table(table, np.concatenate(members), np.concatenate(flags), path)
    return source, stream.sha256.hexdigest()


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


def _write_table(table: Path, members: Digests, flags: npt.NDArray[np.bool_], path: Path) -> None:
    order = np.lexsort((members[:, 1], members[:, 0]))
    members, flags = members[order], flags[order]
    same = (members[1:] == members[:-1]).all(axis=1)
    if (same & (flags[1:] != flags[:-1])).any():
        raise DataError(f"{path} puts {int(same.sum())} members into more than one cluster, so that they could be in both splits")
    first = np.concatenate(([True], ~same))
    write_array(str(table), members[first, 0], members[first, 1], flags[first].astype(np.uint8))
