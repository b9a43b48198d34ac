"""Queues, bins and walltimes."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prottrans_hpc.errors import ConfigError
from prottrans_hpc.launch import queues
from prottrans_hpc.launch.demand import Demand, time_text
from prottrans_hpc.machine import read_machine

SUMMIT = [(1, "5", 120), (45, "5", 120), (46, "4", 360), (91, "4", 360), (92, "3", 720), (921, "3", 720), (922, "2", 1440), (936, "2", 1440), (2764, "2", 1440)]


@pytest.mark.parametrize(("nodes", "bin_name", "minutes"), [*SUMMIT, (2765, "1", 1440), (4608, "1", 1440)])
def test_the_longest_walltime_is_the_bins(nodes: int, bin_name: str, minutes: int) -> None:
    slot = queues.choose(read_machine("summit"), nodes, Demand())
    assert (slot.queue.name, slot.bin.name, slot.walltime_min) == ("batch", bin_name, minutes)


@pytest.mark.parametrize(
    ("machine", "nodes", "demand", "expected"),
    [
        ("summit", 18, {"queue": "killable"}, ("killable", 1440)),
        ("summit", 936, {"walltime_min": 90}, ("batch", 90)),
        ("summit", 936, {"walltime_min": 1440}, ("batch", 1440)),
        ("frontier", 64, {"queue": "extended"}, ("extended", 1440)),
        ("frontier", 64, {"queue": "debug", "walltime_min": 60}, ("debug", 60)),
        ("perlmutter", 1792, {}, ("regular", 2880)),
    ],
)
def test_places_that_work(machine: str, nodes: int, demand: dict[str, Any], expected: tuple[str, int]) -> None:
    slot = queues.choose(read_machine(machine), nodes, Demand(**demand))
    assert (slot.queue.name, slot.walltime_min) == expected


REFUSED = [
    (
        "summit",
        918,
        {"walltime_min": 1440},
        "at most 12:00; 24:00 was asked for. What works: --walltime 12:00 at this size; 52 racks = 936 nodes, the smallest",
    ),
    (
        "summit",
        18,
        {"walltime_min": 121},
        "--walltime 2:00 at this size; 3 racks = 54 nodes, the smallest size that may run 2:01; --queue killable (preemptable)",
    ),
    ("summit", 18, {"walltime_min": 121, "partial_rack": True}, "46 nodes, the smallest size that may run 2:01"),
    ("summit", 936, {"walltime_min": 1441}, "at most 24:00; 24:01 was asked for. What works: --walltime 24:00 at this size. Work that takes longer: --chain"),
    ("rhea", 65, {"walltime_min": 300}, "64 nodes, the largest size that may run 5:00"),
    ("frontier", 64, {"walltime_min": 1440}, "--walltime 2:00 at this size; --queue extended. "),
    ("summit", 936, {"queue": "killable"}, "takes jobs of 1 to 45, 46 to 91 nodes; 936 were asked for: take --queue batch"),
    ("frontier", 9473, {}, "take another size"),
    ("summit", 936, {"queue": "debug"}, "summit has no queue 'debug'; it has batch, killable"),
    ("summit", 936, {"walltime_min": 10}, "save and stop 10 minutes before"),
]


@pytest.mark.parametrize(("machine", "nodes", "demand", "said"), REFUSED)
def test_places_that_do_not_work_are_answered_with_the_nearest(machine: str, nodes: int, demand: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        queues.choose(read_machine(machine), nodes, Demand(**demand))
    assert said in str(caught.value)


@given(racks=st.integers(1, 256), minutes=st.integers(11, 1440))
def test_every_offer_of_another_size_or_walltime_works(racks: int, minutes: int) -> None:
    summit = read_machine("summit")
    try:
        queues.choose(summit, racks * 18, Demand(walltime_min=minutes))
    except ConfigError as error:
        longest = re.search(r"--walltime (\d+):(\d+) at this size", str(error))
        size = re.search(r"= (\d+) nodes, the smallest", str(error))
        assert longest and size
        assert queues.choose(summit, racks * 18, Demand(walltime_min=60 * int(longest[1]) + int(longest[2])))
        found = queues.choose(summit, int(size[1]), Demand(walltime_min=minutes))
        assert int(size[1]) % 18 == 0
        # It is the smallest: one rack less does not work.
        with pytest.raises(ConfigError):
            queues.choose(summit, int(size[1]) - 18, Demand(walltime_min=minutes))
        assert found.walltime_min == minutes


@pytest.mark.parametrize("name", ["summit", "rhea", "frontier", "perlmutter", "nvl72", "slurm_cluster"])
def test_the_default_queue_of_a_shipped_machine_takes_every_size(name: str) -> None:
    machine = read_machine(name)
    for nodes in range(1, machine.max_nodes + 1):
        assert queues.bin_of(machine.queues[0], nodes), nodes
    for queue in machine.queues:
        assert queue.bins[-1].max_nodes <= machine.max_nodes
        assert all(row.max_walltime_min > machine.warning_min for row in queue.bins), f"{queue.name}: {time_text(machine.warning_min)} are lost to saving"
