"""A projection on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_BASIS = {
    "assumed": "from assumed numbers, none of them measured",
    "measured": "from measured points",
}


def lines(projection: Mapping[str, Any]) -> Iterator[str]:
    """The whole of it, a line at a time."""
    yield f"{projection['recipe']} on {projection['machine']}: scaling projected {_BASIS[projection['basis']]}"
    yield from (f"  assumed:  {line}" for line in projection["assumptions"])
    yield from _fit_lines(projection)
    yield from (f"  warning:  {line}" for line in projection["warnings"])
    yield ""
    yield f"{'nodes':>7} {'ranks':>8} {'step s':>9} {'from':>9} {'to':>9} {'overhead %':>11} {'from':>7} {'to':>7} {'efficiency %':>13} {'exposed ms':>11}"
    for point in projection["points"]:
        percent = [100.0 * point[key] for key in ("overhead", "overhead_low", "overhead_high", "efficiency")]
        yield (
            f"{point['nodes']:>7,} {point['ranks']:>8,} {point['step_s']:>9.4g} {point['step_s_low']:>9.4g} {point['step_s_high']:>9.4g} "
            f"{percent[0]:>11.2f} {percent[1]:>7.2f} {percent[2]:>7.2f} {percent[3]:>13.2f} {1e3 * point['exposed_comm_s']:>11.2f}"
        )
    yield from _what_if_lines(projection["what_if"])


def _fit_lines(projection: Mapping[str, Any]) -> Iterator[str]:
    fit, hold_out = projection["fit"], projection["hold_out"]
    if fit is None or hold_out is None:
        return
    yield f"  fitted:   {fit['text']}"
    yield (
        f"  checked:  without its {hold_out['nodes']:,} nodes the study predicts {hold_out['predicted_s']:.4g} s a step there; measured were "
        f"{hold_out['measured_s']:.4g} s: an error of {100 * hold_out['error']:+.1f} %"
    )


def _what_if_lines(rows: list[Mapping[str, Any]]) -> Iterator[str]:
    if not rows:
        return
    yield ""
    yield f"on {rows[0]['nodes']:,} nodes{'':<48} {'step s':>9} {'overhead %':>11} {'samples/s':>10}"
    for row in rows:
        yield f"  {row['change']:<58} {row['step_s']:>9.4g} {100.0 * row['overhead']:>11.2f} {row['speed']:>9.3f}x"
