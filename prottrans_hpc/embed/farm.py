"""An extraction on many nodes: cut the input into pieces, embed each on a node of its own, put the file together.

The nodes write the same parts as a single process does, each for its own windows, and the file is assembled from all
of them by the same code: its bytes do not depend on how many nodes there were.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .. import durable, terminal
from ..errors import DataError, IdentityError
from ..stage import Farm, Item, Request
from . import h5file, model, side_by_side
from .compute import Totals, compute_parts
from .extract import Extractor
from .options import Options
from .parts import Part, PartsFolder, check_identity, list_parts, open_folder
from .piece import Piece, as_json, from_json, read_piece, write_pieces
from .proteins import Census, Reader, read_windows, take_census
from .records import open_input
from .stage import describe_content, describe_identity, finished_before, nothing_embedded, plan_batching, report
from .stopping import StopRequest, listening

_ROUND = "embed"
_NUM_EXAMPLES = 10


def embed_on(farm: Farm, options: Options) -> dict[str, Any]:
    """Embed on the nodes of a farm; the summary. A signal ends it by an exception, which cancels the nodes' work."""
    sources = side_by_side.find_sources(options.source, options.also)
    read = open_input(options, side_by_side.read_max_residues(sources))
    census = take_census(read, farm.folder)
    if not census.num_proteins:
        raise DataError(f"there is no protein in {', '.join(map(str, options.fasta))}")
    if options.out.exists():
        device = h5file.read_attributes(options.out)["identity"]["options"]["device"] if options.device == "auto" else options.device
        summary = finished_before(options, describe_identity(options, sources, device, census))
        durable.remove_folder(farm.folder)  # a kill may have come between naming the file and this
        return summary
    pieces = _cut(farm, options, sources, read, census)
    items = [_item(options, sources, piece) for piece in pieces]
    farm.run(_ROUND, items)
    results = [durable.read_json(item.output) for item in items]
    _assemble(options, sources, read, census, pieces, items, results, farm)
    durable.remove_folder(farm.folder)
    return report(options, _sum(results), h5file.read_attributes(options.out))


def _cut(farm: Farm, options: Options, sources: tuple[model.Source, ...], read: Reader, census: Census) -> list[Piece]:
    """The pieces, made or found. Raises IdentityError when those that are there belong to another request."""
    identity = describe_identity(options, sources, options.device, census)
    folder, listed = farm.folder / "pieces", farm.folder / "pieces.json"
    if listed.exists():
        found = durable.read_json(listed)
        check_identity(found["identity"], identity, what=str(farm.folder), remedy=f"remove the folder {farm.folder} to start over")
        return [from_json(values, folder) for values in found["pieces"]]
    folder.mkdir(exist_ok=True, mode=0o700)
    for leftover in folder.iterdir():
        leftover.unlink()
    pieces = write_pieces(read_windows(read, census), census, folder, farm.num_items)
    durable.write_json(listed, {"identity": identity, "pieces": [as_json(piece) for piece in pieces]})
    terminal.note(f"{census.num_proteins:,} proteins, cut into {len(pieces)} pieces")
    return pieces


def _item(options: Options, sources: tuple[model.Source, ...], piece: Piece) -> Item:
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    first, *others = [str(source.path.resolve()) for source in sources]
    values |= {"source": first, "also": others[0] if others else None, "fasta": [str(piece.path)], "out": str(piece.path.with_suffix(".h5")), "json": False}
    output = piece.path.with_suffix(".json")
    manifests = [source.manifest_sha256 for source in sources]
    request = {"options": values, "piece_sha256": piece.sha256, "manifests_sha256": manifests, "output": str(output)}
    return Item("embed-item", request, output)


def run_item(request: Request) -> None:
    """Embed one piece into parts of its own, and say what came of it."""
    values = request["options"]
    paths = {"source": Path(values["source"]), "fasta": tuple(map(Path, values["fasta"])), "out": Path(values["out"])}
    options = Options(**(values | paths | {"also": Path(values["also"]) if values["also"] else None}))
    (piece,) = options.fasta
    if durable.sha256_of(piece) != request["piece_sha256"]:
        raise DataError(f"{piece} is damaged: its SHA-256 is not the one that was written. Remove {piece.parent.parent} to start over")
    with listening() as stop:
        totals, description = _embed_piece(options, piece, request, stop)
    durable.write_json(Path(request["output"]), {"totals": dataclasses.asdict(totals), **description})


def _embed_piece(options: Options, piece: Path, request: Request, stop: StopRequest) -> tuple[Totals, dict[str, Any]]:
    device = model.choose_device(options.device)
    sources = side_by_side.find_sources(options.source, options.also)
    for source, manifest_sha256 in zip(sources, request["manifests_sha256"], strict=True):
        if source.manifest_sha256 != manifest_sha256:
            raise IdentityError(f"the checkpoint {source.path} is not the one that the first command found there")
    loaded = side_by_side.load(sources, device=device, precision=options.precision)
    census = take_census(lambda: read_piece(piece), piece.parent)
    extractor = Extractor(loaded, options.precision, options.per_residue, options.mean)
    with open_folder(options.parts, describe_identity(options, sources, device.type, census)) as folder:
        windows = read_windows(lambda: read_piece(piece), census)
        totals = compute_parts(windows, extractor, folder, batching=plan_batching(options, loaded, census), stop=stop)
    return totals, {"device": device.type, "width": loaded.width, "model": side_by_side.describe(sources, loaded)}


def _assemble(
    options: Options,
    sources: tuple[model.Source, ...],
    read: Reader,
    census: Census,
    pieces: Sequence[Piece],
    items: Sequence[Item],
    results: Sequence[dict[str, Any]],
    farm: Farm,
) -> None:
    first = results[0]
    for item, result in zip(items, results, strict=True):
        if (result["device"], result["model"]) != (first["device"], first["model"]):
            raise IdentityError(f"{item.output} was computed on another kind of device or by another version than the rest: remove {farm.folder} to start over")
    totals = _sum(results)
    if not totals.num_embedded:
        durable.remove_folder(farm.folder)
        raise nothing_embedded(totals)
    identity = describe_identity(options, sources, first["device"], census)
    attributes = describe_content(options, census, totals, identity) | first["model"]
    parts: dict[int, list[Part]] = {}
    for piece in pieces:
        for window, found in list_parts(piece.path.with_suffix(".h5.parts")).items():
            parts[piece.first_window + window] = [replace(part, window=piece.first_window + window) for part in found]
    folder = PartsFolder(farm.folder, parts)
    try:
        h5file.assemble(read_windows(read, census), folder, totals, options, width=first["width"], attributes=attributes, stop=StopRequest())
    except DataError:
        # A damaged part: the items look at theirs again, and compute what is missing.
        for item in items:
            item.output.unlink(missing_ok=True)
        raise


def _sum(results: Sequence[dict[str, Any]]) -> Totals:
    """What became of all proteins."""
    totals = Totals()
    for result in results:
        one = Totals(**result["totals"])
        totals.num_embedded += one.num_embedded
        totals.num_residues += one.num_residues
        totals.num_failed += one.num_failed
        totals.num_resumed += one.num_resumed
        totals.examples += one.examples
    del totals.examples[_NUM_EXAMPLES:]
    return totals
