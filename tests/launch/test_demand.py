"""What a person asks for, before anything is known of the machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prottrans_hpc.errors import ConfigError
from prottrans_hpc.launch.demand import Demand, parse_walltime, time_text


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"num_racks": 1, "num_nodes": 2}, "--racks and --nodes"),
        ({"num_nodes": 1, "num_gpus": 2}, "--nodes and --gpus"),
        ({"num_racks": 1, "num_nodes": 1, "num_gpus": 2}, "--racks and --nodes and --gpus"),
        ({"num_racks": 1, "partial_rack": True}, "--partial-rack contradicts"),
    ],
)
def test_a_size_is_said_once(sizes: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Demand(**sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "minutes"), [("24:00", 1440), ("0:30", 30), ("00:01", 1), ("100:59", 6059), ("auto", None)])
def test_walltimes(text: str, minutes: int | None) -> None:
    assert parse_walltime(text) == minutes


@pytest.mark.parametrize("text", ["", "24", "24:0", "1:60", "1:00:00", "0:00", "-1:00", "1h", "AUTO", "1:00 ", "\u0661:00", "1-00:00", "123456:00"])
def test_what_is_no_walltime_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(ConfigError, match="hours:minutes"):
        parse_walltime(text)


@given(st.integers(1, 99_999 * 60))
def test_times_are_written_as_they_are_read(minutes: int) -> None:
    assert parse_walltime(time_text(minutes)) == minutes


def test_parts_of_minutes_are_rounded_up() -> None:
    assert (time_text(59.2), time_text(60.0), time_text(0.1)) == ("1:00", "1:00", "0:01")
