"""The stages of the corpus: preprocess, corpus show, corpus check."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import durable, errors, rank, terminal
from ..errors import CheckpointError, ConfigError, DataError, ProttransError
from ..stage import Farm, Request
from . import kernel
from .alphabet import Rules
from .builder import build
from .checking import problems_of
from .identity import BuildOptions
from .index import Index, read_index
from .pool import Pool, open_pool
from .report import draw, print_table, summary
from .workplace import OccupiedError, stop_file


def preprocess(request: Request) -> None:
    """Make a corpus and print what it holds. Under MPI only rank 0 prints, and the others end with its exit code."""
    options = BuildOptions(
        inputs=tuple(request["inputs"]),
        out=Path(request["out"]),
        rules=Rules(request["invalid"], request["keep_rare"]),
        num_shards=request["shards"],
        dedup=request["dedup"],
        validation=request["validation"],
        clusters=Path(request["clusters"]) if request["clusters"] else None,
        names=request["names"],
        release=request["release"],
    )
    farm: Farm | None = request.get("farm")
    with _open_pool(request, farm, stop_file(options.out)) as pool:
        _announce(pool.num_workers)
        try:
            index = build(options, pool)
        except OccupiedError as error:
            raise OccupiedError(f"{error}{'' if request['mpi'] else _hint(os.environ)}") from error
    if farm is not None:
        durable.remove_folder(farm.folder)
    if request["json"] or terminal.verbosity() > terminal.QUIET:
        _print([index], request["json"])


def _open_pool(request: Request, farm: Farm | None, stop: Path) -> contextlib.AbstractContextManager[Pool]:
    if farm is None:
        return open_pool(workers=request["workers"], mpi=request["mpi"], stop_file=stop)
    from .task_folder import TaskFolder

    return contextlib.nullcontext(TaskFolder(farm))


def _hint(environment: Mapping[str, str]) -> str:
    """Ranks that do not know of each other are each other's other process."""
    with contextlib.suppress(ConfigError):
        context = rank.detect(environment)
        if context.world_size > 1:
            return f"; this is one of {context.world_size} ranks that {context.starter} started: did you forget --mpi, with which they share the work?"
    return ""


def _announce(num_workers: int) -> None:
    if kernel.implementation() == "Python":
        terminal.note("the C extension prottrans_hpc.corpus._kernel is not built here: using the Python loops, which are slower and give the same bytes")
    terminal.detail(f"loops: {kernel.implementation()}, workers: {num_workers}")


def show(request: Request) -> None:
    """Print what corpora hold, side by side, and draw it if a picture is wanted."""
    indexes = [read_index(path) for path in request["corpora"]]
    _print(indexes, request["json"])
    if request["plot"]:
        draw(indexes, Path(request["plot"]))


def _print(indexes: list[Index], as_json: bool) -> None:
    if as_json:
        summaries = [summary(index) for index in indexes]
        print(json.dumps(summaries[0] if len(summaries) == 1 else summaries, indent=1))
    else:
        print_table(indexes)


class CheckError(ProttransError):
    """Several corpora are not whole, or cannot be read; ends with the code of the worst."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


@dataclass(frozen=True)
class _Verdict:
    """What became of one corpus that was to be checked."""

    path: Path
    index: Index | None
    """None: it could not be read."""
    failure: ProttransError | OSError | None
    """Its text names every fault, a line each; None: every byte is as written."""

    def as_json(self) -> dict[str, Any]:
        """For a program."""
        problems = errors.explain(self.failure).splitlines() if self.failure else []
        return (summary(self.index) if self.index else {"corpus": str(self.path)}) | {"problems": problems, "whole": not problems}


def check(request: Request) -> None:
    """Verify every byte of corpora, each whatever the others are, and tell which are whole.

    Raises DataError that names the damaged files, CheckpointError where there is no corpus, CheckError for more than one of these.
    """
    with open_pool(workers=1, mpi=False, stop_file=Path()) as pool:
        verdicts = [_verdict(Path(path), pool) for path in request["corpora"]]
    if request["json"]:
        found = [verdict.as_json() for verdict in verdicts]
        print(json.dumps(found[0] if len(found) == 1 else found, indent=1))
    else:
        for index in (verdict.index for verdict in verdicts if verdict.index and not verdict.failure):
            print(f"{index.path}: whole, {index.num_sequences:,} sequences, {index.num_residues:,} residues, every SHA-256 as written")
    failures = [verdict.failure for verdict in verdicts if verdict.failure]
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise CheckError("\n".join(map(errors.explain, failures)), min(map(errors.exit_code, failures), key=_how_bad))


def _how_bad(code: int) -> int:
    """Damage first; a folder that is no corpus may be a slip of the keyboard."""
    return {errors.BAD_DATA: 0, errors.NO_INPUT: 2}.get(code, 1)


def _verdict(path: Path, pool: Pool) -> _Verdict:
    index = None
    try:
        index = read_index(path)
        problems = problems_of(index, pool)
    except (DataError, CheckpointError, OSError) as error:
        return _Verdict(path, index, error)
    return _Verdict(path, index, DataError("\n".join(problems)) if problems else None)
