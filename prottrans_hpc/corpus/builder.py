"""Make a corpus: simple builder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__, durable
from . import index as indexes
from .alphabet import Rules
from .fasta import read_records
from .kernel import PERSON
from .shard import ShardSizes, create_shard


def build(request: Mapping[str, Any]) -> None:
    """Temporary: everything in memory, one process."""
    out = Path(request["out"])
    out.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[Any]] = {"train": [], "validation": []}
    for record in read_records(request["inputs"], rules=Rules(request["invalid"], request["keep_rare"])):
        value = int.from_bytes(hashlib.blake2b(record.residues, digest_size=16, person=PERSON).digest()[:8], "little")
        splits["validation" if value < request["validation"] * 2.0**64 else "train"].append(record)
    content: dict[str, Any] = {"format": 1, "tool_version": __version__, "splits": {}}
    for name, records in splits.items():
        num = (request["shards"] or 1) if name == "train" else 1
        bounds = [len(records) * k // num for k in range(num + 1)]
        shards = [_write(out / indexes.shard_name(name, k), records[bounds[k] : bounds[k + 1]]) for k in range(num)] if records else []
        content["splits"][name] = {key: sum(s[key] for s in shards) for key in ("sequences", "residues", "bytes")} | {"shards": shards}
    for key in ("sequences", "residues", "bytes"):
        content[key] = sum(split[key] for split in content["splits"].values())
    durable.write_json(out / indexes.INDEX, content)


def _write(path: Path, records: list[Any]) -> dict[str, Any]:
    residues, names = [r.residues for r in records], [r.name for r in records]
    data = {
        "residues": b"".join(residues),
        "offsets": np.cumsum([0, *map(len, residues)]).astype("<u8").tobytes(),
        "names": b"".join(names),
        "name_offsets": np.cumsum([0, *map(len, names)]).astype("<u8").tobytes(),
    }
    with durable.new_file(path) as temporary:
        places = create_shard(temporary, ShardSizes(len(records), len(data["residues"]), len(data["names"])))
        with temporary.open("r+b") as file:
            for name, content in data.items():
                file.seek(places[name])
                file.write(content)
    return {
        "file": path.name,
        "sequences": len(records),
        "residues": len(data["residues"]),
        "bytes": path.stat().st_size,
        "sha256": durable.sha256_of(path),
    }
