"""Peak bytes of activations and time of a step under each memory policy, as ratios to keeping everything, in one run.

A ProtBert of 6 layers of 256 (and deeper, where --layers says so), real proteins cut to 512 residues, packed; forward and
backward, without update. On a CPU one thread, by CPU time of the process. All policies take their turn in every round, in drawn
order; the time is the median over rounds of the ratio within a round, and the quartiles stand beside it, for other work on the
machine changes what a step costs from minute to minute. The peak is that of the storages alive beside parameters, gradients
and the batch. On a GPU (--device cuda) time is by the clock and the peak the allocator's.
Writes memory_policies.{json,md}.

    python benchmarks/memory_policies.py [--layers 6,12] [--device cuda]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hardware import describe
from train_step import Settings, batches_of

from prottrans_hpc import architecture
from prottrans_hpc.architecture import Batch
from prottrans_hpc.memory.policy import around
from prottrans_hpc.profile.storage_tracker import StorageTracker
from prottrans_hpc.recipe import read_recipe
from prottrans_hpc.recipe_memory import Memory
from prottrans_hpc.stage import find
from prottrans_hpc.train.step import on_device

POLICIES = {
    "everything kept": Memory(),
    "every layer recomputed": Memory(recompute_every=1),
    "every 2nd layer recomputed": Memory(recompute_every=2),
    "recomputed but for attention": Memory(recompute_every=1, recompute_keeps="attention"),
    "recomputed but for attention and narrowing products": Memory(recompute_every=1, recompute_keeps="attention_and_narrow"),
    "recomputed but for attention and every 2nd product": Memory(recompute_every=1, recompute_keeps="attention_and_half"),
    "saved in bf16": Memory(saved="bf16"),
    "attention and narrowing products kept, in bf16": Memory(recompute_every=1, recompute_keeps="attention_and_narrow", saved="bf16"),
    "LMS, limit 0": Memory(lms_limit_gib=0.0),
    "LMS, limit 100 MiB": Memory(lms_limit_gib=100 / 1024),
    "LMS, limit 0, attention and narrowing products kept": Memory(recompute_every=1, recompute_keeps="attention_and_narrow", lms_limit_gib=0.0),
}
TARGET_MEMORY, TARGET_TIME = 0.36, 1.20
"""Of the best selective policy."""


@dataclass(frozen=True)
class Bench:
    """One model and its batches."""

    module: Any
    batches: list[Batch]
    settings: Settings

    def step(self, memory: Memory, number: int) -> torch.Tensor:
        """Forward and backward."""
        self.module.recompute_every = memory.recompute_every
        with around(self.settings.forward, memory, self.module.parameters())():
            loss: torch.Tensor = self.module(self.batches[number]).loss
        loss.backward()
        return loss.detach()

    def peak_bytes(self, memory: Memory) -> tuple[int, int]:
        """(alive after the forward pass, the most alive at once) of activations."""
        self.module.zero_grad(set_to_none=False)
        if self.settings.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_stats()["active_bytes.all.current"]  # what copies still use counts, too
            self.step(memory, 0)
            return 0, torch.cuda.memory_stats()["active_bytes.all.peak"] - before
        self.module.recompute_every = memory.recompute_every
        parameters = list(self.module.parameters())
        beside = [*parameters, *(one.grad for one in parameters if one.grad is not None)]
        beside += [value for value in vars(self.batches[0]).values() if isinstance(value, torch.Tensor)]
        with StorageTracker(*beside) as tracker:
            with around(self.settings.forward, memory, parameters)():
                loss = self.module(self.batches[0]).loss
            after = tracker.live_bytes
            loss.backward()
        return after, tracker.peak_bytes

    def seconds(self, rounds: int) -> dict[str, list[float]]:
        """Of each policy, in turns; the first round warms up."""
        found: dict[str, list[float]] = {name: [] for name in POLICIES}
        dice = random.Random(1)
        for number in range(rounds + 1):
            for name, memory in sorted(POLICIES.items(), key=lambda _: dice.random()):
                began = self.settings.clock()
                self.step(memory, number)
                if number:
                    found[name].append(self.settings.clock() - began)
        return found


def rows_of(layers: int, settings: Settings) -> list[dict[str, Any]]:
    """All policies at one depth."""
    recipe, record = read_recipe("small_prot_bert"), architecture.get("prot_bert")
    small: Any = record.size("small").shape
    shape = dataclasses.replace(small, num_layers=layers, hidden_size=256, num_heads=8, intermediate_size=1024)
    with torch.device(settings.device):
        module = find(record.build)(shape)
    module.initialise(0)
    batches = list(on_device(tuple(batches_of(recipe, record, 512, settings)), settings.device))
    bench = Bench(module.train(), batches, settings)
    bench.step(Memory(), 0)
    peaks = {name: bench.peak_bytes(memory) for name, memory in POLICIES.items()}
    seconds = bench.seconds(settings.rounds)
    plain = peaks["everything kept"][1]
    found = []
    for name, taken in seconds.items():
        after, peak = peaks[name]
        found.append({"layers": layers, "tokens": len(batches[0].tokens), "policy": name, "after_forward_bytes": after, "peak_bytes": peak})
        found[-1] |= {"peak_ratio": peak / plain, "seconds": taken} | in_turns(taken, seconds["everything kept"])
    return found


def in_turns(taken: list[float], plain: list[float]) -> dict[str, float]:
    """The median of the rounds' ratios, and their quartiles."""
    ratios = [one / other for one, other in zip(taken, plain, strict=True)]
    low, middle, high = statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"time_ratio": middle, "time_ratio_low": low, "time_ratio_high": high}


def report(rows: list[dict[str, Any]], settings: Settings, out: Path) -> None:
    """JSON and Markdown."""
    hardware, stem = describe(), "memory_policies" if settings.device.type == "cpu" else "memory_policies_cuda"
    content = {"hardware": hardware, "load": os.getloadavg()[0], "rounds": settings.rounds, "sequences": settings.sequences, "rows": rows}
    (out / f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n")
    kind = "one CPU thread, CPU time" if settings.device.type == "cpu" else torch.cuda.get_device_name(settings.device)
    lines = [f"# Memory policies: a step of ProtBert, layers of 256, {kind}", ""]
    for layers in dict.fromkeys(row["layers"] for row in rows):
        own = [row for row in rows if row["layers"] == layers]
        lines += [
            f"## {layers} layers, {own[0]['tokens']:,} tokens",
            "",
            "| policy | after forward, MB | peak, MB | peak | time | quartiles |",
            "|---|---|---|---|---|---|",
        ]
        for row in own:
            sizes = f"{row['after_forward_bytes'] / 1e6:.1f} | {row['peak_bytes'] / 1e6:.1f}"
            times = f"{row['time_ratio']:.3f}x | {row['time_ratio_low']:.3f}-{row['time_ratio_high']:.3f}"
            lines.append(f"| {row['policy']} | {sizes} | {row['peak_ratio']:.2f}x | {times} |")
        lines += ["", verdict(own), ""]
    lines += ["LMS on a CPU makes all of its copies, but its host memory is no other memory: the peak is what a device would hold."]
    lines += ["", f"{hardware['line']}; {settings.rounds} rounds, load average {content['load']:.0f} at the end.", ""]
    (out / f"{stem}.md").write_text("\n".join(lines))


def verdict(rows: list[dict[str, Any]]) -> str:
    """Whether a selective, lossless policy without copies reaches the target."""
    selective = [row for row in rows if row["policy"].startswith("recomputed but")]
    met = [row for row in selective if row["peak_ratio"] <= TARGET_MEMORY and row["time_ratio"] <= TARGET_TIME]
    best = min(met or selective, key=lambda row: row["peak_ratio"])
    target = f"Target, {TARGET_MEMORY}x of the peak at {TARGET_TIME:.2f}x of the time: {'reached' if met else 'missed'}"
    return f"{target}; {best['policy']}: {best['peak_ratio']:.3f}x at {best['time_ratio']:.3f}x."


def main() -> None:
    """Every depth, one after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", default="6")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    settings = Settings(device, arguments.bf16, arguments.sequences, arguments.rounds, None)
    rows: list[dict[str, Any]] = []
    for layers in map(int, arguments.layers.split(",")):
        rows += rows_of(layers, settings)
        report(rows, settings, arguments.out)


if __name__ == "__main__":
    main()
