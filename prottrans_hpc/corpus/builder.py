"""Make a corpus from sequence files: read, find duplicates, plan, write shards, and at the very end the index.

The bytes of the result depend on the input and the rules alone, never on how many workers did it. A folder is a
corpus only when `index.json` is in it, which is written last; until then the same command goes on where it was
stopped, taking over the shards that are complete after verifying them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import __version__, durable, terminal
from ..errors import ConfigError, DataError, IdentityError
from . import statistics
from .assembly import num_shards, plan_shards, write_shard
from .checking import problems_of
from .duplicates import drop_all, find_all, place_of
from .fasta import lines_of_name
from .identity import BuildOptions, differences, identity_of, made_from
from .index import FORMAT, INDEX, SPLITS, Index, ShardEntry, entry_as_json, read_index, render_index
from .pieces import Piece, Totals
from .pool import Pool
from .scan import ScanTask, ranges, scan
from .sources import Source, find_sources
from .splitting import Holdout, build_clusters
from .statistics import Tally
from .workplace import open_workplace, pieces_folder, remove_strays, require_space


@dataclass(frozen=True)
class Scanned:
    """All input, read."""

    pieces: list[Piece]
    """In the order of the input."""
    tally: Tally
    sha256: list[str]
    """Of each source."""


def build(options: BuildOptions, pool: Pool) -> Index:
    """Make the corpus, or verify it when it is complete already.

    Raises DataError for bad input, IdentityError when another corpus is in the folder, OSError for a full disk.
    """
    sources = find_sources(options.inputs)
    with open_workplace(options.out) as work:
        holdout, clusters = _holdout(options, work)
        if (options.out / INDEX).exists() and _take_over(options, sources, clusters, pool, work):
            return read_index(options.out)
        require_space(options.out, sources)
        scanned = _scan_all(options, sources, holdout, pool, pieces_folder(work))
        scanned, duplicates = _without_duplicates(options, sources, scanned, pool, pieces_folder(work))
        origin = made_from(options, sources, scanned.sha256, clusters)
        splits = _write_shards(options, scanned.pieces, identity_of(origin), pool, work)
        content = _describe(options, origin, splits, scanned.tally, duplicates)
        remove_strays(options.out, [shard.file for shards in splits.values() for shard in shards])
        durable.write_bytes(options.out / INDEX, render_index(content))
    return read_index(options.out)


def _holdout(options: BuildOptions, work: Path) -> tuple[Holdout, dict[str, Any] | None]:
    if options.clusters is not None and options.validation <= 0:
        raise ConfigError("a cluster file says what to hold out together, but nothing is to be held out: give --validation a share above 0")
    if options.clusters is None:
        return Holdout(options.validation, None), None
    table = pieces_folder(work) / "clusters"
    source, sha256 = build_clusters(options.clusters, table, options.validation)
    return Holdout(options.validation, str(table)), {"path": source.path.name, "bytes": source.num_bytes, "sha256": sha256}


def _scan_all(options: BuildOptions, sources: Sequence[Source], holdout: Holdout, pool: Pool, folder: Path) -> Scanned:
    tasks = _scan_tasks(options, sources, holdout, pool.num_workers, folder)
    with terminal.progress("reading", total=sum(task.cost for task in tasks), unit="bytes") as advance:
        results = pool.run(scan, tasks, costs=[task.cost for task in tasks], advance=advance)
    # The SHA-256 of each file comes from the one task that read all of it.
    sha256 = {task.source_number: result.sha256 for task, result in zip(tasks, results, strict=True) if result.sha256 is not None}
    for source in sources:
        source.check_unchanged()
    pieces = [piece for result in results for piece in result.pieces]
    return Scanned(pieces, statistics.summed(result.tally for result in results), [sha256[k] for k in range(len(sources))])


def _scan_tasks(options: BuildOptions, sources: Sequence[Source], holdout: Holdout, num_workers: int, folder: Path, parse: bool = True) -> list[ScanTask]:
    total = sum(source.num_bytes for source in sources)
    parts = [(k, *part) for k, source in enumerate(sources) for part in (ranges(source, num_workers, total) if parse else [(0, None, False)])]
    return [
        ScanTask(i, sources[k], k, start, end, parsed, folder, options.rules, holdout, options.dedup, options.names)
        for i, (k, start, end, parsed) in enumerate(parts)
    ]


def _without_duplicates(options: BuildOptions, sources: Sequence[Source], scanned: Scanned, pool: Pool, folder: Path) -> tuple[Scanned, dict[str, int]]:
    """Leave out equal sequences if wanted, and judge equal names; also how many there were of each."""
    dropped: list[str] = []
    counts = {}
    if options.dedup:
        files, found = find_all("sequence", scanned.pieces, pool, folder)
        counts["sequences_dropped"] = found.num
        dropped += files if found.num else []
    if options.names:
        files, found = find_all("name", scanned.pieces, pool, folder, dropped=dropped)
        if found.first is not None and options.rules.invalid == "error":
            raise DataError(f"{_twice(found.num, found.first, sources, scanned.pieces)} ({_advice(options)})")
        skip = options.rules.invalid == "skip"
        counts["names_dropped" if skip else "names_kept"] = found.num
        dropped += files if found.num and skip else []
    if not dropped:
        return scanned, counts
    pieces, less = drop_all(scanned.pieces, pool, dropped)
    scanned.tally.add(less)
    return replace(scanned, pieces=pieces), counts


def _twice(num: int, pair: tuple[int, int], sources: Sequence[Source], pieces: Sequence[Piece]) -> str:
    places: list[str] = []
    for number in reversed(pair):
        piece, row = place_of(number)
        entry = pieces[piece].rows()[row]
        name = pieces[piece].names()[int(entry["name_start"]) :][: int(entry["name_length"])].tobytes()
        source = sources[pieces[piece].source]
        lines = lines_of_name(source, name)
        # In one file the first two lines are meant, else the first of each.
        at = 1 if places and pieces[place_of(pair[1])[0]].source == pieces[piece].source else 0
        places.append(f"{source.path}, line {lines[at] if at < len(lines) else '?'}")
    others = f", and {num - 1} more like it" if num > 1 else ""
    return f"{places[1]}, record {terminal.printable(name, 60)!r}: the name occurred before ({places[0]}){others}"


def _advice(options: BuildOptions) -> str:
    """What to do about equal names. With --dedup those that are left belong to sequences that differ."""
    ways = ["--invalid skip leaves out all later records of a name", "--invalid x keeps them", "--no-names does without names"]
    return ", ".join(ways if options.dedup else [*ways, "--dedup helps only where the sequences are equal, too"])


def _write_shards(options: BuildOptions, pieces: Sequence[Piece], identity: str, pool: Pool, work: Path) -> dict[str, list[ShardEntry]]:
    totals = [sum((piece.totals[k] for piece in pieces), Totals()) for k in range(len(SPLITS))]
    train, validation = totals
    if not train.sequences:
        raise DataError("no sequence is left for training: the input is empty, or all of it was left out or held out")
    num_train = num_shards(train.residues, options.num_shards)
    share = min(validation.sequences, max(1, round(num_train * validation.residues / train.residues)))
    counts = [num_train, share if options.num_shards else min(validation.sequences, num_shards(validation.residues, None))]
    plans = [
        plan
        for k, (name, num) in enumerate(zip(SPLITS, counts, strict=True))
        if num
        for plan in plan_shards(pieces, k, name, num, out=options.out, work=work, names=options.names, identity=identity)
    ]
    with terminal.progress("writing shards", total=sum(plan.totals.residues for plan in plans), unit="residues") as advance:
        entries = pool.run(write_shard, plans, costs=[plan.totals.residues for plan in plans], advance=advance)
    return {name: [entry for plan, entry in zip(plans, entries, strict=True) if plan.split == k] for k, name in enumerate(SPLITS)}


def _describe(
    options: BuildOptions, origin: Mapping[str, Any], splits: Mapping[str, Sequence[ShardEntry]], tally: Tally, duplicates: Mapping[str, int]
) -> dict[str, Any]:
    """index.json."""
    listed = {name: {**_sums(shards), "shards": [entry_as_json(shard) for shard in shards]} for name, shards in splits.items()}
    totals = _sums([shard for shards in splits.values() for shard in shards])
    split = {**origin["split"], "not_in_clusters": tally.problems["not_in_clusters"]}
    if split["not_in_clusters"]:
        terminal.warn(f"{split['not_in_clusters']} sequences are not in {options.clusters}; each was treated as a cluster of its own")
    described = statistics.describe(tally, options.rules) | {"duplicates": dict(duplicates)}
    return {"format": FORMAT, "tool_version": __version__, **totals, **origin, "split": split, **described, "splits": listed}


def _sums(shards: Sequence[ShardEntry]) -> dict[str, int]:
    return {
        "sequences": sum(shard.num_sequences for shard in shards),
        "residues": sum(shard.num_residues for shard in shards),
        "bytes": sum(shard.num_bytes for shard in shards),
    }


def _take_over(options: BuildOptions, sources: Sequence[Source], clusters: Mapping[str, Any] | None, pool: Pool, work: Path) -> bool:
    """Whether the corpus that is there is the one asked for, and whole. A damaged one is prepared for repair.

    Raises IdentityError when it is another one.
    """
    index = read_index(options.out)
    tasks = _scan_tasks(options, sources, Holdout(0.0, None), 1, work, parse=False)
    with terminal.progress("comparing the input with the corpus", total=sum(task.cost for task in tasks), unit="bytes") as advance:
        results = pool.run(scan, tasks, costs=[task.cost for task in tasks], advance=advance)
    wanted = made_from(options, sources, [str(result.sha256) for result in results], clusters)
    if different := differences(index.content, wanted):
        raise IdentityError(f"{options.out} holds another corpus than the one asked for ({different}). Choose another --out, or remove that folder")
    problems = problems_of(index, pool)
    if not problems:
        terminal.note(f"{options.out} is complete and verified: nothing to do")
        return True
    for problem in problems:
        terminal.warn(f"{problem}; it is made again")
    identity = identity_of(wanted, index.content["tool_version"])
    for entry in [shard for split in index.splits.values() for shard in split.shards]:
        durable.write_json(work / f"{entry.file}.json", {"identity": identity, "entry": asdict(entry)})
    (options.out / INDEX).unlink()
    return False
