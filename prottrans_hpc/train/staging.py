"""Staging as all ranks see it: one reader a node copies, everybody waits, and what fails on one node ends them all.

Nobody waits in a collective that a slow copy could time out: the ranks come together once a second or oftener, so a
request to stop is heard, a dead rank is noticed, and the first failure anywhere is told everywhere, with the node's name.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch

from .. import errors
from ..comm import Comm
from ..corpus.index import INDEX, Index
from ..corpus.node_disk import staged_folder
from ..corpus.staging import Staging
from ..errors import ConfigError, NodeError, RequeueRequested
from ..machine import Machine
from ..rank import RankContext
from . import preemption

_PAUSE_S = (0.01, 1.0)
"""First and longest pause between two meetings of the ranks."""
_TELL_EVERY_S = 10.0
_MOST_NAMED = 3
_log = logging.getLogger(__name__)


@dataclass
class _Share:
    """What one rank has to do with staging."""

    folder: Path | None = None
    copy: Staging | None = None
    """On one rank a node."""
    failure: BaseException | None = None

    def has_ended(self, timeout_s: float) -> bool:
        """Wait a moment; takes over the failure of the copy."""
        if self.copy is None:
            time.sleep(timeout_s)
            return True
        ended = self.copy.wait(timeout_s)
        self.failure = self.failure or self.copy.error
        return ended

    def watch(self, timeout_s: float) -> None:
        """A copy that does not move any more has failed, too: a file system that hangs must not hang the job."""
        silent_s = time.monotonic() - self.copy.last_sign if self.copy else 0.0
        if self.copy and silent_s > timeout_s and not self.failure:
            text = f"nothing was read or written for {silent_s:.0f} s"
            self.failure = OSError(errno.EIO, text, str(self.copy.index.path))

    def look(self) -> None:
        """Every rank must see the copy that its node's reader made."""
        if self.folder is not None and not (self.folder / INDEX).is_file():
            self.failure = self.failure or ConfigError(
                f"{self.folder} is not there, although the first rank of this node has staged the corpus: "
                "the variables in node.local_disk_path must be the same for all ranks of a node"
            )


@contextlib.contextmanager
def staged(index: Index, machine: Machine, comm: Comm, context: RankContext, *, timeout_s: float) -> Iterator[Index]:
    """The corpus as this node has it: where the machine stages, on its own disk, and the index as it is elsewhere. Collective.

    Raises NodeError on every rank when one node cannot stage, or is silent for `timeout_s`; RequeueRequested on a signal.
    """
    if machine.staging == "none":
        yield index
        return
    share = _begin(index, machine, context)
    try:
        _wait_for_all(share, index, comm, context, timeout_s=timeout_s)
        assert share.folder is not None  # else it would have failed
        yield replace(index, path=share.folder)
    finally:
        if share.copy is not None:
            share.copy.close(remove=machine.staging_cleanup == "remove")


def _begin(index: Index, machine: Machine, context: RankContext) -> _Share:
    share = _Share()
    try:
        share.folder = staged_folder(index, machine.node.local_disk_path or "", os.environ)
    except ConfigError as error:
        share.failure = error
        return share
    if context.is_node_main:
        share.copy = Staging(index, share.folder, rehash=machine.staging_check == "sha256", begin_at=context.node_rank / context.num_nodes)
    return share


def _wait_for_all(share: _Share, index: Index, comm: Comm, context: RankContext, *, timeout_s: float) -> None:
    began = told = time.monotonic()
    pause, longest = _PAUSE_S
    waiting = 1.0
    while waiting:
        ended = share.has_ended(pause)
        share.watch(timeout_s)
        ready = share.copy.num_bytes_ready if share.copy else 0
        counts = [not ended, share.failure is not None, preemption.requested(), share.copy is not None, ready]
        waiting, failed, stops, num_nodes, num_bytes = comm.all_reduce_sum(torch.tensor(counts, dtype=torch.float64)).tolist()
        if failed:
            _fail_together(share, comm, context)
        if stops:
            raise RequeueRequested(f"stopped by a signal ({preemption.cause()}) while the corpus was staged. Run the same command again to go on")
        pause = min(2 * pause, longest)
        if context.is_main and time.monotonic() - told > _TELL_EVERY_S:
            told = time.monotonic()
            _log.info("staging the corpus: %.2f of %.2f GB on %d nodes, %.0f s", num_bytes / 1e9, index.num_bytes * num_nodes / 1e9, num_nodes, told - began)
    share.look()
    if comm.all_reduce_sum(torch.tensor([float(share.failure is not None)], dtype=torch.float64)).item():
        _fail_together(share, comm, context)
    if context.is_main:
        _log.info("the corpus is staged: %.3f GB on each of %d nodes, %.1f s", index.num_bytes / 1e9, num_nodes, time.monotonic() - began)


def _fail_together(share: _Share, comm: Comm, context: RankContext) -> NoReturn:
    """Every rank raises the same error, which names the nodes."""
    own = share.failure
    told = comm.all_gather_object([f"node {context.node_rank} ({context.hostname})", errors.exit_code(own), errors.explain(own)] if own else None)
    failures = {node: (int(code), text) for node, code, text in (entry for entry in told if entry)}
    lines = [f"{node}: {text}" for node, (_, text) in list(failures.items())[:_MOST_NAMED]]
    more = f"; and on {len(failures) - _MOST_NAMED} more nodes" if len(failures) > _MOST_NAMED else ""
    raise NodeError(f"the corpus could not be staged on {'; on '.join(lines)}{more}", code=next(iter(failures.values()))[0])
