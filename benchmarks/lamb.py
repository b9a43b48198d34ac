"""LAMB beside the libraries' on a CPU: `python benchmarks/lamb.py [--rounds N]`.

One step of about 99 M parameters in 224 tensors (a BERT of 12 layers x 768 with a small vocabulary and a long position
table) on one thread and on all; ours is timed with the global norm of the gradients and clipping, the libraries
without, which none of them does in its step. The ways are interleaved and medians taken, for other programs may use
the same cores: on one thread by that thread's own CPU time, on all by the clock. No step can move fewer than 32 bytes
a parameter: 28 to read gradient, moments and parameter and to write the last three, 4 to have taken the norm before.
The limit is the time that these take at the rate that torch's fused AdamW reaches in the same run, which moves 28.
Writes results/lamb.json and results/lamb.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import hardware
import torch

from prottrans_hpc.recipe_optimizers import Lamb
from prottrans_hpc.train import kernel, lamb, lamb_shards, optim

RESULTS = Path(__file__).parent / "results"
SETTINGS = Lamb(learning_rate=1e-3)
FEWEST_BYTES, BYTES_OF_ADAMW = 32, 28
Step = Callable[[], None]


def shapes() -> list[tuple[int, ...]]:
    """12 layers of 18 tensors and 8 others."""
    width, inner = 768, 3072
    attention = [(width, width), (width,)] * 4 + [(width,), (width,)]
    feed_forward = [(inner, width), (inner,), (width, inner), (width,), (width,), (width,)]
    per_layer = attention + feed_forward + [(width,), (width,)]
    return per_layer * 12 + [(30, width), (17_000, width), (2, width), (width,), (width,), (width, width), (width,), (30,)]


@functools.cache
def gradients() -> list[torch.Tensor]:
    """Of the size that training has; all ways read the same ones."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) * 1e-3 for shape in shapes()]


def make_parameters() -> dict[str, torch.nn.Parameter]:
    """Weights of the size that training has, with their gradients."""
    generator = torch.Generator().manual_seed(0)
    parameters = {str(i): torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for i, shape in enumerate(shapes())}
    for parameter, gradient in zip(parameters.values(), gradients(), strict=True):
        parameter.grad = gradient
    return parameters


def ours(update: str) -> Step:
    """Norm, clipping and step by one of our ways."""
    parameters = make_parameters()
    optimizer = lamb.Lamb(dict(parameters), SETTINGS)

    def step() -> None:
        chosen, lamb.choose = lamb.choose, lambda slots: lamb.UPDATES[update]
        optimizer.step(1e-3, optim.measure_gradients(parameters.values(), scale=1.0, max_norm=1.0).factor)
        lamb.choose = chosen

    return step


def ours_in_pieces(way: str) -> Step:
    """What a rank does that holds pieces of tensors (here all of them), without the sum over ranks between the halves."""
    parameters, halves = make_parameters(), lamb_shards.HALVES[way]
    slots = [lamb.Slot(p, torch.zeros_like(p), torch.zeros_like(p), optim.decays(name, p)) for name, p in parameters.items()]
    update = lamb.Update(1e-3, 1.0, SETTINGS.beta1, SETTINGS.beta2, SETTINGS.epsilon, SETTINGS.weight_decay, 10.0, 1000.0)
    # Multi-tensor operations leave the directions where the gradients were.
    shards = [lamb_shards.Shard(s.parameter.detach(), lamb.gradient(s).clone(), s.exp_avg, s.exp_avg_sq, s.adapts, True) for s in slots]

    def step() -> None:
        halves.renew_parameters(shards, update, lamb_shards.trust_ratios(halves.renew_moments(shards, update)))

    return step


def torch_optimizer_lamb() -> Step:
    """jettify/pytorch-optimizer."""
    import torch_optimizer

    return torch_optimizer.Lamb(make_parameters().values(), lr=1e-3, weight_decay=0.01).step


def pytorch_optimizer_lamb(foreach: bool) -> Step:
    """kozistr/pytorch_optimizer; by itself it takes the multi-tensor operations."""
    import pytorch_optimizer

    return pytorch_optimizer.Lamb(make_parameters().values(), lr=1e-3, weight_decay=0.01, foreach=foreach).step


def fused_adamw() -> Step:
    """The yardstick for memory bandwidth."""
    return torch.optim.AdamW(make_parameters().values(), lr=1e-3, fused=True).step


WAYS: dict[str, Callable[[], Step]] = {
    "prottrans_hpc, C kernel, with clipping": lambda: ours("kernel"),
    "prottrans_hpc, loop, with clipping": lambda: ours("loop"),
    "prottrans_hpc, foreach, with clipping": lambda: ours("foreach"),
    "prottrans_hpc, pieces of tensors, C kernel": lambda: ours_in_pieces("kernel"),
    "prottrans_hpc, pieces of tensors, foreach": lambda: ours_in_pieces("foreach"),
    "torch_optimizer.Lamb": torch_optimizer_lamb,
    "pytorch_optimizer.Lamb, foreach": lambda: pytorch_optimizer_lamb(True),
    "pytorch_optimizer.Lamb, loop": lambda: pytorch_optimizer_lamb(False),
    "torch.optim.AdamW, fused": fused_adamw,
}
OURS, YARDSTICK = "prottrans_hpc, C kernel, with clipping", "torch.optim.AdamW, fused"
LIBRARIES = [name for name in WAYS if "optimizer.Lamb" in name]


def measure(num_threads: int, rounds: int) -> dict[str, float]:
    """Median seconds of a step of each way."""
    torch.set_num_threads(num_threads)
    clock = time.thread_time if num_threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    steps = {name: make() for name, make in WAYS.items()}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            started = clock()
            step()
            if round_:  # the first one allocates
                seconds[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(num_threads: int, seconds: dict[str, float], num_parameters: int) -> tuple[list[str], dict[str, float]]:
    """Table lines and figures."""
    limit = FEWEST_BYTES / BYTES_OF_ADAMW * seconds[YARDSTICK]
    best = min(seconds[name] for name in LIBRARIES)
    figures = {
        "speed-up over the best library": best / seconds[OURS],
        "fraction of the memory limit": limit / seconds[OURS],
        "limit_ms": 1e3 * limit,
        "yardstick_gb_per_s": BYTES_OF_ADAMW * num_parameters / seconds[YARDSTICK] / 1e9,
    }
    clock = "CPU time of the thread" if num_threads == 1 else "wall time"
    lines = [
        f"## {num_threads} thread{'s' if num_threads > 1 else ''} ({clock})",
        "",
        "| step | ms | ours is faster by | fraction of the limit |",
        "|---|---|---|---|",
    ]
    for name, value in sorted(seconds.items(), key=lambda item: item[1]):
        fraction = "-" if name == YARDSTICK else f"{limit / value:.2f}"
        lines.append(f"| {name} | {1e3 * value:.0f} | {value / seconds[OURS]:.1f}x | {fraction} |")
    lines += ["", f"Limit {1e3 * limit:.0f} ms: {FEWEST_BYTES} bytes a parameter at {figures['yardstick_gb_per_s']:.1f} GB/s.", ""]
    return lines, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each way (default 7)")
    rounds = parser.parse_args().rounds
    if kernel.extension() is None:
        raise SystemExit("the C kernel is not built: pip install -e . builds it")
    num_parameters = sum(torch.Size(shape).numel() for shape in shapes())
    machine = hardware.describe()
    lines = ["# LAMB on a CPU", "", (__doc__ or "").split("\n\n", 1)[1].strip(), "", machine["line"], ""]
    lines += [f"{num_parameters / 1e6:.1f} M parameters, {len(shapes())} tensors, {rounds} rounds; load average {os.getloadavg()[0]:.1f} at the start.", ""]
    results: dict[str, object] = {"hardware": machine, "load": os.getloadavg()[0], "parameters": num_parameters, "tensors": len(shapes()), "rounds": rounds}
    for num_threads in sorted({1, len(os.sched_getaffinity(0))}):
        seconds = measure(num_threads, rounds)
        table, figures = report(num_threads, seconds, num_parameters)
        lines += table
        results[f"{num_threads} threads"] = {"seconds": seconds, **figures}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "lamb.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "lamb.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
