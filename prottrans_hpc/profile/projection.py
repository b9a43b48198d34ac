"""`prottrans project-scaling` on the ranks' side: projection.json, and the table of it.

projection.json is one object: {"format": 1, "basis": "measured" | "assumed", "recipe", "machine", "algorithm", "fit", "hold_out" (both null
when assumed), "assumptions": [str], "warnings": [str], "points": [{"nodes", "ranks", "step_s", "overhead" and "efficiency", each of the three also with
_low and _high, "local_s", "straggler_s", "communication_s", "exposed_comm_s"}], "what_if": [{"change", "nodes", "step_s", "exposed_comm_s", "overhead",
"efficiency", "speed"}]}. Shares are not percent; overhead is step time over that of one node, less 1.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .. import durable, terminal
from ..stage import Request
from . import assumed, known_links, measured, projection_text
from .scaling import read_scaling

FORMAT = 1
PROJECTION = "projection.json"


def project(request: Request) -> None:
    """Work out, write and print one projection. Raises ConfigError, CheckpointError or DataError."""
    projection = {"format": FORMAT, **_work_out(request)}
    folder = request["out"] or (None if "assumed" in request else request["source"])
    text = json.dumps(projection, indent=1) if request["json"] else "\n".join(projection_text.lines(projection))
    sys.stdout.write(text + "\n")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        durable.write_json(Path(folder) / PROJECTION, projection)
        drawn = "" if "assumed" in request else f"; prottrans scale --report-only --out {folder} draws it"
        terminal.note(f"projection: {Path(folder) / PROJECTION}{drawn}")


def _work_out(request: Request) -> dict[str, Any]:
    if "assumed" in request:
        return assumed.project(request["assumed"], request["nodes"], with_changes=request["what_if"])
    study = read_scaling(Path(request["source"]))
    known = known_links.read_all_reduce(Path(request["comm"]), measured.back_end(study)) if request["comm"] else None
    return measured.project(study, request["nodes"], with_changes=request["what_if"], known=known)
