"""Latency and bandwidth of the links from a communication study, for fits of scaling studies with few sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import durable
from ..errors import CheckpointError, ConfigError, DataError
from .collectives import ALGORITHMS, Fabric, Wire

FORMAT = 1
_FILE = "comm.json"


@dataclass(frozen=True)
class AllReduce:
    """The line through the measured all-reduces of all ranks: latency + bytes / bytes_per_s."""

    backend: str
    nodes: int
    ranks_per_node: int
    latency_s: float
    bytes_per_s: float

    def link(self, algorithm: str) -> Wire:
        """The links with which the algorithm's formula gives this line: it is linear in latency and in 1 / bandwidth."""
        messages = float(ALGORITHMS[algorithm](0.0, self.nodes, Fabric(self.ranks_per_node, Wire(1.0, math.inf))))
        times_sent = float(ALGORITHMS[algorithm](1.0, self.nodes, Fabric(self.ranks_per_node, Wire(0.0, 1.0))))
        return Wire(self.latency_s / messages, times_sent * self.bytes_per_s)


def read_all_reduce(path: Path, backend: str) -> AllReduce:
    """The all-reduce of all ranks in a comm.json, or in that of a folder. Raises CheckpointError, DataError or ConfigError."""
    file = path / _FILE if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{file} is not there: make it with prottrans comm --machine M --nodes N --out {path}")
    try:
        values = durable.read_json(file)
        if values["format"] != FORMAT:
            raise DataError(f"{file} is no communication study of format {FORMAT}")
        lines = [line for line in values["fits"] if (line["collective"], line["scope"]) == ("all_reduce", "world")]
        return _choose(values, lines, backend, file)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file} is no communication study that can be used: {error!r}") from error


def _choose(values: Any, lines: list[Any], backend: str, file: Path) -> AllReduce:
    if int(values["nodes"]) < 2:
        raise ConfigError(f"{file} was measured on one node, which says nothing of the links between nodes: prottrans comm ... --nodes 2, or more")
    found = [line for line in lines if line["backend"] == backend]
    if not found:
        raise ConfigError(
            f"{file} has no all-reduce of {backend}, which the scaling study ran over; it has {', '.join(line['backend'] for line in lines) or 'none'}"
        )
    rate = math.inf if found[0]["bytes_per_s"] is None else float(found[0]["bytes_per_s"])
    return AllReduce(backend, int(values["nodes"]), int(values["ranks_per_node"]), float(found[0]["latency_s"]), rate)
