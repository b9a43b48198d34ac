"""Residues a second of one training step, every family: ours on packed sequences beside transformers' class on padded ones.

Forward, backward and AdamW's update of the size `small`, the same real proteins with the same corruption, cut to 512
and to 1,024 residues. transformers pads to the longest of the batch (dynamic) or to the cap; only real residues count.
On a CPU one thread each, in turns, by CPU time of the process, so that a busy machine disturbs little; on a GPU by the
clock, with bf16 and model-FLOP utilisation. Writes train_step.{json,md} (train_step_cuda.* on a GPU) after every row,
and keeps the rows that an earlier start measured on the same hardware with the same versions.

    python benchmarks/train_step.py [--families prot_bert,prot_t5] [--device cuda --peak-tflops 989]
    python benchmarks/train_step.py --render    # train_step.md again, from train_step.json
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gzip
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import describe
from train_step_contenders import CONTENDERS, Padded

from prottrans_hpc import architecture, objectives
from prottrans_hpc.architecture import Architecture, Batch
from prottrans_hpc.corpus.samples import Samples, whole_sequences
from prottrans_hpc.objectives.layout import Layout
from prottrans_hpc.recipe import Recipe, read_recipe
from prottrans_hpc.stage import find
from prottrans_hpc.train.loader import to_tensors
from prottrans_hpc.train.step import on_device

QUERY = Path(__file__).resolve().parents[1] / "data" / "mmseqs2_example_QUERY.fasta.gz"
FAMILIES = ("prot_bert", "prot_albert", "prot_electra", "prot_t5", "prot_xlnet", "prot_txl", "protein_lm")
TOKENS_PER_TARGET = 6.7
TARGETS = {("dynamic padding", 512): 1.8, ("padding to the cap", 512): 2.4, ("padding to the cap", 1024): 6.0}
"""How many times a contender's residues a second ours are to be, on a CPU, by contender and cap."""
TIMED = ("date", "line")
"""What of a description of the hardware changes from day to day."""


@dataclass(frozen=True)
class Settings:
    """What all contenders share."""

    device: torch.device
    bf16: bool
    sequences: int
    rounds: int
    peak_tflops: float | None

    def clock(self) -> float:
        """CPU seconds of this process, or seconds once the GPU has finished."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def forward(self) -> contextlib.AbstractContextManager[Any]:
        """The precision."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.bf16 else contextlib.nullcontext()


def proteins() -> list[bytes]:
    """500 real proteins of 8 to 4,291 residues, rare letters as X."""
    with gzip.open(QUERY, "rt") as file:
        records = ["".join(record.splitlines()[1:]).upper() for record in file.read().split(">")[1:]]
    return [record.translate(str.maketrans("BOUZ", "XXXX")).encode() for record in records]


def batches_of(recipe: Recipe, record: Architecture, cap: int, settings: Settings) -> list[Batch]:
    """A batch of random proteins for each round and one more to warm up, corrupted as the recipe says."""
    known, dice = proteins(), np.random.default_rng(cap)
    made = []
    for _ in range(settings.rounds + 1):
        chosen = [known[i][:cap] for i in dice.choice(len(known), settings.sequences, replace=False)]
        samples = whole_sequences(np.arange(len(chosen)), np.array([len(one) for one in chosen]), epoch=0)
        made.append(to_tensors(objectives.get(recipe.objective.name)(layout_of(chosen, samples, record), recipe.objective, 1)))
    return made


def layout_of(chosen: list[bytes], samples: Samples, record: Architecture) -> Layout:
    """The packed layout of sequences at hand."""
    from prottrans_hpc.objectives.layout import lay_out

    class AtHand:
        """What `lay_out` asks of a corpus."""

        def gather(self, samples: Samples, table: bytes, out: Any, out_starts: Any) -> None:
            for one, start in zip(chosen, out_starts.tolist(), strict=True):
                out[start : start + len(one)] = np.frombuffer(one.translate(table), np.uint8)

    corpus: Any = AtHand()
    return lay_out(corpus, samples, record.vocabulary)


Step = Callable[[int], None]


def stepper(module: torch.nn.Module, losses: Callable[[int], torch.Tensor], settings: Settings) -> Step:
    """Forward, backward, update of a round."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step(number: int) -> None:
        with settings.forward():
            loss = losses(number)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


def ours(record: Architecture, shape: Any, batches: list[Batch], settings: Settings) -> Step:
    """Our modules on the packed batches."""
    from dataclasses import replace

    with torch.device(settings.device):
        module = find(record.build)(shape)
    module.initialise(0)
    module.train()
    placed = [replace(batch, tokens_per_target=TOKENS_PER_TARGET) for batch in on_device(tuple(batches), settings.device)]
    return stepper(module, lambda number: module(placed[number]).loss / len(placed[number].targets), settings)


def theirs(record: Architecture, shape: Any, batches: list[Batch], settings: Settings, width: int | None) -> Step:
    """transformers' class on the padded batches."""
    torch.manual_seed(0)
    module, loss = CONTENDERS[record.name](record, shape)
    module.to(settings.device).train()
    padding = record.vocabulary.index(record.vocabulary.padding)
    placed = [Padded(batch, padding, width).to(settings.device) for batch in batches]
    return stepper(module, lambda number: loss(placed[number]), settings)


def measure(steps: dict[str, Step], batches: list[Batch], settings: Settings) -> dict[str, float]:
    """Residues a second of each contender: the median over rounds, in each of which all take their turn."""
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for number, batch in enumerate(batches):
        for name, step in steps.items():
            began = settings.clock()
            step(number)
            if number:
                rates[name].append(batch.num_residues / (settings.clock() - began))
    return {name: statistics.median(values) for name, values in rates.items()}


def family(name: str, cap: int, settings: Settings) -> dict[str, Any]:
    """All contenders of one family at one cap."""
    recipe = read_recipe(f"small_{name}")
    record = architecture.get(name)
    shape = record.size(recipe.architecture.size).shape
    batches = batches_of(recipe, record, cap, settings)
    specials = len(record.vocabulary.prefix) + len(record.vocabulary.suffix)
    steps = {"ours": ours(record, shape, batches, settings)}
    if name in CONTENDERS:
        steps["dynamic padding"] = theirs(record, shape, batches, settings, None)
        steps["padding to the cap"] = theirs(record, shape, batches, settings, cap + specials)
    found: dict[str, Any] = {"family": name, "cap": cap, "sequences": settings.sequences, "parameters": record.num_parameters(shape)}
    found["residues_per_s"] = measure(steps, batches, settings)
    if settings.peak_tflops:
        flops = [record.flops(shape, batch.cu_seqlens.diff().tolist()) / batch.num_residues for batch in batches[1:]]
        found["mfu"] = statistics.median(flops) * found["residues_per_s"]["ours"] / (settings.peak_tflops * 1e12)
    return found


def report(row: dict[str, Any], settings: Settings, out: Path) -> None:
    """JSON and a Markdown table: this row, and the others that were measured before on this hardware with these versions."""
    hardware = describe()
    stem = "train_step" if settings.device.type == "cpu" else "train_step_cuda"
    stored = out / f"{stem}.json"
    before = json.loads(stored.read_text()) if stored.exists() else {}
    same = {key: value for key, value in before.get("hardware", {}).items() if key not in TIMED} == {key: hardware[key] for key in hardware if key not in TIMED}
    rows = {(one["family"], one["cap"]): one for one in (before["rows"] if same and before["bf16"] == settings.bf16 else [])}
    rows[row["family"], row["cap"]] = row
    ordered = sorted(rows.values(), key=lambda one: (FAMILIES.index(one["family"]), one["cap"]))
    stored.write_text(json.dumps({"hardware": hardware, "bf16": settings.bf16, "rows": ordered}, indent=1) + "\n")
    (out / f"{stem}.md").write_text(table(ordered, settings, hardware["line"]))


def compared(row: dict[str, Any], contender: str, *, on_cpu: bool) -> str:
    """A contender's cell: its rate, what ours is of it, and whether that is what was aimed at."""
    rate, target = row["residues_per_s"], TARGETS.get((contender, row["cap"])) if on_cpu else None
    if contender not in rate:
        return "none"
    ratio = rate["ours"] / rate[contender]
    verdict = f"; target {target}x: {'met' if ratio >= target else 'missed'}" if target else ""
    return f"{rate[contender]:,.0f} (ours {ratio:.2f}x{verdict})"


def table(rows: list[dict[str, Any]], settings: Settings, hardware: str) -> str:
    """Markdown."""
    kind = "one CPU thread, CPU time" if settings.device.type == "cpu" else torch.cuda.get_device_name(settings.device)
    lines = [f"# A training step of every family's `small`: {kind}, {'bf16' if settings.bf16 else 'fp32'}", ""]
    lines += [
        "| family | cap | proteins a step | parameters | ours, residues/s | transformers, dynamic padding | transformers, padded to the cap | MFU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rate = row["residues_per_s"]
        other = [compared(row, name, on_cpu=settings.device.type == "cpu") for name in ("dynamic padding", "padding to the cap")]
        mfu = f"{row['mfu']:.1%}" if "mfu" in row else ""
        lines.append(f"| {row['family']} | {row['cap']} | {row['sequences']} | {row['parameters']:,} | {rate['ours']:,.0f} | {other[0]} | {other[1]} | {mfu} |")
    return "\n".join([*lines, "", "Medians; forward, backward and AdamW; the same proteins and corruption for all; real residues only.", "", hardware, ""])


def main() -> None:
    """Every family at both caps, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--caps", default="512,1024")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak-tflops", type=float)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--render", action="store_true", help="write the Markdown again from the JSON, and measure nothing")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    settings = Settings(device, arguments.bf16 or device.type == "cuda", arguments.sequences, arguments.rounds, arguments.peak_tflops)
    if arguments.render:
        stem = "train_step" if device.type == "cpu" else "train_step_cuda"
        stored = json.loads((arguments.out / f"{stem}.json").read_text())
        settings = dataclasses.replace(settings, bf16=stored["bf16"])
        (arguments.out / f"{stem}.md").write_text(table(stored["rows"], settings, stored["hardware"]["line"]))
        return
    for name in arguments.families.split(","):
        for cap in map(int, arguments.caps.split(",")):
            row = family(name, cap, settings)
            print(json.dumps(row), flush=True)
            report(row, settings, arguments.out)


if __name__ == "__main__":
    main()
