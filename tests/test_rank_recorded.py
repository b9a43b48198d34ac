"""Every rank of a real start learns its own place from the environment that its starter gave it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prottrans_hpc import comm, rank
from prottrans_hpc.errors import ConfigError

RECORDED = Path(__file__).parent / "recorded" / "environments"
GANGS = {"processes": (4, 2), "torchrun": (4, 2), "mpirun": (3, 1), "horovodrun": (2, 1), "srun": (5, 2), "jsrun": (12, 2)}
"""Ranks and nodes of each recorded start."""


def environments(name):
    return json.loads((RECORDED / f"{name}.json").read_text())


def test_every_starter_of_the_table_is_recorded():
    assert set(GANGS) == set(rank.STARTERS)


@pytest.mark.parametrize("starter", GANGS)
def test_the_places_of_a_gang_fit_together(starter):
    num_ranks, num_nodes = GANGS[starter]
    places = [rank.detect({"PATH": "/usr/bin", "HOME": "/home/user"} | one) for one in environments(starter)]
    assert [place.rank for place in places] == list(range(num_ranks))
    assert {(place.starter, place.world_size, place.num_nodes) for place in places} == {(starter, num_ranks, num_nodes)}
    for node in range(num_nodes):
        here = [place for place in places if place.node_rank == node]
        assert sorted(place.local_rank for place in here) == list(range(len(here)))
        assert {place.local_world_size for place in here} == {len(here)}
    assert sum(place.is_node_main for place in places) == num_nodes
    assert [place.is_main for place in places] == [True] + [False] * (num_ranks - 1)


@pytest.mark.parametrize("starter", [starter for starter in GANGS if starter != "horovodrun"])
def test_all_ranks_of_a_start_find_one_name_for_it(starter):
    assert len({comm.require_nonce(one) for one in environments(starter)}) == 1


def test_horovodruns_own_controller_names_no_start():
    with pytest.raises(ConfigError):
        comm.require_nonce(environments("horovodrun")[0])


def test_the_shell_of_an_allocation_of_eight_tasks_is_one_rank_and_not_the_first_of_eight():
    place = rank.detect(environments("srun_interactive")[0])
    assert (place.rank, place.world_size, place.num_nodes) == (0, 1, 1)


@pytest.mark.parametrize("inner", ["processes", "torchrun", "mpirun", "horovodrun"])
def test_ranks_started_inside_a_batch_job_or_a_step_take_the_innermost_starter(inner):
    outer = environments("srun")[3]
    for one in environments(inner):
        assert rank.detect(outer | one) == rank.detect(one)


def test_spectrum_mpi_under_jsrun_is_jsrun():
    assert {rank.detect(one).starter for one in environments("jsrun")} == {"jsrun"}


@pytest.mark.parametrize("starter", GANGS)
def test_a_lost_variable_is_never_guessed(starter):
    """Without any one of the variables it needs, a rank says which, or does not take itself for a rank of this starter."""
    names = rank.STARTERS[starter]
    needed = [names.rank, names.world_size, names.local_rank, names.local_world_size, names.node_rank, names.num_nodes]
    whole = environments(starter)[-1]
    for name in filter(None, needed):
        cut = {key: value for key, value in whole.items() if key != name}
        try:
            place = rank.detect(cut)
        except ConfigError as error:
            assert name in str(error)
        else:
            assert place.starter != starter or (starter == "processes" and name == names.num_nodes)
