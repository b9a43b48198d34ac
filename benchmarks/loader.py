"""Records a second into packed int64 batches of 32k tokens: ours beside what people use, on the same proteins.

Every contender starts from its own files on the same disk (warm page cache), goes through the records in a shuffled
order of its own, and hands out batches of up to 32,768 int64 tokens of whole records, without masks. Rounds are
interleaved, every figure is the median over rounds of records a second of CPU time of the whole process, so that a
busy machine disturbs ratios little. Also: the cost of planning one step for 5,616 ranks. Writes loader.json and loader.md.

    python benchmarks/loader.py --data DATA/pretrain/swissprot201401_sp50.fasta.zst

MosaicML streaming pins old versions of NumPy and much else; it is measured where `import streaming` works, for example
with `pip install --no-deps --target DIR mosaicml-streaming Brotli python-snappy cramjam zstd catalogue` and DIR on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hardware import describe
from loader_contenders import BATCH_TOKENS, OTHERS, Batches, Contender, h5py_contenders

from prottrans_hpc import architecture
from prottrans_hpc.corpus import kernel
from prottrans_hpc.corpus.index import read_index
from prottrans_hpc.corpus.order import ArrayLengths, SampleOrder, SamplePosition, next_step
from prottrans_hpc.corpus.packing import plan_step
from prottrans_hpc.corpus.reader import Corpus
from prottrans_hpc.corpus.samples import whole_sequences
from prottrans_hpc.objectives.layout import lay_out
from prottrans_hpc.objectives.masked import corrupt
from prottrans_hpc.recipe import Masked, Order, Phase
from prottrans_hpc.stage import run_stage

STEP_SEQUENCES = 4096
TARGET = 50.0
"""How many times each contender's records a second ours are to be."""
SUMMIT = (5616, 44_928)
VOCABULARY = architecture.get("prot_bert").vocabulary


@dataclass(frozen=True)
class Row:
    """What a contender reached."""

    name: str
    records_per_cpu_s: float
    megatokens_per_cpu_s: float
    records_per_s: float
    is_ours: bool


def in_order(corpus: Corpus) -> Batches:
    """What the others do: shuffled records, filled into batches as they come. One gather a batch."""
    order, table = SampleOrder(corpus, seed=1, order=Order(), max_residues=BATCH_TOKENS), VOCABULARY.residue_table()
    for samples in order.rest(SamplePosition()):
        ends = np.cumsum(samples.lengths)
        first = done = 0
        while first < len(samples):
            last = int(np.searchsorted(ends, done + BATCH_TOKENS, side="right"))
            tokens = np.empty(int(ends[last - 1]) - done, np.int64)
            corpus.gather(samples.take(slice(first, last)), table, tokens, ends[first:last] - samples.lengths[first:last] - done)
            yield last - first, len(tokens)
            first, done = last, int(ends[last - 1])


def ours(corpus: Corpus, *, masks: bool, specials: bool) -> Batches:
    """Order, global plan, one gather a bin; with special tokens and masks it is all that training gets."""
    order = SampleOrder(corpus, seed=1, order=Order(), max_residues=BATCH_TOKENS)
    phase = Phase(steps=1, max_residues=BATCH_TOKENS, global_batch_size=STEP_SEQUENCES)
    position = SamplePosition()
    table = VOCABULARY.residue_table()
    while True:
        samples, position = next_step(order, position, phase)
        plan = plan_step(samples.lengths, bin_residues=BATCH_TOKENS, num_ranks=1)
        for members in plan.bins_of(0):
            chosen = samples.take(members)
            if specials:
                layout = lay_out(corpus, chosen, VOCABULARY)
                tokens = corrupt(layout, Masked(), 1).tokens if masks else layout.tokens
            else:
                ends = np.cumsum(chosen.lengths)
                tokens = np.empty(int(ends[-1]), np.int64)
                corpus.gather(chosen, table, tokens, ends - chosen.lengths)
            yield len(chosen), len(tokens)


def without_kernel(batches: Callable[[], Batches]) -> Batches:
    """The same with the Python loops in place of the C ones."""
    iterator, built = batches(), kernel._c
    while True:
        kernel._c = None
        try:
            batch = next(iterator)
        finally:
            kernel._c = built
        yield batch


def sequential_cast(corpus: Corpus) -> Batches:
    """The limit: uint8 -> int64 of the flat array, 32k at a time, in file order."""
    residues = corpus._map(0).residues
    mean = corpus.num_residues / corpus.num_sequences
    while True:
        for start in range(0, len(residues) - BATCH_TOKENS, BATCH_TOKENS):
            tokens = residues[start : start + BATCH_TOKENS].astype(np.int64)
            yield round(len(tokens) / mean), len(tokens)


# ---- measuring ----


def measure(contenders: list[Contender], *, rounds: int, seconds: float) -> tuple[list[Row], dict[str, str]]:
    """Rates of all contenders; one that breaks is left out and named with its error."""
    rates: dict[str, list[tuple[float, float, float]]] = {contender.name: [] for contender in contenders}
    running, broken = {}, {}
    for contender in contenders:
        try:
            running[contender.name] = contender.start()
            for _ in range(3):
                next(running[contender.name])
        except Exception as error:
            broken[contender.name] = f"{type(error).__name__}: {error}"
    for number in range(rounds):
        for name, batches in running.items():
            rates[name].append(_round(batches, seconds))
            print(f"round {number}: {name}: {rates[name][-1][0]:,.0f} records a CPU-second", file=sys.stderr)
    ours_of = {contender.name: contender.is_ours for contender in contenders}
    medians = {name: [statistics.median(column) for column in zip(*found, strict=True)] for name, found in rates.items() if found}
    return [Row(name, *values, ours_of[name]) for name, values in medians.items()], broken


def _round(batches: Batches, seconds: float) -> tuple[float, float, float]:
    gc.collect()
    records = tokens = 0
    begin, begin_cpu = time.perf_counter(), time.process_time()
    while time.process_time() - begin_cpu < seconds:
        num_records, num_tokens = next(batches)
        records, tokens = records + num_records, tokens + num_tokens
    cpu, wall = time.process_time() - begin_cpu, time.perf_counter() - begin
    return records / cpu, tokens / cpu / 1e6, records / wall


def measure_planning(lengths: np.ndarray[Any, Any], repeats: int = 15) -> dict[str, Any]:
    """What one rank of 5,616 spends to know its part of a step of 44,928 sequences, CPU milliseconds."""
    num_ranks, global_batch = SUMMIT
    many = np.random.default_rng(0).choice(lengths, 2_000_000)
    found: dict[str, Any] = {"num_ranks": num_ranks, "global_batch_size": global_batch}
    for limit in (512, 1024, 2048):
        order = SampleOrder(ArrayLengths(many), seed=1, order=Order(), max_residues=limit)
        phase = Phase(steps=1, max_residues=limit, global_batch_size=global_batch)
        position, times = SamplePosition(), []
        for _ in range(repeats):
            begin = time.process_time()
            samples, position = next_step(order, position, phase)
            ordered = time.process_time()
            plan = plan_step(samples.lengths, bin_residues=16_384, num_ranks=num_ranks)
            mine = samples.take(plan.bins_of(num_ranks // 2)[0])
            times.append((ordered - begin, time.process_time() - ordered))
        assert len(mine) > 0
        totals = [np.add.reduceat(samples.lengths[plan.members] ** power, plan.bin_starts[:-1]) for power in (1, 2)]
        found[f"max_residues_{limit}"] = {
            "order_ms": round(1e3 * statistics.median(t[0] for t in times), 1),
            "plan_ms": round(1e3 * statistics.median(t[1] for t in times), 1),
            "slowest_over_mean_lengths": round(float(totals[0].max() / totals[0].mean()), 3),
            "slowest_over_mean_squares": round(float(totals[1].max() / totals[1].mean()), 3),
        }
    return found


# ---- report ----


def render(result: dict[str, Any]) -> str:
    rows = sorted(result["rows"], key=lambda row: -row["records_per_cpu_s"])
    best, limit = result["ours"], result["limit"]
    complete = next(row["records_per_cpu_s"] for row in rows if "complete micro batches" in row["name"])
    lines = [
        "# Loading: records into packed int64 batches of 32k tokens",
        "",
        f"{result['records']:,} proteins (mean {result['mean_length']:.0f} residues) of {result['data']}, one process, warm page cache;",
        f"medians of {result['rounds']} interleaved rounds of {result['seconds']} CPU-seconds, per second of CPU time of all threads.",
        "",
        "Like for like is the row of shuffled order and gather: as the contenders it hands out raw records. Complete micro batches have special tokens,",
        f"positions and masks, too, which no contender makes. The target is {TARGET:.0f}x each contender's records a second.",
        "",
        "| contender | records/CPU-s | Mtokens/CPU-s | ours is, like for like | target | complete micro batches are | of the cast limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"**{row['name']}**" if row["is_ours"] else row["name"]
        ratios = " |  | " if row["is_ours"] or row["name"].startswith("LIMIT") else _ratios(best, complete, row["records_per_cpu_s"])
        lines.append(f"| {name} | {row['records_per_cpu_s']:,.0f} | {row['megatokens_per_cpu_s']:.1f} | {ratios} | {row['megatokens_per_cpu_s'] / limit:.3f} |")
    lines += ["", *(f"- Could not run here: {name}: {error}" for name, error in result["broken"].items()), ""]
    planning = result["planning"]
    lines += [
        f"## Planning one step: {planning['num_ranks']:,} ranks, {planning['global_batch_size']:,} sequences",
        "",
        "Done by every rank for itself, in the background: draw the step from the order, plan it for all ranks, take its own bin.",
        "",
        "| limit | order ms | plan ms | slowest rank / mean: sum of lengths | sum of squares |",
        "|---|---|---|---|---|",
    ]
    for key, values in planning.items():
        if key.startswith("max_residues"):
            lines.append(f"| {key.rpartition('_')[2]} | " + " | ".join(str(value) for value in values.values()) + " |")
    lines += ["", result["hardware"]["line"], f"Our loops: {result['kernel']}.", ""]
    return "\n".join(lines)


def _ratios(best: float, complete: float, rate: float) -> str:
    """Three cells of a contender."""
    return f"{best / rate:,.0f}x | {'met' if best / rate >= TARGET else 'missed'} | {complete / rate:,.1f}x"


def build_corpus(data: Path, out: Path) -> Corpus:
    request = {"inputs": [str(data)], "out": str(out), "workers": 1, "mpi": False, "shards": 1, "dedup": False, "validation": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):
        run_stage("preprocess", request | {"clusters": None, "invalid": "x", "keep_rare": False, "names": False, "release": None, "json": True})
    return Corpus(read_index(out))


def our_contenders(corpus: Corpus) -> list[Contender]:
    c = kernel.implementation()
    return [
        Contender("LIMIT: sequential uint8 -> int64 cast, 32k blocks", lambda: sequential_cast(corpus)),
        Contender(f"ours: shuffled order and gather, {c}", lambda: in_order(corpus), True),
        Contender("ours: the same without the C kernel", lambda: without_kernel(lambda: in_order(corpus)), True),
        Contender(f"ours: with the balanced plan of a step for all ranks, {c}", lambda: ours(corpus, masks=False, specials=False), True),
        Contender(f"ours: complete micro batches with special tokens, positions and masks, {c}", lambda: ours(corpus, masks=True, specials=True), True),
    ]


def main() -> None:
    """Measure everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="FASTA file, or a folder that holds pretrain/swissprot201401_sp50.fasta.zst")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="CPU-seconds a contender and round")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--render", action="store_true", help="write loader.md again from loader.json, and measure nothing")
    options = parser.parse_args()
    if options.render:
        (options.out / "loader.md").write_text(render(json.loads((options.out / "loader.json").read_text())))
        return
    if options.data is None:
        parser.error("give --data, or --render")
    data = options.data / "pretrain" / "swissprot201401_sp50.fasta.zst" if options.data.is_dir() else options.data
    with tempfile.TemporaryDirectory() as folder:
        result = run(data, Path(folder), options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "loader.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "loader.md").write_text(render(result))
    print(render(result))


def run(data: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    corpus = build_corpus(data, folder / "corpus")
    shard = folder / "corpus" / "train-00000.h5"
    samples = whole_sequences(np.arange(corpus.num_sequences), corpus.lengths, epoch=0)
    mapped = corpus._map(0)
    records = [mapped.residues[start : start + length].tobytes() for start, length in zip(mapped.offsets[:-1].tolist(), samples.lengths.tolist(), strict=True)]
    contenders, broken = our_contenders(corpus), {}
    contenders += h5py_contenders(shard)
    for name, build in OTHERS.items():
        try:
            contenders += build(records, folder)
        except Exception as error:
            broken[name] = f"{type(error).__name__}: {error}"
    rows, failed = measure(contenders, rounds=options.rounds, seconds=options.seconds)
    return {
        "data": data.name,
        "records": corpus.num_sequences,
        "mean_length": corpus.num_residues / corpus.num_sequences,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "rows": [asdict(row) for row in rows],
        "broken": broken | failed,
        "ours": next(row.records_per_cpu_s for row in rows if row.is_ours),
        "limit": next(row.megatokens_per_cpu_s for row in rows if row.name.startswith("LIMIT")),
        "planning": measure_planning(corpus.lengths),
        "kernel": kernel.implementation(),
        "hardware": describe(),
    }


if __name__ == "__main__":
    main()
