"""Who forces what to storage in a sharded save: count_syncs.py syncs FOLDER LAYOUTS. Each rank leaves FOLDER/<layout>-syncs-<rank>.json, the names in order."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import shard_gang


def syncs(folder: Path, layout: str, ranks: Any) -> None:
    """Note what is forced while two checkpoints are saved."""
    names: list[str] = []
    real = os.fsync

    def noting(descriptor: int) -> None:
        names.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    os.fsync = noting
    try:
        shard_gang.save(folder, layout, ranks)
    finally:
        os.fsync = real
    (folder / f"{layout}-syncs-{ranks.rank}.json").write_text(json.dumps(names))


if __name__ == "__main__":
    shard_gang.SCENARIOS["syncs"] = syncs
    shard_gang.main()
