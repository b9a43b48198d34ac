"""The starter "processes": ranks as child processes of this one, on this computer.

`python -m prottrans_hpc.launch.local_ranks --nodes N --ranks-per-node R [--run-dir DIR] -- CMD...`

"Nodes" are groups of ranks, each with a log of its own, so that what runs on a cluster can be tried on a laptop.
Stop signals go on to every rank. When a rank fails, the others are ended and its exit code is the result; nothing
that is done to this process, SIGKILL included, leaves a rank behind.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import terminal
from ..errors import DONE, REQUEUE, exit_code, explain
from .children import STOP_SIGNALS, Deadline, die_with_parent, hold_signals, next_signal, shell_code, start

LOOPBACK = "127.0.0.1"
_TAIL_LINES = 12
_TAIL_BYTES = 16_384


@dataclass(frozen=True)
class Gang:
    """What to start."""

    num_nodes: int
    ranks_per_node: int
    command: tuple[str, ...]
    run_dir: Path | None
    """Where the logs of the nodes are; None: every rank writes to the terminal."""
    grace_s: float
    """How long the other ranks have to end by themselves after one has failed."""
    hold_stop_signals: bool
    """The command unblocks the stop signals itself once it can take them."""

    @property
    def num_ranks(self) -> int:
        """The world size."""
        return self.num_nodes * self.ranks_per_node


_LEAVING_GRACES = 6
"""So many graces have the other ranks when one has ended to be requeued: they have saved as well, or one of them hangs for ever."""


@dataclass(frozen=True)
class Ending:
    """How a rank ended."""

    rank: int
    code: int
    """As a shell reports it."""


def rank_environments(gang: Gang, base: Mapping[str, str], *, port: int, nonce: str) -> list[dict[str, str]]:
    """The environment of each rank: its place, where the ranks meet, and a nonce that strangers do not know."""
    shared = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port), "PROTTRANS_NONCE": base.get("PROTTRANS_NONCE") or nonce}
    return [
        {
            **base,
            **shared,
            "PROTTRANS_RANK": str(rank),
            "PROTTRANS_WORLD_SIZE": str(gang.num_ranks),
            "PROTTRANS_LOCAL_RANK": str(rank % gang.ranks_per_node),
            "PROTTRANS_LOCAL_WORLD_SIZE": str(gang.ranks_per_node),
            "PROTTRANS_NODE_RANK": str(rank // gang.ranks_per_node),
        }
        for rank in range(gang.num_ranks)
    ]


def verdict(endings: Sequence[Ending], *, stopped: bool) -> Ending:
    """The ending that stands for the gang, from the endings in the order in which they were seen.

    The first failure counts, not those that it caused. After a stop signal a rank may have died of it while it could
    not take it yet: that is a stop as well, for its state is that of the last checkpoint.
    """
    signalled = {128 + number for number in STOP_SIGNALS} if stopped else set()
    failures = [ending for ending in endings if ending.code not in {DONE, REQUEUE} | signalled]
    stops = [ending for ending in endings if ending.code != DONE]
    if failures:
        return failures[0]
    return Ending(stops[0].rank, REQUEUE) if stops else endings[0]


def run(gang: Gang) -> int:
    """Start the ranks, wait for them, and return the exit code of the gang. The caller holds the signals."""
    ranks: dict[int, subprocess.Popen[bytes]] = {}
    meeting = _hold_port()
    try:
        for rank, environment in enumerate(rank_environments(gang, os.environ, port=meeting.getsockname()[1], nonce=secrets.token_hex(16))):
            with _output(gang, rank) as output:
                ranks[rank] = start(gang.command, env=environment, output=output, hold_stop_signals=gang.hold_stop_signals)
        endings, stopped = _wait(gang, ranks)
    finally:
        for process in ranks.values():
            if process.poll() is None:
                process.kill()
                process.wait()
        meeting.close()
    decisive = verdict(endings, stopped=stopped)
    if decisive.code not in (DONE, REQUEUE):
        _tell(gang, decisive)
    return decisive.code


def _wait(gang: Gang, ranks: Mapping[int, subprocess.Popen[bytes]]) -> tuple[list[Ending], bool]:
    """Wait until every rank has ended, passing signals on; the endings in order, and whether a stop was asked for."""
    running, endings, stopped, deadline, leaving = dict(ranks), list[Ending](), False, Deadline(), Deadline()
    while True:
        for ending in _reap(running):
            # A rank that hung until we killed it, after another had given it up, is no failure of its own.
            endings.append(Ending(ending.rank, REQUEUE) if leaving.is_past and ending.code == 128 + signal.SIGKILL else ending)
            if ending.code == REQUEUE:
                leaving.set_in(_LEAVING_GRACES * gang.grace_s)
            # A rank that failed leaves the others in a collective; one that saved and stopped does not.
            if ending.code not in (DONE, REQUEUE) and deadline.remaining_s is None:
                _send(running, signal.SIGTERM)
                deadline.set_in(gang.grace_s)
        if not running:
            return endings, stopped
        if deadline.is_past or leaving.is_past:
            _send(running, signal.SIGKILL)
        number = next_signal(min((wait.remaining_s for wait in (deadline, leaving) if wait.remaining_s), default=None))
        if number in (*STOP_SIGNALS, signal.SIGHUP):
            stopped = True
            _send(running, signal.SIGTERM if number == signal.SIGHUP else number)


def _reap(running: dict[int, subprocess.Popen[bytes]]) -> list[Ending]:
    """Take the ranks that have ended out of `running`; those that a signal killed first, as the likelier cause."""
    ended = [Ending(rank, shell_code(process.returncode)) for rank, process in running.items() if process.poll() is not None]
    for ending in ended:
        del running[ending.rank]
    return sorted(ended, key=lambda ending: (ending.code <= 128, ending.rank))


def _send(running: Mapping[int, subprocess.Popen[bytes]], number: int) -> None:
    for process in running.values():
        process.send_signal(number)


@contextlib.contextmanager
def _output(gang: Gang, rank: int) -> Iterator[int | None]:
    """Where a rank's standard output and error go: rank 0's to ours, the others' to the log of their node."""
    if rank == 0 or gang.run_dir is None:
        yield None
        return
    descriptor = os.open(_log(gang.run_dir, gang, rank), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _log(run_dir: Path, gang: Gang, rank: int) -> Path:
    from ..run_dir import RunDir  # takes a while: after the signals are held

    return RunDir(run_dir).node_log(rank // gang.ranks_per_node)


def _tell(gang: Gang, ending: Ending) -> None:
    """Say which rank failed, where, how, and what its node's log says last."""
    how = f"was killed by {_signal_name(ending.code - 128)}" if ending.code > 128 else f"ended with exit code {ending.code}"
    terminal.warn(f"rank {ending.rank} of {gang.num_ranks} on node {ending.rank // gang.ranks_per_node} {how}; the other ranks were ended")
    if gang.run_dir is None or ending.rank == 0:
        return
    log = _log(gang.run_dir, gang, ending.rank)
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode("utf-8", "backslashreplace").splitlines()[-_TAIL_LINES:]
        print(f"the last lines of {log}:", *(f"  {terminal.printable(line, 400)}" for line in lines), sep="\n", file=sys.stderr, flush=True)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _hold_port() -> socket.socket:
    """A free port of the loopback address, for the ranks to meet at.

    Rank 0 listens there seconds from now, and until then the system must not give the port to somebody else. As long
    as this socket is bound it does not; rank 0 may bind the port all the same, as both reuse addresses and this one never listens.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((LOOPBACK, 0))
    return held


def _parse(arguments: Sequence[str] | None) -> Gang:
    parser = argparse.ArgumentParser(prog="local_ranks", description="Start ranks as local processes.")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--ranks-per-node", type=int, required=True)
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--grace-s", type=float, default=10.0)
    parser.add_argument("--hold-stop-signals", action="store_true")
    parser.add_argument("command", nargs="+")
    values = parser.parse_args(arguments)
    if min(values.nodes, values.ranks_per_node) < 1:
        parser.error("--nodes and --ranks-per-node must be at least 1")
    return Gang(values.nodes, values.ranks_per_node, tuple(values.command), values.run_dir, values.grace_s, values.hold_stop_signals)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run the gang."""
    gang = _parse(arguments)
    die_with_parent(os.getppid())
    hold_signals()
    try:
        return run(gang)
    except OSError as error:  # a command that is not there, no more processes or ports
        print(f"error: {terminal.printable(explain(error), 1000)}", file=sys.stderr, flush=True)
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
