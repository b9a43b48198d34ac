"""index.json of a corpus: what it holds, in which files, made from what. A folder without it is no corpus."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, DataError

FORMAT = 1
INDEX = "index.json"
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class ShardEntry:
    """One shard as the index lists it."""

    file: str
    num_sequences: int
    num_residues: int
    num_bytes: int
    """Of the file."""
    sha256: str


@dataclass(frozen=True)
class Split:
    """The training or the validation part of a corpus; its sequences are numbered over the shards in order."""

    name: str
    num_sequences: int
    num_residues: int
    num_bytes: int
    shards: tuple[ShardEntry, ...]


@dataclass(frozen=True)
class Index:
    """A corpus."""

    path: Path
    """The corpus folder."""
    sha256: str
    """Of index.json, which holds the SHA-256 of every shard: the identity of the corpus."""
    splits: Mapping[str, Split]
    """ "train" and "validation"; the latter may be empty."""
    content: Mapping[str, Any]
    """All of index.json."""

    @property
    def num_sequences(self) -> int:
        """Of all splits."""
        return sum(split.num_sequences for split in self.splits.values())

    @property
    def num_residues(self) -> int:
        """Of all splits."""
        return sum(split.num_residues for split in self.splits.values())

    @property
    def num_bytes(self) -> int:
        """Of all shards."""
        return sum(split.num_bytes for split in self.splits.values())

    def shard_path(self, shard: ShardEntry) -> Path:
        """Where a shard lies."""
        return self.path / shard.file


def render_index(content: Mapping[str, Any]) -> bytes:
    """The one spelling of an index, sealed with a SHA-256 of all else in it, so that every changed byte shows."""
    body = {key: value for key, value in content.items() if key != "sha256"}
    seal = hashlib.sha256(json.dumps(body, allow_nan=False).encode()).hexdigest()
    return (json.dumps(body | {"sha256": seal}, indent=1, allow_nan=False) + "\n").encode()


def shard_name(split: str, number: int) -> str:
    """File name of a shard."""
    return f"{split}-{number:05d}.h5"


def read_index(path: str | Path) -> Index:
    """The corpus in the folder `path`. Raises CheckpointError when there is none, DataError when its index is damaged."""
    folder = Path(path)
    try:
        text = (folder / INDEX).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder} is no corpus: it has no {INDEX}. {_advice(folder)}") from None
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise DataError(f"{folder / INDEX} has format {content['format']!r}; this version reads format {FORMAT}")
        splits = {name: _split(name, content["splits"][name]) for name in SPLITS}
        if text != render_index(content):
            raise ValueError("its checksum is not that of its content")
        if any(content[key] != sum(content["splits"][name][key] for name in SPLITS) for key in ("sequences", "residues", "bytes")):
            raise ValueError("its totals are not the sums of its splits")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{folder / INDEX} is damaged: {type(error).__name__}: {error}") from error
    return Index(folder, hashlib.sha256(text).hexdigest(), splits, content)


def _split(name: str, entry: Mapping[str, Any]) -> Split:
    shards = tuple(_shard(name, number, shard) for number, shard in enumerate(entry["shards"]))
    split = Split(name, int(entry["sequences"]), int(entry["residues"]), int(entry["bytes"]), shards)
    sums = tuple(sum(getattr(shard, field) for shard in shards) for field in ("num_sequences", "num_residues", "num_bytes"))
    if sums != (split.num_sequences, split.num_residues, split.num_bytes):
        raise ValueError(f"the totals of the split {name} are not the sums of its shards")
    return split


def _shard(split: str, number: int, entry: Mapping[str, Any]) -> ShardEntry:
    shard = ShardEntry(str(entry["file"]), int(entry["sequences"]), int(entry["residues"]), int(entry["bytes"]), str(entry["sha256"]))
    # Only the one name that we write is ever opened: an index from elsewhere cannot point outside its folder.
    if shard.file != shard_name(split, number):
        raise ValueError(f"shard {number} of {split} is called {shard.file!r}")
    return shard


def entry_as_json(shard: ShardEntry) -> dict[str, str | int]:
    """A shard as index.json lists it."""
    return {"file": shard.file, "sequences": shard.num_sequences, "residues": shard.num_residues, "bytes": shard.num_bytes, "sha256": shard.sha256}


def _advice(folder: Path) -> str:
    if (folder / ".work").is_dir():
        return "`prottrans preprocess` was stopped there before its end: run the same command again"
    return "Make one with `prottrans preprocess FASTA --out CORPUS`"
