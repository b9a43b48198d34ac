"""A phase goes on with the optimizer's moments or begins with none, as its recipe says; a start at the border changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prottrans_hpc.train.checkpoint import find_checkpoint, read_checkpoint


def phases(state: str, optimizer: str = "lamb") -> tuple[str, ...]:
    one = "steps=3,max_residues=48,global_batch_size=6"
    return (f"phases=[{{{one}}},{{{one},optimizer_state='{state}'}}]", f"optimizer.name={optimizer}")


@pytest.mark.parametrize("optimizer", [pytest.param("lamb", marks=pytest.mark.slow), "adamw"])
def test_moments_are_dropped_at_the_border_however_often_the_run_stops_there(
    optimizer: str, tmp_path: Path, make_run: Callable[..., Path], start_ranks: Any, outcome: Callable[[Path], dict[str, Any]], same: Callable[..., None]
) -> None:
    found = {}
    for state in ("carry", "reset"):
        folder = make_run(tmp_path / state, *phases(state, optimizer), num_ranks=1)
        start_ranks(folder, 1).end(0)
        found[state] = outcome(folder)
        assert read_checkpoint(find_checkpoint(folder)).optimizer["num_updates"].item() == {"carry": 6, "reset": 3}[state]
    carried, reset = ([line["loss"] for line in found[state]["metrics"]] for state in ("carry", "reset"))
    assert carried[:4] == reset[:4], "the fourth step's loss is measured before its update"
    assert carried[4] != reset[4]
    stopped = make_run(tmp_path / "stopped", *phases("reset", optimizer), num_ranks=1, stop_after_step=3)
    start_ranks(stopped, 1).end(0)
    assert read_checkpoint(find_checkpoint(stopped)).optimizer["num_updates"].item() == 3, "the border's checkpoint still has them"
    make_run(stopped, *phases("reset", optimizer), num_ranks=1)
    start_ranks(stopped, 1).end(0)
    same(outcome(stopped), found["reset"])
