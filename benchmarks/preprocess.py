"""FASTA to residues: our loops beside a HuggingFace tokenizer and the fastest library, and the whole of preprocess beside the disk.

Part one reads a file from memory (tmpfs) and makes one byte a residue with a border a sequence; the figure is MB of
FASTA a CPU-second. All contenders take turns in every round; ratios are medians over rounds of ratios within a round,
because the machine's speed changes more between rounds than between contenders. Part two makes a whole corpus on
a disk, hashes, fsync and all, beside a plain write with fsync of as many bytes. Writes preprocess.json and .md.

    python benchmarks/preprocess.py FASTA --rounds 5 --scratch DIR
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hardware import describe
from preprocess_contenders import Contender, contenders

from prottrans_hpc import terminal
from prottrans_hpc.corpus import kernel
from prottrans_hpc.corpus.alphabet import Rules
from prottrans_hpc.corpus.builder import build
from prottrans_hpc.corpus.fasta import read_records
from prottrans_hpc.corpus.identity import BuildOptions
from prottrans_hpc.corpus.pool import LocalProcesses, ThisProcess

TARGETS = (
    ("ours, C (best path)", "huggingface", "BertTokenizerFast", 1000.0),
    ("ours, C (best path)", "pyfastx", "pyfastx", 3.0),
    ("ours, Python", "pyfastx", "pyfastx", 0.6),
)
"""What a contender is to be, of which other, how many times."""
RESULTS = Path(__file__).parent / "results"


def spell(records: list[tuple[bytes, bytes]], path: Path, width: int | None) -> None:
    """Write FASTA with lines of `width` residues, or one line a sequence."""
    with path.open("wb") as file:
        for name, residues in records:
            lines = [residues[i : i + width] for i in range(0, len(residues), width)] if width else [residues]
            file.write(b">" + name + b"\n" + b"\n".join(lines) + b"\n")


def repeat(fasta: Path, path: Path, times: int) -> None:
    """The proteins several times over, under new names."""
    text = fasta.read_bytes()
    with path.open("wb") as file:
        for k in range(times):
            file.write(text.replace(b">", b">%d_" % k))


def measure(files: dict[float, Path], entries: list[Contender], rounds: int) -> dict[str, list[float]]:
    """MB a CPU-second of each contender in each round."""
    rates: dict[str, list[float]] = {entry.name: [] for entry in entries}
    for _ in range(rounds):
        for entry in entries:
            path = files[entry.share]
            begin = time.process_time()
            entry.run(path)
            rates[entry.name].append(path.stat().st_size / 1e6 / (time.process_time() - begin))
    return rates


def ratio(rates: dict[str, list[float]], one: str, other: str) -> float:
    """Median over rounds of a ratio within a round."""
    return statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True))


def agree(path: Path, entries: list[Contender]) -> None:
    """All that parse must see the same residues, or their speeds mean nothing."""
    counts = {entry.name: entry.run(path) for entry in entries if "limit" not in entry.name}
    if len(set(counts.values())) != 1:
        raise SystemExit(f"the contenders disagree: {counts}")


def write_limit(path: Path, num_bytes: int) -> float:
    """Seconds to write and fsync so many bytes that do not compress."""
    data = np.random.default_rng(0).bytes(1 << 22)
    begin = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for start in range(0, num_bytes, len(data)):
            file.write(data[: min(len(data), num_bytes - start)])
        os.fsync(file.fileno())
    elapsed = time.perf_counter() - begin
    path.unlink()
    return elapsed


def hash_limit(fasta: Path, num_bytes: int) -> float:
    """Seconds to hash the input and as many bytes as the output has, which no order of work avoids, on one core."""
    block = fasta.read_bytes()[: 1 << 22]
    begin = time.perf_counter()
    sha256 = hashlib.sha256()
    for _ in range((fasta.stat().st_size + num_bytes) // len(block)):
        sha256.update(block)
    return time.perf_counter() - begin


def end_to_end(fasta: Path, scratch: Path, rounds: int) -> dict[str, Any]:
    """Whole corpora, by one and by two workers, beside the plain write of their bytes."""
    names = ("one worker", "two workers", "write + fsync of the same bytes", "SHA-256 of input and output, one core")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    cpu, num_bytes = [], 0
    for k in range(rounds):
        for workers, name in ((1, names[0]), (2, names[1])):
            out = scratch / f"corpus-{k}-{workers}"
            pool = ThisProcess() if workers == 1 else LocalProcesses(workers)
            if isinstance(pool, LocalProcesses):
                pool.run(abs, [1, 2, 3, 4], costs=[1e9] * 4, advance=lambda amount: None)  # workers are up before the clock starts
            begin, begin_cpu = time.perf_counter(), time.process_time()
            index = build(BuildOptions((str(fasta),), out, Rules(), validation=0.01), pool)
            seconds[name].append(time.perf_counter() - begin)
            if workers == 1:
                cpu.append(time.process_time() - begin_cpu)
            if isinstance(pool, LocalProcesses):
                pool.close(kill=False)
            num_bytes = index.num_bytes
            shutil.rmtree(out)
        seconds[names[2]].append(write_limit(scratch / "raw", num_bytes))
        seconds[names[3]].append(hash_limit(fasta, num_bytes))
    size = fasta.stat().st_size / 1e6
    shares = {
        limit: {name: statistics.median(raw / own for raw, own in zip(seconds[limit], seconds[name], strict=True)) for name in names[:2]} for limit in names[2:]
    }
    return {
        "fasta_mb": size,
        "corpus_mb": num_bytes / 1e6,
        "bytes_per_residue": index.num_bytes / index.num_residues,
        "seconds": seconds,
        "mb_per_s": {name: size / statistics.median(seconds[name]) for name in names},
        "mb_per_cpu_s": size / statistics.median(cpu),
        "share_of": shares,
        "load_average": os.getloadavg()[0],
    }


def report(result: dict[str, Any]) -> str:
    """The Markdown page."""
    lines = ["# FASTA to residues", "", result["hardware"]["line"], ""]
    lines += [f"Input: {result['input']['sequences']:,} proteins, {result['input']['residues']:,} residues; {result['rounds']} rounds, in turns.", ""]
    lines += ["Rates are medians over the rounds; ratios are medians over the rounds of each round's own ratio, and so not the ratios of the medians.", ""]
    for spelling, part in result["parse"].items():
        lines += [
            f"## Parse and clean, {spelling}",
            "",
            "| | MB of FASTA a CPU-second | of read() | BertTokenizerFast x | pyfastx x |",
            "|---|--:|--:|--:|--:|",
        ]
        for name, rate in part["median"].items():
            of_limit, of_hf, of_pyfastx = (part["ratios"][name][key] for key in ("limit", "huggingface", "pyfastx"))
            lines.append(f"| {name} | {rate:,.1f} | {of_limit:.3g} | {of_hf:,.3g} | {of_pyfastx:.3g} |")
        lines.append("")
    whole = result["end_to_end"]
    lines += ["## The whole of preprocess, on a disk, with SHA-256 of input and output, split, name check and fsync", ""]
    lines += ["| | MB of FASTA a second | of the plain write's speed | of one core's SHA-256 |", "|---|--:|--:|--:|"]
    for name, rate in whole["mb_per_s"].items():
        shares = " | ".join(f"{share[name]:.2f}" if name in share else "1" if name == limit else "" for limit, share in whole["share_of"].items())
        lines.append(f"| {name} | {rate:,.0f} | {shares} |")
    lines += ["", *targets(result)]
    cores = result["hardware"]["cores"]
    lines += [
        "",
        f"A worker spends a CPU-second on {whole['mb_per_cpu_s']:,.0f} MB of FASTA: so fast a disk",
        f"one worker keeps up with, N workers with one N times as fast. {whole['bytes_per_residue']:.3f} bytes a residue on disk.",
        f"The clock ran with a load average of {whole['load_average']:.1f} on {cores} cores: above {cores} its seconds hold other people's work, too.",
        "",
    ]
    return "\n".join(lines)


def targets(result: dict[str, Any]) -> list[str]:
    """What was aimed at, and whether it was reached."""
    lines = ["## Targets", "", "| | target | measured | |", "|---|--:|--:|---|"]
    for spelling, part in result["parse"].items():
        for name, key, other, target in TARGETS:
            found = part["ratios"][name][key]
            lines.append(f"| {name}, {spelling}, beside {other} | {target:,g}x | {_factor(found)} | {'met' if found >= target else 'missed'} |")
    limit, shares = next(iter(result["end_to_end"]["share_of"].items()))
    for name, share in shares.items():
        lines.append(f"| the whole of preprocess, {name}, beside {limit} | 1x | {share:.2f}x | {'met' if share >= 1 else 'missed'} |")
    return lines


def _factor(value: float) -> str:
    return f"{value:,.0f}x" if value >= 100 else f"{value:.2f}x"


def inputs(fasta: Path, scratch: Path, records: list[tuple[bytes, bytes]]) -> Iterator[tuple[str, dict[float, Path]]]:
    """The same proteins in two spellings, whole and, for the slow contenders, a share."""
    for spelling, width in (("60 residues a line", 60), ("one line a sequence", None)):
        files = {}
        for share in (1.0, 0.02):
            files[share] = scratch / f"{width}-{share}.fasta"
            spell(records[: max(1, int(len(records) * share))], files[share], width)
        yield spelling, files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fasta", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, default=Path.cwd(), help="a folder on the disk that part two measures")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--render", action="store_true", help="write preprocess.md again from preprocess.json, and measure nothing")
    arguments = parser.parse_args()
    if arguments.render:
        (arguments.results / "preprocess.md").write_text(report(json.loads((arguments.results / "preprocess.json").read_text())))
        return
    if arguments.fasta is None:
        parser.error("give FASTA, or --render")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    terminal.set_verbosity(terminal.QUIET)
    records = [(record.name, record.residues) for record in read_records([arguments.fasta], rules=Rules())]
    memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    result: dict[str, Any] = {"hardware": describe(), "loops": kernel.implementation(), "rounds": arguments.rounds, "parse": {}}
    result["input"] = {"file": arguments.fasta.name, "sequences": len(records), "residues": sum(len(residues) for _, residues in records)}
    with tempfile.TemporaryDirectory(dir=memory) as fast, tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="bench-") as slow:
        entries = contenders(Path(fast))
        for spelling, files in inputs(arguments.fasta, Path(fast), records):
            agree(files[0.02], entries)
            rates = measure(files, entries, arguments.rounds)
            others = {"limit": entries[0].name, "huggingface": entries[-1].name, "pyfastx": "pyfastx + translate"}
            ratios = {entry.name: {key: ratio(rates, entry.name, other) for key, other in others.items()} for entry in entries}
            result["parse"][spelling] = {"median": {name: statistics.median(values) for name, values in rates.items()}, "rounds": rates, "ratios": ratios}
        disk_fasta = Path(slow) / "in.fasta"
        repeat(Path(fast) / "60-1.0.fasta", disk_fasta, 8)
        result["end_to_end"] = end_to_end(disk_fasta, Path(slow), arguments.rounds)
    arguments.results.mkdir(exist_ok=True)
    (arguments.results / "preprocess.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.results / "preprocess.md").write_text(report(result))
    print(report(result))


if __name__ == "__main__":
    main()
