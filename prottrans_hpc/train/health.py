"""What the loop asks of the watch over nodes and ranks: who is where, who is slow, and who hangs."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from ..rank import RankContext
from .session import Session
from .stragglers import Place, Stragglers, Verdict
from .watchdog import Watchdog, limits

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def watched(session: Session, context: RankContext, *, start_id: str) -> Iterator[None]:
    """In here slow nodes and ranks that hang are named. Entering is collective."""
    told = session.comm.all_gather_object([context.hostname, context.node_rank, os.getpid()])
    places = [Place(str(host), int(node), int(pid)) for host, node, pid in told]
    recipe = session.run.recipe
    session.stragglers = Stragglers(recipe.health, places, context.rank)
    when = limits(recipe.parallel.timeout_s, recipe.health.hang_fraction)
    with Watchdog(session.run_dir, places, context.rank, start_id=start_id, limits=when):
        yield


def tell_slow_nodes(session: Session, *, step: int) -> None:
    """Name the nodes that the last windows showed to be slow, or as fast as the others again, in the log and the history."""
    stragglers = session.stragglers
    if not stragglers.findings:
        return
    findings, stragglers.findings = stragglers.findings, []
    if session.records is None:
        return
    for verdict in findings:
        _log.warning("%s", _sentence(verdict, stragglers))
        session.records.event(
            "slow node" if verdict.is_slow else "node recovered",
            step=step,
            host=verdict.host,
            node=verdict.node,
            ranks=list(verdict.ranks),
            factor=round(verdict.factor, 2),
        )


def _sentence(verdict: Verdict, stragglers: Stragglers) -> str:
    settings = stragglers.settings
    who = f"node {verdict.node} ({verdict.host})"
    over = f"over {settings.slow_patience} windows of {settings.slow_window_steps} steps"
    if not verdict.is_slow:
        return f"{who} is no longer slow: {verdict.factor:.2f} times the median rank's time, {over}"
    ranks = f"rank {', '.join(map(str, verdict.ranks[:8]))}{f' and {len(verdict.ranks) - 8} more' if len(verdict.ranks) > 8 else ''}"
    elsewhere = len({place.host for place in stragglers.places}) > 1
    remedy = f"; a batch system leaves it out with: prottrans runs resume RUN --exclude {verdict.host}" if elsewhere else ""
    return f"{who} is slow: {ranks} computes {verdict.factor:.2f} times as long as the median rank, {over}. All ranks wait for it{remedy}"
