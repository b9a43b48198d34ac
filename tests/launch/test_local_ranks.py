"""The starter "processes": environments and verdict as pure functions, the rest with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prottrans_hpc import rank
from prottrans_hpc.launch import local_ranks
from prottrans_hpc.launch.local_ranks import Ending, Gang, rank_environments, verdict


def gang(num_nodes: int, ranks_per_node: int) -> Gang:
    return Gang(num_nodes, ranks_per_node, ("true",), None, 10.0, False)


@given(num_nodes=st.integers(1, 6), ranks_per_node=st.integers(1, 6))
def test_ranks_find_their_place_in_what_the_starter_sets(num_nodes: int, ranks_per_node: int) -> None:
    inherited = {"OMPI_COMM_WORLD_RANK": "7", "OMPI_COMM_WORLD_SIZE": "8", "RANK": "3", "WORLD_SIZE": "4", "PROTTRANS_RANK": "9"}
    environments = rank_environments(gang(num_nodes, ranks_per_node), inherited, port=29500, nonce="n")
    contexts = [rank.detect(environment) for environment in environments]
    assert [context.rank for context in contexts] == list(range(num_nodes * ranks_per_node))
    assert all(context.starter == "processes" and context.num_nodes == num_nodes for context in contexts)
    assert [(context.node_rank, context.local_rank) for context in contexts] == [divmod(number, ranks_per_node) for number in range(len(contexts))]


def test_the_nonce_of_the_script_is_kept() -> None:
    [environment] = rank_environments(gang(1, 1), {"PROTTRANS_NONCE": "given"}, port=1, nonce="fresh")
    assert environment["PROTTRANS_NONCE"] == "given"


@pytest.mark.parametrize(
    ("codes", "stopped", "expected"),
    [
        ([0, 0, 0], False, 0),
        ([75, 75], False, 75),
        ([0, 75], False, 75),
        ([75, 0], True, 75),
        ([65, 143], False, 65),
        ([137, 70], False, 137),
        ([143, 143], False, 143),
        ([143, 75], True, 75),
        ([143, 143], True, 75),
        ([138], True, 75),
        ([75, 70], True, 70),
        ([143, 76, 75], True, 76),
        ([137, 75], True, 137),
        ([0, 1], True, 1),
    ],
)
def test_verdict(codes: list[int], stopped: bool, expected: int) -> None:
    assert verdict([Ending(number, code) for number, code in enumerate(codes)], stopped=stopped).code == expected


def start(*arguments: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "prottrans_hpc.launch.local_ranks", *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(local_ranks.__file__).parents[2])}
    return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_it_starts_any_command_with_options_of_its_own() -> None:
    process = start("--nodes", "1", "--ranks-per-node", "3", "--", "bash", "-c", 'echo "$PROTTRANS_RANK $1"', "name", "--nodes")
    out, _ = process.communicate(timeout=180)
    assert process.returncode == 0
    assert sorted(out.splitlines()) == ["0 --nodes", "1 --nodes", "2 --nodes"]


def test_a_deaf_rank_is_killed_after_the_grace(tmp_path: Path) -> None:
    deaf = tmp_path / "deaf"
    fails = f"until [ -e {deaf} ]; do sleep 0.02; done; exit 65"
    script = f"if [ $PROTTRANS_RANK = 1 ]; then {fails}; fi; trap '' TERM; echo $$; touch {deaf}; while :; do sleep 0.05; done"
    process = start("--nodes", "2", "--ranks-per-node", "1", "--grace-s", "0.3", "--", "bash", "-c", script)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 65, err
    assert not Path(f"/proc/{int(out)}").exists()


def test_a_rank_that_hangs_while_another_gives_up_is_ended_and_is_no_failure() -> None:
    script = 'if [ "$PROTTRANS_RANK" = 1 ]; then exit 75; fi; kill -STOP $$'
    process = start("--nodes", "2", "--ranks-per-node", "1", "--grace-s", "0.1", "--", "bash", "-c", script)
    assert process.wait(180) == 75


def test_the_port_where_the_ranks_meet_is_theirs_alone() -> None:
    script = (
        "import errno, os, socket\n"
        "place = (os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']))\n"
        "try:\n"
        "    socket.socket().bind(place)\n"
        "except OSError as error:\n"
        "    assert error.errno == errno.EADDRINUSE\n"
        "else:\n"
        "    raise SystemExit('somebody else could take the port')\n"
        "socket.create_server(place)\n"  # which reuses addresses, as rank 0 does
    )
    process = start("--nodes", "1", "--ranks-per-node", "1", "--", sys.executable, "-c", script)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err


def test_a_command_that_is_not_there_is_an_error_of_the_starter() -> None:
    process = start("--nodes", "2", "--ranks-per-node", "1", "--", "/nonexistent/command")
    _, err = process.communicate(timeout=180)
    assert process.returncode == 66 and "/nonexistent/command: No such file or directory" in err and "Traceback" not in err


def test_a_signal_before_a_rank_can_take_it_waits_for_it() -> None:
    """What a rank of training does: it unblocks the stop signals when it is ready for them."""
    script = (
        "import signal, sys, time\n"
        "print('starting', flush=True); time.sleep(1.0)\n"
        "signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])\n"
        "time.sleep(60)"
    )
    process = start("--nodes", "1", "--ranks-per-node", "1", "--hold-stop-signals", "--", sys.executable, "-c", script)
    assert process.stdout is not None and process.stdout.readline() == "starting\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=180)
    assert process.returncode == 75


@pytest.mark.parametrize("arguments", [["--nodes", "0", "--ranks-per-node", "1", "--", "true"], ["--nodes", "1", "--ranks-per-node", "1"]])
def test_wrong_arguments_are_refused(arguments: list[str]) -> None:
    process = start(*arguments)
    process.communicate(timeout=180)
    assert process.returncode == 2
