"""The stage `embed`: proteins in, one HDF5 file out, resumable. What happens, in the order it happens."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__, durable, terminal
from ..errors import DataError
from ..stage import Farm, Request
from . import h5file, model, side_by_side
from .compute import Batching, Totals, compute_parts, plan_workers
from .extract import Extractor
from .options import STORED, Options, parse_request
from .parts import check_identity, open_folder, remove_leftovers
from .proteins import Census, read_windows, take_census
from .records import open_input
from .stopping import StopRequest, listening

_CPU_SHARES = 8
"""A CPU's batch is this part of `bin_residues`, whatever the number of cores, so that the numbers do not depend on it."""
FORMAT = 1
"""Of the identity: raised when the same request would give other numbers than before."""


def embed(request: Request) -> None:
    """Embed the proteins of FASTA files. Prints a summary object when `json` is asked for."""
    options = parse_request(request)
    started = time.monotonic()
    if request.get("farm") is not None:
        summary = _embed_on(request["farm"], options)
    else:
        with listening() as stop:
            summary = _embed(options, stop)
    summary["seconds"] = round(time.monotonic() - started, 3)
    if options.json:
        print(json.dumps(summary, indent=1))


def _embed_on(farm: Farm, options: Options) -> dict[str, Any]:
    from .farm import embed_on

    return embed_on(farm, options)


def _embed(options: Options, stop: StopRequest) -> dict[str, Any]:
    device = model.choose_device(options.device)
    sources = side_by_side.find_sources(options.source, options.also)
    loaded = side_by_side.load(sources, device=device, precision=options.precision)
    read = open_input(options, loaded.max_residues)
    census = take_census(read, existing_folder(options.out))
    stop.check("nothing was computed yet")
    if not census.num_proteins:
        raise DataError(f"there is no protein in {', '.join(map(str, options.fasta))}")
    identity = describe_identity(options, sources, loaded.device.type, census)
    if options.out.exists():
        return finished_before(options, identity)
    extractor = Extractor(loaded, options.precision, options.per_residue, options.mean)
    warn_of_space(options, census, loaded.width)
    with open_folder(options.parts, identity) as folder:
        batching = plan_batching(options, loaded, census)
        totals = compute_parts(read_windows(read, census), extractor, folder, batching=batching, stop=stop)
        if not totals.num_embedded:
            durable.remove_folder(options.parts)
            raise nothing_embedded(totals)
        attributes = describe_content(options, census, totals, identity) | side_by_side.describe(sources, loaded)
        h5file.assemble(read_windows(read, census), folder, totals, options, width=loaded.width, attributes=attributes, stop=stop)
        durable.remove_folder(options.parts)
    return report(options, totals, h5file.read_attributes(options.out))


def plan_batching(options: Options, loaded: side_by_side.Models, census: Census) -> Batching:
    """One batch at a time on a GPU; on a CPU small ones side by side, which fit its caches better."""
    if loaded.device.type != "cpu":
        return Batching(census.num_proteins, options.bin_residues, plan_workers(1, 1))
    batch_residues = max(1, options.bin_residues // _CPU_SHARES)
    num_batches = min(census.num_sound, -(-census.num_residues // batch_residues))
    return Batching(census.num_proteins, batch_residues, plan_workers(model.usable_cores(), num_batches))


def describe_identity(options: Options, sources: tuple[model.Source, ...], device: str, census: Census) -> dict[str, Any]:
    """Everything that the numbers in the file depend on."""
    return {
        "format": FORMAT,
        "input": {"proteins": census.num_proteins, "sha256": census.sha256},
        **side_by_side.describe_identity(sources),
        "options": options.as_identity() | {"device": device},
    }


def describe_content(options: Options, census: Census, totals: Totals, identity: dict[str, Any]) -> dict[str, Any]:
    """The attributes of the file that tell what is in it."""
    return {
        "tool": "prottrans-hpc",
        "tool_version": __version__,
        "identity": json.dumps(identity),
        "input_sha256": census.sha256,
        "num_proteins": census.num_proteins,
        "num_embedded": totals.num_embedded,
        "num_failed": totals.num_failed,
        "num_residues": totals.num_residues,
        "precision": options.precision,
        "dtype": STORED[options.precision],
        "pool": "mean" if options.mean else "none",
        "special_tokens": "left out of residues and mean",
        "rules": json.dumps({"invalid": options.invalid, "rare": "B O U Z -> X", "removed": "* - ."}),
    }


def finished_before(options: Options, identity: dict[str, Any]) -> dict[str, Any]:
    """The output is there: right if it is whole and of the same identity. Raises IdentityError or DataError."""
    attributes = h5file.read_attributes(options.out)
    check_identity(attributes["identity"], identity, what=str(options.out), remedy=f"move {options.out} away")
    faults = h5file.problems(options.out)
    if faults:
        raise DataError(f"{'; '.join(faults)}. Delete the file; the same command makes it again")
    # A kill may have come between naming the file and removing its parts.
    if options.parts.exists():
        with open_folder(options.parts, identity):
            durable.remove_folder(options.parts)
    remove_leftovers(options.parts)
    terminal.note(f"{options.out} is complete already: nothing to do")
    return _summary(options, attributes) | {"resumed_batches": 0, "complete_before": True}


def nothing_embedded(totals: Totals) -> DataError:
    """The error of an input that is sound but of no use."""
    return DataError(f"none of the {totals.num_failed:,} proteins could be embedded, so there is no file. {_failures(totals)}")


def report(options: Options, totals: Totals, attributes: dict[str, Any]) -> dict[str, Any]:
    """Tell how it went, and give the summary."""
    if totals.num_resumed:
        terminal.note(f"{totals.num_resumed:,} batches were taken from an earlier run")
    if totals.num_failed:
        terminal.warn(f"{_failures(totals)}\n  (the file lists them all, in failed_names and failed_reasons)")
    width = attributes["width"]
    terminal.note(
        f"{options.out}: {totals.num_embedded:,} of {attributes['num_proteins']:,} proteins embedded, {totals.num_failed:,} failed, {width} numbers each"
    )
    return _summary(options, attributes) | {"resumed_batches": totals.num_resumed, "complete_before": False}


def _failures(totals: Totals) -> str:
    lines = [f"{totals.num_failed:,} protein{'s' if totals.num_failed > 1 else ''} could not be embedded:", *totals.examples]
    if totals.num_failed > len(totals.examples):
        lines.append(f"and {totals.num_failed - len(totals.examples):,} more")
    return "\n  ".join(lines)


def _summary(options: Options, attributes: dict[str, Any]) -> dict[str, Any]:
    wanted = [
        "architecture",
        "size",
        "checkpoint",
        "run_id",
        "step",
        "precision",
        "dtype",
        "width",
        "num_proteins",
        "num_embedded",
        "num_failed",
        "num_residues",
    ]
    wanted += [f"also_{name}" for name in wanted if f"also_{name}" in attributes]
    return {"out": str(options.out), "bytes": options.out.stat().st_size} | {name: attributes[name] for name in wanted}


def warn_of_space(options: Options, census: Census, width: int) -> None:
    """Parts and file are there at the same time, so the space is needed twice."""
    rows = census.num_sound * options.mean + census.num_residues * options.per_residue
    needed = 2 * rows * width * np.dtype(STORED[options.precision]).itemsize
    place = existing_folder(options.out)
    free = shutil.disk_usage(place).free
    if needed > free:
        terminal.warn(f"about {needed / 2**30:.1f} GiB will be written in {place}, but only {free / 2**30:.1f} GiB are free there")


def existing_folder(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    return next(place for place in path.absolute().parents if place.exists())
