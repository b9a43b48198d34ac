"""What a person asks a machine for: a size, a walltime, a queue. What that comes to is the planner's business."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import ConfigError

AUTO = "auto"
_WALLTIME = re.compile(r"([0-9]{1,5}):([0-5][0-9])")


@dataclass(frozen=True)
class Demand:
    """The size options of a verb; at most one of the three sizes is given."""

    num_racks: int | None = None
    num_nodes: int | None = None
    num_gpus: int | None = None
    partial_rack: bool = False
    """Nodes that do not fill whole racks are meant."""
    walltime_min: int | None = None
    """None: the longest that the queue allows this size."""
    queue: str | None = None
    """None: the machine's first."""

    def __post_init__(self) -> None:
        given = [f"--{name}" for name in ("racks", "nodes", "gpus") if getattr(self, f"num_{name}") is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} say the same thing twice: give one of them")
        if self.partial_rack and self.num_racks is not None:
            raise ConfigError("--racks asks for whole racks, which --partial-rack contradicts: give --nodes or --gpus with it")


def parse_walltime(text: str) -> int | None:
    """Minutes from "H:MM", None from "auto". Raises ConfigError."""
    if text == AUTO:
        return None
    match = _WALLTIME.fullmatch(text)
    minutes = 60 * int(match[1]) + int(match[2]) if match else 0
    if not minutes:
        raise ConfigError(f"{text!r} is no time: give hours:minutes as in 24:00 or 0:30 (no seconds, LSF knows none)")
    return minutes


def time_text(minutes: float) -> str:
    """Hours and minutes, "24:00", minutes rounded up."""
    whole = int(-(-minutes // 1))
    return f"{whole // 60}:{whole % 60:02d}"
