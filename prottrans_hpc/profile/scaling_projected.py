"""What a report shows of projection.json, which `prottrans project-scaling` writes beside a study: sizes that nobody measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import durable
from ..errors import DataError
from ..scaling_study import StudyDir


@dataclass(frozen=True)
class Projected:
    """A size that was not measured; `low` and `high` are the range that the projection gives itself."""

    nodes: int
    step_s: float
    overhead: float
    overhead_low: float
    overhead_high: float
    efficiency: float


@dataclass(frozen=True)
class Projection:
    """All of them, and what goes with them."""

    points: tuple[Projected, ...] = ()
    """Ascending; empty where nobody projected."""
    remarks: tuple[str, ...] = ()
    """What was fitted and assumed, how far off it is, what to beware of: a line each."""


def read_projection(folder: StudyDir) -> Projection:
    """The projection of a study; empty where there is none. Raises DataError when the file is damaged."""
    path = folder.projection_json
    if not path.is_file():
        return Projection()
    values = durable.read_json(path)
    try:
        points = sorted((_point(point) for point in values["points"]), key=lambda point: point.nodes)
        return Projection(tuple(points), tuple(_remarks(values)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {type(error).__name__}: {error}. Make it again with prottrans project-scaling") from error


def _point(values: Mapping[str, Any]) -> Projected:
    overhead = float(values["overhead"])
    low, high = float(values.get("overhead_low", overhead)), float(values.get("overhead_high", overhead))
    return Projected(int(values["nodes"]), float(values["step_s"]), overhead, low, high, float(values["efficiency"]))


def _remarks(values: Mapping[str, Any]) -> list[str]:
    fit, held_out = values.get("fit"), values.get("hold_out")
    lines = [f"Fitted: {fit['text']}."] if fit else []
    if held_out:
        lines.append(
            f"Checked: without its {int(held_out['nodes'])} nodes the study predicts {held_out['predicted_s']:.4g} s a step there; "
            f"measured were {held_out['measured_s']:.4g} s, an error of {100 * held_out['error']:.1f} %."
        )
    lines += [f"Assumed: {line}." for line in values.get("assumptions", ())]
    return lines + [f"Beware: {line}." for line in values.get("warnings", ())]
