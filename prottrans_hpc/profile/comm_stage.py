"""The stage `comm`: the ranks of one gang time collectives over every back end that is to be had, and look for slow nodes.

The request lies in the study's folder as comm_request.json (`launch.comm_job` writes it); rank 0 writes comm.json, comm.txt
and, with matplotlib, comm.png beside it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__, durable, errors, log, rank
from ..comm import Comm, open_comm
from ..errors import ConfigError, NodeError, ProttransError, ResourceError
from ..rank import RankContext
from ..recipe_parallel import Parallel
from ..run_dir import RunDir
from ..stage import Request
from . import comm_report
from .comm_backends import BACKENDS, Contender, Gang
from .comm_fits import Sample, fastest_of, fits_of
from .comm_nodes import PAIR_BYTES, NodeTimes, measure_nodes
from .comm_study import Plan, measure

_log = logging.getLogger(__name__)

FORMAT = 1
_NAMED_FROM = 2.0
"""A node is named when it takes so many times the median; a gate may ask for more or less."""


def study(request: Request) -> None:
    """Measure and write. Raises ResourceError when no back end works, NodeError when a node does not pass the gate."""
    run_dir = RunDir(Path(request["run_dir"]).resolve())
    asked = durable.read_json(run_dir.path / "comm_request.json")
    context = rank.detect(os.environ)
    log.setup(run_dir, context)
    if context.world_size == 1:
        raise ConfigError("one rank has nobody to talk to: ask for two nodes, or for a machine with several ranks a node")
    # gloo, whatever is compared: barriers and what the ranks tell one another go over CPUs.
    comm = open_comm(Parallel(timeout_s=asked["timeout_s"]), context, run_dir=run_dir.path, device=torch.device("cpu"))
    gang = find_gang(comm, context)
    contenders, left_out = open_back_ends(comm, gang, asked["backends"], timeout_s=asked["timeout_s"])
    with watching(comm):
        nodes = measure_nodes(comm, gang, contenders["gloo"], seed=asked["seed"])
        chosen = [contender for name, contender in contenders.items() if name in asked["backends"]]
        samples = measure(comm, gang, chosen, Plan(asked["max_bytes"], asked["repetitions"], asked["limit_s"], asked["seed"]))
        found = _found(comm, gang, asked, samples=samples, nodes=nodes, left_out=left_out)
        comm.barrier()
    for contender in reversed(contenders.values()):
        contender.close()
    comm.close()
    if context.is_main:
        _write(run_dir.path, found, samples)
        _check_gate(found, asked["gate"])


def watching(comm: Comm) -> Any:
    """What torch raises in here when a rank is gone becomes a RankLostError."""
    return comm.watching("the measurement")  # type: ignore[attr-defined] # it is a TorchComm: there are several ranks


def find_gang(comm: Comm, context: RankContext) -> Gang:
    """Who shares this rank's node, and who its local rank. Collective."""
    places = comm.all_gather_object([context.node_rank, context.local_rank])
    members = {
        "world": list(range(comm.world_size)),
        "node": [other for other, place in enumerate(places) if place[0] == context.node_rank],
        "between": [other for other, place in enumerate(places) if place[1] == context.local_rank],
    }
    sizes = comm.all_gather_object([len(members["node"]), len(members["between"])])
    equal = {scope: len({size[index] for size in sizes}) == 1 and sizes[0][index] > 1 for index, scope in enumerate(("node", "between"))}
    # Where all ranks are on one node, or alone on theirs, the scope is the world's.
    kept = {scope: own for scope, own in members.items() if scope == "world" or (equal[scope] and len(own) < comm.world_size)}
    return Gang(context, kept)


def open_back_ends(comm: Comm, gang: Gang, asked: Sequence[str], *, timeout_s: int) -> tuple[dict[str, Contender], dict[str, str]]:
    """The back ends that work on every rank, and why the others do not; gloo is opened in any case. Raises ResourceError when none is to be had."""
    contenders, left_out = dict[str, Contender](), dict[str, str]()
    for name, join in BACKENDS.items():
        if name != "gloo" and name not in asked:
            continue
        opened, reason = None, ""
        try:
            opened = join(gang, timeout_s)
        except ProttransError as error:
            reason = str(error)
        reasons = [str(told) for told in comm.all_gather_object(reason) if told]
        if opened is not None and not reasons:
            contenders[name] = opened
        else:
            left_out[name] = reasons[0]
            _log.warning("%s is left out: %s", name, reasons[0])
    if not any(name in contenders for name in asked):
        raise ResourceError(f"none of the back ends is to be had here: {'; '.join(f'{name}: {reason}' for name, reason in left_out.items())}")
    return contenders, left_out


def _found(comm: Comm, gang: Gang, asked: dict[str, Any], *, samples: list[Sample], nodes: NodeTimes, left_out: dict[str, str]) -> dict[str, Any]:
    """The content of comm.json."""
    hosts = hosts_of(comm, gang.context)
    fits = fits_of(samples)
    return {
        "format": FORMAT,
        "machine": asked["machine"],
        "nodes": gang.context.num_nodes,
        "ranks": comm.world_size,
        "ranks_per_node": gang.context.local_world_size,
        "fits": [dataclasses.asdict(line) for line in fits],
        "samples": [{**dataclasses.asdict(sample), "seconds": list(sample.seconds)} for sample in samples],
        "fastest": fastest_of(samples, fits),
        "slow_nodes": stand_out(nodes, hosts, gate=asked["gate"]),
        "node_seconds": {**dataclasses.asdict(nodes), "bytes": PAIR_BYTES},
        "left_out": left_out,
        "hosts": hosts,
        "versions": {"prottrans_hpc": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def hosts_of(comm: Comm, context: RankContext) -> list[str]:
    """The host of each node. Collective."""
    places = comm.all_gather_object([context.node_rank, context.hostname])
    return [next(str(host) for node, host in places if node == number) for number in range(context.num_nodes)]


def stand_out(nodes: NodeTimes, hosts: Sequence[str], *, gate: float | None) -> list[dict[str, Any]]:
    """The nodes that are named, the worst first, as in comm.json; not all of them need be beyond the gate."""
    return [comm_report.slow_json(one) for one in nodes.slow(hosts, factor=min(_NAMED_FROM, gate) if gate is not None else _NAMED_FROM)]


def beyond(gate: float | None, named: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those named nodes that take more than `gate` times the median."""
    return [one for one in named if gate is not None and one["factor"] > gate]


def _write(folder: Path, found: dict[str, Any], samples: list[Sample]) -> None:
    durable.write_json(folder / "comm.json", found)
    durable.write_bytes(folder / "comm.txt", comm_report.text(found).encode())
    try:
        comm_report.draw(folder / "comm.png", samples, fits_of(samples))
    except ImportError:
        _log.warning("%s", errors.missing_package("matplotlib", "plots", "comm.png"))


def _check_gate(found: dict[str, Any], gate: float | None) -> None:
    """Raise NodeError naming the nodes that take more than `gate` times the median."""
    if failed := beyond(gate, found["slow_nodes"]):
        raise NodeError(f"{'; '.join(comm_report.slow_lines(failed))}. The gate is {gate:g}: leave such nodes out, or have them looked after")
