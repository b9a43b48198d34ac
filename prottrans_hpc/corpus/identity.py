"""What a corpus is made from, and so what it holds: the options, the input by its SHA-256, the rules.

Equal origins give equal bytes. A rerun compares origins before it takes anything over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from .alphabet import Rules
from .index import FORMAT
from .sources import Source


@dataclass(frozen=True)
class BuildOptions:
    """What the user asked for."""

    inputs: tuple[str, ...]
    out: Path
    rules: Rules
    num_shards: int | None = None
    """Training shards; None: by size."""
    dedup: bool = False
    validation: float = 0.0
    """Share of the sequences, or clusters, to hold out."""
    clusters: Path | None = None
    names: bool = True
    """Keep the names of the records, and require that they differ."""
    release: str | None = None
    """A note on the origin."""


def made_from(options: BuildOptions, sources: Sequence[Source], sha256: Sequence[str], clusters: Mapping[str, Any] | None) -> dict[str, Any]:
    """The origin, as a part of index.json: rules, split, sources."""
    rules = {**asdict(options.rules), "dedup": options.dedup, "names": options.names, "shards": options.num_shards}
    by = "cluster" if clusters else "sequence"
    split = {"validation": options.validation, "by": by, "hash": "BLAKE2b-128", "clusters": clusters}
    described = [
        {"path": source.path.name, "bytes": source.num_bytes, "sha256": digest, "release": options.release}
        for source, digest in zip(sources, sha256, strict=True)
    ]
    return {"rules": rules, "split": split, "sources": described}


def identity_of(origin: Mapping[str, Any], version: str = __version__) -> str:
    """SHA-256 of an origin and of the program that makes the corpus from it."""
    return hashlib.sha256(json.dumps([FORMAT, version, origin]).encode()).hexdigest()


def differences(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What differs between the index of a corpus and an origin, in words; empty when nothing does."""
    found = [
        f"{key} is {there[part].get(key)} there, {value} here"
        for part in ("rules", "split")
        for key, value in wanted[part].items()
        if there[part].get(key) != value
    ]
    if there["sources"] != wanted["sources"]:
        before, now = (", ".join(source["path"] for source in part["sources"][:3]) for part in (there, wanted))
        found.append(f"the input is {before} there, {now} here" if before != now else f"the content or the release note of {before} differs")
    return "; ".join(found)
