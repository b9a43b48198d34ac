"""The stage `pretrain`: one start of a run, from reading run.json to the exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from .. import durable, errors, log, rank
from ..comm import Comm, open_comm
from ..errors import RequeueRequested, ResourceError
from ..rank import RankContext
from ..run_dir import Run, RunDir, read_run
from ..stage import Request
from . import environment, health, node_timings, preemption, resume, retention
from .loop import train
from .records import Records
from .run_lock import only_start
from .session import Session, open_session, read_corpus_index
from .staging import staged

_log = logging.getLogger(__name__)


def pretrain(request: Request) -> None:
    """Train until the run's last step; resumes by itself. Raises RequeueRequested when a signal stopped it first."""
    run_dir = RunDir(Path(request["run_dir"]).resolve())
    run = read_run(run_dir)
    context = rank.detect(os.environ)
    log.setup(run_dir, context)
    comm = open_comm(run.recipe.parallel, context, run_dir=run_dir.path)
    with only_start(run_dir, context):
        start_id = str(comm.broadcast_object(secrets.token_hex(6)))
        with _history(run_dir, context) as records, _memory_of(context):
            _start(run, run_dir, comm, context, start_id=start_id, records=records)
    comm.close()


@contextlib.contextmanager
def _memory_of(context: RankContext) -> Iterator[None]:
    """Turn an allocation that failed into a ResourceError that says on which rank, and what takes less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not errors.is_out_of_memory(error):
            raise
        raise ResourceError(
            f"rank {context.rank} on {context.hostname} is {errors.explain(error)}. What takes less: --set loading.bin_residues with a smaller number, "
            "--set memory.recompute_every=1, --set memory.lms_limit_gib=..., or more ranks; `prottrans memory` tells what each spares"
        ) from error


def _start(run: Run, run_dir: RunDir, comm: Comm, context: RankContext, *, start_id: str, records: Records | None) -> None:
    described = environment.describe_start(run, comm, context, start_id=start_id)
    if described is not None:
        durable.write_json(run_dir.environment_json, described)
        for name in retention.remove_leftovers(run_dir):
            _log.info("removed %s, which a stopped save had left", name)
    with staged(read_corpus_index(run), run.machine, comm, context, timeout_s=run.recipe.parallel.timeout_s) as index:
        session = open_session(run, run_dir, comm, index=index, start_id=start_id, records=records)
        with node_timings.shared(run_dir, context, comm, start_id=start_id) as session.node_timings:
            _go_on(session, start_id=start_id, context=context)


def _go_on(session: Session, *, start_id: str, context: RankContext) -> None:
    """From the newest checkpoint, or the beginning, to the last step."""
    run, comm = session.run, session.comm
    resumed_from = resume.restore(session)
    if session.records is not None:
        session.records.event(
            "start",
            start_id=start_id,
            step=session.progress.step,
            resumed_from=resumed_from,
            command_line=run.command_line,
            world_size=comm.world_size,
            num_nodes=context.num_nodes,
            versions=environment.versions(),
            **session.records.taken_again,
        )
    if session.progress.step >= run.last_step:
        _log.info("nothing to do: this run finished step %d, and %d was its last", session.progress.step, run.last_step)
        _tell_stop(session, "finished before", errors.DONE)
        return
    _log.info(
        "%s, %d of %d steps done, %d ranks over %s",
        f"resuming from {resumed_from}" if resumed_from else "starting",
        session.progress.step,
        run.last_step,
        comm.world_size,
        comm.name,
    )
    with health.watched(session, context, start_id=start_id):
        _run(session, context)


def _run(session: Session, context: RankContext) -> None:
    try:
        with _memory_of(context):
            train(session)
    except BaseException as error:
        session.saver.abandon()
        cause = preemption.cause() if isinstance(error, RequeueRequested) else f"{type(error).__name__}: {errors.explain(error)}"
        with contextlib.suppress(OSError):  # a full disk must not hide the error
            _tell_stop(session, cause, errors.exit_code(error))
        raise
    _tell_stop(session, "done", errors.DONE)
    _log.info("done: %d steps, the last checkpoint is %s", session.progress.step, session.run_dir.checkpoint(session.progress.step))


def _tell_stop(session: Session, cause: str, code: int) -> None:
    if session.records is not None:
        session.records.event("stop", step=session.progress.step, cause=cause, exit_code=code, world_size=session.comm.world_size)


@contextlib.contextmanager
def _history(run_dir: RunDir, context: RankContext) -> Iterator[Records | None]:
    """Rank 0's records; the other ranks write none."""
    records = Records(run_dir) if context.is_main else None
    try:
        yield records
    finally:
        if records is not None:
            records.close()
