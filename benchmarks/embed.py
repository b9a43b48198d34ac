"""Proteins a second into mean vectors: `prottrans embed` beside a loop with transformers, same weights, same proteins.

The model is written as a checkpoint and exported; transformers' AutoModel opens the export. Its two loops are what
people write: one protein at a time, and batches of 32 in the order of the file, padded to the longest of the batch,
with the mean over the residues taken through the attention mask. They keep vectors in memory and write nothing; ours
is the whole stage, from reading FASTA to the sealed HDF5 file. One thread each, rounds interleaved, medians; per second
of CPU time of the process, so that a busy machine disturbs little. Writes embed.json and embed.md.

    python benchmarks/embed.py
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from hardware import describe

from prottrans_hpc import architecture, terminal
from prottrans_hpc.architectures.prot_bert import BertShape
from prottrans_hpc.corpus.alphabet import Rules
from prottrans_hpc.corpus.fasta import Record, read_records
from prottrans_hpc.models.prot_bert import build
from prottrans_hpc.stage import run_stage
from prottrans_hpc.train import checkpoint

SAMPLE = Path(__file__).resolve().parents[1] / "data" / "swissprot201401_sp50_sample10k.fasta.zst"
BATCH = 32
CASES = {
    "tiny (2 layers x 64)": (architecture.get("prot_bert").size("tiny").shape, 1000),
    "small (6 layers x 256)": (architecture.get("prot_bert").size("small").shape, 300),
    "a tenth of prot_bert (3 of 30 layers x 1024)": (BertShape(num_layers=3, hidden_size=1024, intermediate_size=4096, num_heads=16, max_positions=2560), 64),
}


class Transformers:
    """AutoModel on the exported folder."""

    def __init__(self, folder: Path, records: list[Record]) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.model = AutoModel.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.texts = [" ".join(record.residues.decode()) for record in records]

    def embed(self, size: int) -> np.ndarray:
        """Mean vectors, in batches of `size`."""
        means = []
        with torch.inference_mode():
            for start in range(0, len(self.texts), size):
                encoded = self.tokenizer(self.texts[start : start + size], return_tensors="pt", padding=True)
                hidden = self.model(**encoded).last_hidden_state
                mask = encoded["attention_mask"].clone()
                ends = mask.sum(1) - 1
                mask[torch.arange(len(mask)), ends] = 0
                mask[:, 0] = 0
                means.append((hidden * mask[..., None]).sum(1) / mask.sum(1)[:, None])
        return torch.cat(means).numpy()


def ours(source: Path, fasta: Path, folder: Path, precision: str) -> np.ndarray:
    out = folder / "ours.h5"
    out.unlink(missing_ok=True)
    request: dict[str, Any] = {"source": str(source), "fasta": [str(fasta)], "out": str(out), "per_residue": False, "pool": "mean", "precision": precision}
    run_stage("embed", request | {"bin_residues": 16_384, "device": "cpu", "invalid": "error", "json": False})
    with h5py.File(out, "r") as file:
        return np.asarray(file["mean"][:])


def measure(shape: BertShape, records: list[Record], folder: Path, rounds: int) -> list[dict[str, Any]]:
    module = build(shape)
    module.initialise(1)
    source, fasta, exported = folder / "checkpoint", folder / "proteins.fasta", folder / "exported"
    checkpoint.write_model_checkpoint(source, record=architecture.get("prot_bert"), shape=shape, weights=module.state_dict(), origin={})
    run_stage("export", {"source": str(source), "to": "hf", "out": str(exported), "json": False})
    fasta.write_bytes(b"".join(b">%s\n%s\n" % (record.name, record.residues) for record in records))
    other = Transformers(exported, records)
    contenders: dict[str, Callable[[], np.ndarray]] = {
        "prottrans embed": lambda: ours(source, fasta, folder, "fp32"),
        "prottrans embed --precision bf16": lambda: ours(source, fasta, folder, "bf16"),
        "transformers, one by one": lambda: other.embed(1),
        f"transformers, padded batches of {BATCH}": lambda: other.embed(BATCH),
    }
    reference = contenders["transformers, one by one"]()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    errors = {}
    for _ in range(rounds):
        for name, run in contenders.items():
            started = time.process_time()
            means = run()
            times[name].append(time.process_time() - started)
            errors[name] = float(np.abs(means.astype(np.float64) - reference).max())
    seconds = {name: statistics.median(taken) for name, taken in times.items()}
    return [
        {
            "name": name,
            "cpu_s": taken,
            "proteins_per_cpu_s": len(records) / taken,
            "ours_is": taken / seconds["prottrans embed"],
            "max_difference": errors[name],
        }
        for name, taken in seconds.items()
    ]


def render(result: dict[str, Any]) -> str:
    lines = [
        "# Embedding: mean vectors of proteins",
        "",
        f"The first proteins of {result['data']}, one thread, fp32 unless said; medians of {result['rounds']} interleaved rounds, per second of CPU time.",
        "`prottrans embed` is the whole stage, with reading, checks and the durable HDF5 file; the loops with transformers write nothing.",
        "",
    ]
    for case in result["cases"]:
        lines += [
            f"## {case['model']}: {case['num_proteins']} proteins, mean {case['mean_length']:.0f} residues",
            "",
            "| contender | proteins/CPU-s | `prottrans embed` is | largest difference of a number |",
            "|---|---|---|---|",
            *(f"| {row['name']} | {row['proteins_per_cpu_s']:.1f} | {row['ours_is']:.2f}x | {row['max_difference']:.1e} |" for row in case["rows"]),
            "",
        ]
    return "\n".join([*lines, result["hardware"]["line"]]) + "\n"


def main() -> None:
    """Measure everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    terminal.set_verbosity(terminal.QUIET)
    cases = []
    for name, (shape, num_proteins) in CASES.items():
        fitting = (record for record in read_records([SAMPLE], rules=Rules()) if len(record.residues) <= shape.max_positions - 2)
        records = [record for record, _ in zip(fitting, range(num_proteins), strict=False)]
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(shape, records, Path(folder), options.rounds)
        mean_length = statistics.mean(len(record.residues) for record in records)
        cases.append({"model": name, "num_proteins": len(records), "mean_length": mean_length, "rows": rows})
    result = {"data": SAMPLE.name, "rounds": options.rounds, "cases": cases, "hardware": describe()}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "embed.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "embed.md").write_text(render(result))
    print(render(result))


if __name__ == "__main__":
    main()
