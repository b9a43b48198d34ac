"""Whether a corpus is, byte for byte, what was written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import durable, terminal
from ..errors import DataError
from . import kernel
from .index import Index, ShardEntry
from .pool import Pool
from .shard import map_shard


@dataclass(frozen=True)
class Finding:
    """One shard, looked at."""

    problems: tuple[str, ...]
    letters: Mapping[str, int]
    """{residue: count} of a shard without problems."""


def check_shard(task: tuple[Path, ShardEntry]) -> Finding:
    """Compare a shard with its entry: size and SHA-256 first, so that no damaged file is ever parsed, then what it says of itself."""
    path, entry = task
    if not path.exists():
        return Finding((f"{path} is missing",), {})
    if (size := path.stat().st_size) != entry.num_bytes:
        return Finding((f"{path} has {size} bytes, {entry.num_bytes} were written",), {})
    if durable.sha256_of(path) != entry.sha256:
        return Finding((f"{path} is damaged: its SHA-256 is not the one in the index",), {})
    try:
        shard = map_shard(path)
    except DataError as error:
        return Finding((str(error),), {})
    lengths = np.diff(shard.offsets.astype(np.int64))
    counts = kernel.count(shard.residues)
    consistent = len(lengths) == entry.num_sequences and len(shard.residues) == entry.num_residues == shard.offsets[-1]
    if not consistent or (lengths <= 0).any() or shard.offsets[0] != 0 or counts[: ord("A")].any() or counts[ord("Z") + 1 :].any():
        return Finding((f"{path} contradicts the index, or itself, although its SHA-256 is right: please report this",), {})
    return Finding((), {chr(byte): int(num) for byte, num in enumerate(counts) if num})


def check_shards(index: Index, pool: Pool) -> list[Finding]:
    """All shards of a corpus, in the order of the index."""
    entries = [entry for split in index.splits.values() for entry in split.shards]
    tasks = [(index.shard_path(entry), entry) for entry in entries]
    with terminal.progress(f"checking {index.path}", total=index.num_bytes, unit="bytes") as advance:
        return pool.run(check_shard, tasks, costs=[entry.num_bytes for entry in entries], advance=advance)


def problems_of(index: Index, pool: Pool) -> list[str]:
    """What is wrong with a corpus whose index could be read, one line a fault; empty when it is whole."""
    findings = check_shards(index, pool)
    problems = [problem for finding in findings for problem in finding.problems]
    if not problems and _sum(findings) != dict(index.content["residue_counts"]):
        problems.append(f"{index.path}: the residues in the shards are not those that the index counts: please report this")
    return problems


def _sum(findings: Sequence[Finding]) -> dict[str, Any]:
    total: dict[str, int] = {}
    for finding in findings:
        for letter, num in finding.letters.items():
            total[letter] = total.get(letter, 0) + num
    return total
