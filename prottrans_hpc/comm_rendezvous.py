"""How torch's ranks find one another: a key-value store at rank 0, and proof that all of them belong to one start.

The starter may say where the store is (MASTER_ADDR, MASTER_PORT: our local processes and torchrun do). Where it does
not (mpirun, srun, jsrun), rank 0 opens a port that the operating system chooses and writes the address into the run
directory. A store has no passwords, so it listens on the loopback address alone where all ranks are on one host, and
its keys stand under the nonce of the start, which another user does not know.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined] # torch does not declare what it exports

from . import durable
from .comm import require_nonce
from .errors import ConfigError, RankLostError, ResourceError
from .rank import RankContext

_POLL_S = (0.01, 0.5)
"""First and longest pause between two looks for the address file: 5,000 ranks must not storm a file system."""


def connect(context: RankContext, *, timeout_s: int, run_dir: Path | None, environment: Mapping[str, str] = os.environ) -> Store:
    """A store that all ranks of this start, and no others, share. Raises ConfigError, ResourceError or RankLostError."""
    nonce = require_nonce(environment)
    deadline = time.monotonic() + timeout_s
    if "MASTER_ADDR" in environment and "MASTER_PORT" in environment:
        store = _given_store(context, environment, timeout_s)
    elif run_dir is not None:
        store = _published_store(context, run_dir / f".rendezvous-{_short(nonce)}.json", timeout_s, deadline)
    else:
        raise ConfigError("the ranks cannot find one another: the starter set no MASTER_ADDR and MASTER_PORT, and no run directory was given to meet in")
    _check_membership(store, context, nonce)
    return PrefixStore(f"prottrans-{nonce}", store)


def loopback_only(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the starter's MASTER_ADDR says that all ranks are on this host."""
    return "MASTER_ADDR" in environment and _is_loopback(environment["MASTER_ADDR"])


def _given_store(context: RankContext, environment: Mapping[str, str], timeout_s: int) -> Store:
    address = environment["MASTER_ADDR"]
    try:
        port = int(environment["MASTER_PORT"])
    except ValueError:
        raise ConfigError(f"MASTER_PORT is {environment['MASTER_PORT']!r}, not a number") from None
    if context.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return _serve(_listen("127.0.0.1" if _is_loopback(address) else "", port), address, context, timeout_s)
    return _reach(address, port, context, timeout_s)


def _published_store(context: RankContext, place: Path, timeout_s: int, deadline: float) -> Store:
    if context.rank != 0:
        entry = _wait_for_file(place, context, deadline)
        store = _reach(str(entry["address"]), int(str(entry["port"])), context, timeout_s)
        store.add("prottrans/arrived", 1)
        return store
    alone = context.num_nodes == 1
    listener = _listen("127.0.0.1" if alone else "", 0)
    address, port = "127.0.0.1" if alone else context.hostname, listener.getsockname()[1]
    durable.write_json(place, {"address": address, "port": port})
    try:
        store = _serve(listener, address, context, timeout_s)
        _wait_for_others(store, context.world_size - 1, deadline)
    finally:
        place.unlink(missing_ok=True)  # a later start under the same nonce must not find this one's port
    return store


def _wait_for_others(store: Store, expected: int, deadline: float) -> None:
    while (arrived := store.add("prottrans/arrived", 0)) < expected:
        if time.monotonic() > deadline:
            raise RankLostError(f"only {arrived} of the {expected} other ranks reached rank 0 in time")
        time.sleep(_POLL_S[0])


def _wait_for_file(place: Path, context: RankContext, deadline: float) -> dict[str, object]:
    pause, longest = _POLL_S
    while True:
        with contextlib.suppress(FileNotFoundError):
            return dict(durable.read_json(place))
        if time.monotonic() > deadline:
            raise RankLostError(f"rank {context.rank} waited for rank 0 to say in {place} where it listens; it never did")
        time.sleep(pause)
        pause = min(2 * pause, longest)


def _listen(address: str, port: int) -> socket.socket:
    """A listening socket; "" means every interface. Raises ResourceError when the port is taken."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
        listener.listen(4096)
    except OSError as error:
        listener.close()
        raise ResourceError(f"rank 0 cannot listen on port {port}: {error.strerror}. Another program has it; start the job again for another port") from error
    return listener


def _serve(listener: socket.socket, address: str, context: RankContext, timeout_s: int) -> Store:
    port = listener.getsockname()[1]
    return TCPStore(
        address, port, context.world_size, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False, master_listen_fd=listener.detach()
    )


def _reach(address: str, port: int, context: RankContext, timeout_s: int) -> Store:
    try:
        return TCPStore(address, port, context.world_size, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
    except (RuntimeError, OSError) as error:
        raise RankLostError(f"rank {context.rank} cannot reach rank 0 at {address}:{port} within {timeout_s} s: {str(error).splitlines()[0]}") from error


def _check_membership(store: Store, context: RankContext, nonce: str) -> None:
    """Every rank says which start it is of; who met another start, or shares its rank with another process, leaves."""
    try:
        if context.rank == 0:
            store.set("prottrans/start", _short(nonce))
        start = store.get("prottrans/start").decode()
    except RuntimeError as error:
        raise RankLostError(f"rank {context.rank} reached a store, but rank 0 never said which start it serves: {str(error).splitlines()[0]}") from error
    if start != _short(nonce):
        raise ConfigError(
            f"rank {context.rank} of start {_short(nonce)} reached the ranks of another start, {start}: two jobs use the same MASTER_ADDR and MASTER_PORT"
        )
    if store.add(f"prottrans/{_short(nonce)}/rank/{context.rank}", 1) != 1:
        raise ConfigError(f"two processes of this start say that they are rank {context.rank} of {context.world_size}")


ROLL_CALL_S = 3.0
"""So long are the others given to say that they are still there after one was lost."""


def missing_ranks(store: Store, rank: int, world_size: int) -> list[int]:
    """Who does not answer: each rank that notices a loss says so in the store, and rank 0, which keeps it, counts.

    The others only look whether rank 0 is still there. Takes some seconds, and never hangs on a store that is gone.
    """
    found: list[int] = []
    caller = threading.Thread(target=_call_the_roll, args=(store, rank, world_size, found), name="roll-call", daemon=True)
    caller.start()
    caller.join(2 * ROLL_CALL_S)
    return [0] if caller.is_alive() and rank else sorted(found)


def _call_the_roll(store: Store, rank: int, world_size: int, found: list[int]) -> None:
    keys = [f"prottrans/survived/{other}" for other in range(world_size)]
    try:
        store.set_timeout(timedelta(seconds=ROLL_CALL_S))
        store.set(keys[rank], "1")
        if rank:
            store.check(["prottrans/start"])  # an answer from rank 0's host is all that is asked for
            return
        deadline, missing = time.monotonic() + ROLL_CALL_S, list(range(1, world_size))
        while missing and time.monotonic() < deadline:
            time.sleep(0.1)
            missing = [other for other in missing if not store.check([keys[other]])]
        found.extend(missing)
    except (RuntimeError, OSError):
        found.extend([0] if rank else [])


def _short(nonce: str) -> str:
    """A name of the nonce that does not give it away and is safe in a path."""
    return hashlib.sha256(nonce.encode()).hexdigest()[:16]


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
