"""What a preflight found, on the disk and in words: preflight.json, the run's history, the job's log, `prottrans runs show`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from .. import durable, errors, json_lines, timestamp
from ..errors import DataError
from ..machine import Allocation
from ..run_dir import Preflight, RunDir, read_run
from .progress import read_progress
from .run_files import read_records

BY = "preflight"
"""Marks the events of slow nodes that a preflight has found, for the trainer finds some as well."""


FAILED = "preflight failed"
"""So begins the cause of a job that ended because nothing was measured."""


class Verdict(StrEnum):
    """What became of a preflight."""

    PASSED = "passed"
    SLOW = "slow"
    """A node is slow: the job ended before it trained."""
    FAILED = "failed"
    """Nothing was measured: the job ended before it trained."""
    STOPPED = "stopped"
    """The job was asked to stop meanwhile."""


@dataclass(frozen=True)
class Finding:
    """How a preflight ended."""

    verdict: Verdict
    code: int
    """0: the training may start; else what the job ends with."""
    reason: str


def write(run_dir: RunDir, finding: Finding, measured: Mapping[str, Any], *, elapsed_s: float) -> None:
    """Keep the figures with the verdict, and add to the history: the preflight, nodes that are slow or no longer so, and the end of the job."""
    step = read_progress(run_dir).step
    told = {"verdict": str(finding.verdict), "reason": finding.reason, "exit_code": finding.code, "time": timestamp.now(), "elapsed_s": round(elapsed_s, 1)}
    durable.write_json(run_dir.preflight_json, {**told, **measured})
    events: list[dict[str, Any]] = [{"event": "preflight", "step": step, **told, "figures": figures(measured)}]
    slow = measured.get("slow_nodes") or []
    keys = ("node", "host", "what", "seconds", "median_s", "says")
    events += [{"event": "slow node", "by": BY, "step": step, "factor": round(one["factor"], 2), **{key: one[key] for key in keys}} for one in slow]
    if finding.verdict is Verdict.PASSED:
        hosts, before = list(measured.get("hosts") or []), _found_before(run_dir)
        again = [(number, host) for number, host in enumerate(hosts) if host in before and hosts.index(host) == number]
        events += [{"event": "node recovered", "by": BY, "step": step, "node": number, "host": host} for number, host in again]
    if finding.code != errors.DONE:
        events.append({"event": "stop", "step": step, "cause": cause(finding), "exit_code": finding.code})
    # No rank of the training is there, so that nobody else writes into the history now.
    json_lines.append_durably(run_dir.history, *({"time": timestamp.now(), **event} for event in events))


def _found_before(run_dir: RunDir) -> set[str]:
    """The hosts whose last word in the history is that a preflight found them slow."""
    last = {str(event.get("host")): event for event in read_records(run_dir.history) if event.get("event") in ("slow node", "node recovered")}
    return {host for host, event in last.items() if event["event"] == "slow node" and event.get("by") == BY}


def cause(finding: Finding) -> str:
    """Why the job ended, as the history says it."""
    return f"{FAILED if finding.verdict is Verdict.FAILED else 'preflight'}: {finding.reason}"


def figures(measured: Mapping[str, Any]) -> str:
    """ "gloo between 4 ranks on 4 nodes: 210 us, 1.2 GB/s (all-reduce)"; "" where there are none."""
    world = [fit for fit in measured.get("fits") or [] if (fit.get("collective"), fit.get("scope")) == ("all_reduce", "world")]
    if not world:
        return ""
    rate = f", {world[0]['bytes_per_s'] / 1e9:.3g} GB/s" if world[0]["bytes_per_s"] else ""
    nodes = measured["nodes"]
    where = f"{measured['backend']} between {measured['ranks']} ranks on {nodes} {'node' if nodes == 1 else 'nodes'}"
    return f"{where}: {world[0]['latency_s'] * 1e6:,.0f} us{rate} (all-reduce)"


def line(run_dir: RunDir, finding: Finding, *, scheduler: str, kept_away: Sequence[str] = ()) -> str:
    """For the job's log: what was found, what becomes of the job, and what to do. `kept_away`: waiting jobs that will leave out what is slow."""
    kept = read(run_dir) or {}
    if finding.verdict is Verdict.PASSED:
        return f"preflight passed in {kept.get('elapsed_s')} s: {'; '.join(filter(None, (figures(kept), finding.reason)))}"
    if finding.verdict is Verdict.STOPPED:
        return cause(finding)
    shut = f"error: {cause(finding)}. The gate stays closed: no rank of the training was started (exit code {finding.code})"
    if finding.verdict is Verdict.FAILED or scheduler == "local":
        return shut
    hosts = sorted({str(one["host"]).partition(".")[0] for one in kept["slow_nodes"]})
    if not read_run(run_dir).machine.exclude_slow_nodes:
        return f"{shut}; a batch system leaves it out with: prottrans runs resume {run_dir.path} --exclude {','.join(hosts)}"
    waiting = f", and so {'does job' if len(kept_away) == 1 else 'do jobs'} {', '.join(kept_away)} of this chain" if kept_away else ""
    return f"{shut}; the next start leaves out {', '.join(hosts)}{waiting}"


def read(run_dir: RunDir) -> dict[str, Any] | None:
    """What the latest start found; None where there was no preflight, or it is under way."""
    try:
        found = durable.read_json(run_dir.preflight_json)
    except (OSError, DataError):
        return None
    return found if isinstance(found, dict) and "verdict" in found else None


def summary(kept: Mapping[str, Any] | None) -> str:
    """A line of `prottrans runs show`; "" where there is nothing to tell."""
    if kept is None:
        return ""
    told = "; ".join(filter(None, (figures(kept), str(kept.get("reason", "")))))
    told = told.removeprefix(f"{kept['verdict']}: ")
    return f"{kept['verdict']}, {str(kept.get('time', ''))[:19].replace('T', ' ')} UTC: {told}"


def closed(run_dir: RunDir, code: int | None) -> str:
    """Why the preflight of the latest start ended the job with this code; "" when it did not."""
    kept = read(run_dir)
    if kept is None or code in (None, errors.DONE) or kept.get("exit_code") != code or kept["verdict"] not in (Verdict.SLOW, Verdict.FAILED):
        return ""
    return cause(Finding(Verdict(kept["verdict"]), int(kept["exit_code"]), str(kept.get("reason", ""))))


def remarks(preflight: Preflight | None, allocation: Allocation) -> list[str]:
    """What to say of it before the start, one line each."""
    if preflight is None:
        return []
    if allocation.num_ranks == 1:
        return ["one rank has nobody to talk to: the preflight has nothing to measure"]
    return [f"a preflight measures the job's nodes before the training starts, for at most {preflight.limit_s} s; the gate is {preflight.gate:g}"]
