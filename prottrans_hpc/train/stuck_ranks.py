"""Who keeps whom waiting, from what the ranks wrote down when they got nowhere. Pure, but for reading the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import errors, json_lines, timestamp
from ..run_dir import RunDir

_MAX_NAMED = 8


@dataclass(frozen=True)
class Sighting:
    """A rank that has got nowhere for a while, as it or, when it is silent, another rank of its node says."""

    rank: int
    host: str
    position: int
    """How far it had come; see `whereabouts.Whereabouts.position`. -1: nobody knows."""
    step: int
    phase: str
    is_patient: bool
    collective: str | None
    waits: bool
    state: str = ""
    """Of a silent rank's process: what the kernel says."""

    @property
    def is_silent(self) -> bool:
        """Whether it did not speak for itself."""
        return self.position < 0


@dataclass(frozen=True)
class Hang:
    """What the sightings come to."""

    step: int
    collective: str | None
    """In which those that wait do so; None: nobody waits."""
    num_waiting: int
    missing: tuple[Sighting, ...]
    """Ranks that the others wait for; empty: all are there, and it does not end."""
    is_certain: bool
    """False where each missing rank is in a phase that may take long."""

    @property
    def sentence(self) -> str:
        """For people."""
        if self.collective is None:
            return f"nobody gets anywhere in step {self.step}: {named(self.missing)}"
        if not self.missing:
            why = "what joins the nodes has lost it, or one of them stands still in it"
            return f"all {self.num_waiting} ranks are in {self.collective} of step {self.step}, and it does not end: {why}"
        verb = "have" if len(self.missing) > 1 else "has"
        return f"{named(self.missing)} {verb} not come to {self.collective} of step {self.step}, where {self.num_waiting} of the other ranks wait"


def named(missing: Sequence[Sighting]) -> str:
    """Some ranks, each with its host and where it is."""
    more = f" and {len(missing) - _MAX_NAMED} more ranks" if len(missing) > _MAX_NAMED else ""
    return "; ".join(f"rank {one.rank} on {one.host} ({where(one)})" for one in missing[:_MAX_NAMED]) + more


def where(sighting: Sighting) -> str:
    """What a rank is doing, in a few words."""
    if sighting.is_silent:
        return f"no sign of life{f', its process is {sighting.state}' if sighting.state else ''}"
    doing = f"in {sighting.collective}" if sighting.waits else f"computing, in {sighting.phase}"
    return f"{doing}, step {sighting.step}"


def find_hang(sightings: Mapping[int, Sighting], hosts: Sequence[str]) -> Hang | None:
    """What keeps the ranks, of which `hosts` has one each; None when nobody waits and nobody need have moved on.

    Ranks that wait at the furthest position wait for all that are behind it, and for those that have not been heard of.
    """
    heard = [one for one in sightings.values() if not one.is_silent]
    waiting = [one for one in heard if one.waits]
    silent = [sightings.get(rank) or unheard(rank, host) for rank, host in enumerate(hosts) if rank not in {one.rank for one in heard}]
    if not waiting:
        stuck = [one for one in heard if not one.is_patient]
        return Hang(stuck[0].step, None, 0, (*silent, *stuck), is_certain=True) if stuck else None
    front = max(waiting, key=lambda one: one.position)
    behind = [one for one in heard if one.position < front.position]
    missing = tuple(sorted((*behind, *silent), key=lambda one: one.rank))
    is_certain = not missing or any(one.is_silent or not one.is_patient for one in missing)
    return Hang(front.step, front.collective, sum(one.position == front.position for one in waiting), missing, is_certain)


def unheard(rank: int, host: str, state: str = "") -> Sighting:
    """A rank that has not spoken."""
    return Sighting(rank, host, -1, 0, "", False, None, False, state)


def sightings_file(run_dir: RunDir, node: int) -> Path:
    """Where the ranks of a node write down that they get nowhere; it is there only after one did."""
    return run_dir.path / "logs" / f"stuck-node-{node:04d}.jsonl"


def record(sighting: Sighting, *, start_id: str, went_on: bool = False) -> dict[str, Any]:
    """A line of that file; `went_on` takes back what the rank wrote before."""
    return {"start": start_id, "went_on": went_on, **vars(sighting)}


def event(hang: Hang) -> dict[str, Any]:
    """For the history."""
    return {
        "time": timestamp.now(),
        "event": "hang",
        "step": hang.step,
        "collective": hang.collective,
        "num_waiting": hang.num_waiting,
        "num_missing": len(hang.missing),
        "ranks": [one.rank for one in hang.missing[:_MAX_NAMED]],
        "hosts": [one.host for one in hang.missing[:_MAX_NAMED]],
        "what": hang.sentence,
    }


def stop(cause: str, *, step: int) -> dict[str, Any]:
    """For the history: the end of a rank that was alone, after so many steps."""
    return {"time": timestamp.now(), "event": "stop", "step": step, "cause": cause, "exit_code": errors.REQUEUE, "world_size": 1}


def read_sightings(run_dir: RunDir, nodes: Sequence[int], *, start_id: str) -> dict[int, Sighting]:
    """The last word of every rank of this start that got nowhere and has not gone on since; what a rank says itself counts more."""
    found: dict[int, Sighting] = {}
    for node in nodes:
        for line in json_lines.read(sightings_file(run_dir, node)):
            if line.pop("start", None) != start_id:
                continue
            went_on, rank = line.pop("went_on"), int(line["rank"])
            if went_on:
                found.pop(rank, None)
            elif int(line["position"]) >= 0 or rank not in found:
                found[rank] = Sighting(**line)
    return found
