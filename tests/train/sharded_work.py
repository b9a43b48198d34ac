"""What the tests of sharded models run as ranks: `sharded_work.py CORPUS CASES OUT DEVICE`. Each rank leaves OUT/<rank>.json.

A case is {"name", "recipe", "settings", "layout": [replicas, shards, tensor]}. All ranks train it for some steps of
real proteins, cut, with its share; and rank 0 alone and whole, with all of it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prottrans_hpc import architecture, comm, comm_sharded, comm_torch, errors, rank
from prottrans_hpc.corpus.index import read_index
from prottrans_hpc.corpus.order import SamplePosition
from prottrans_hpc.corpus.reader import Corpus
from prottrans_hpc.memory import lms, narrowing, policy
from prottrans_hpc.memory.divided import local
from prottrans_hpc.parallel_layout import ParallelLayout
from prottrans_hpc.recipe import read_recipe
from prottrans_hpc.recipe_parallel import Parallel
from prottrans_hpc.stage import find
from prottrans_hpc.train import precision, session, starting_weights
from prottrans_hpc.train.lane_loader import load_lane_steps
from prottrans_hpc.train.lane_memory import LaneMemory
from prottrans_hpc.train.loader import Share, load_steps
from prottrans_hpc.train.step import on_device

NUM_STEPS, LEARNING_RATE = 2, 0.05


class Case:
    """One model and the steps that it takes."""

    def __init__(self, corpus: Corpus, case: dict[str, Any], device: torch.device) -> None:
        self.device = device
        self.recipe = read_recipe(case["recipe"], tuple(case["settings"]))
        self.record = architecture.get(self.recipe.architecture.name)
        self.shape = replace(self.record.size(self.recipe.architecture.size).shape, **case.get("shape", {}))
        self.layout, self.corpus = ParallelLayout(*case["layout"]), corpus

    def whole(self) -> torch.nn.Module:
        """With the starting weights."""
        module = find(self.record.build)(self.shape)
        module.initialise(self.recipe.seed)
        return self._set(module)

    def without_memory(self) -> torch.nn.Module:
        """What is going to be cut."""
        return self._set(starting_weights.build_without_memory(self.record, self.shape))

    def _set(self, module: torch.nn.Module) -> torch.nn.Module:
        module.recompute_every = self.recipe.memory.recompute_every
        return module.train()

    def train(self, model: comm.ParallelModel, share: Share, forward, total) -> list[float]:
        """Mean loss of each step; `total` adds up what data ranks have counted."""
        load = load_lane_steps if self.record.lanes else load_steps
        loading = load(self.corpus, self.recipe, self.record.vocabulary, share=share, position=SamplePosition(), step=0)
        memory, losses = LaneMemory(), []
        for loaded in itertools.islice(loading, NUM_STEPS):
            model.zero_gradients()
            loss, batches = 0.0, loaded.micro_batches
            tokens, targets = total([sum(len(batch.tokens) for batch in batches), loaded.num_targets])
            for index, batch in enumerate(on_device(batches, self.device)):
                if self.record.counts_tokens:
                    batch = replace(batch, tokens_per_target=tokens / targets)
                with model.no_sync() if index < len(batches) - 1 else forward.nothing():
                    with forward():
                        result = model.module(memory.put_into(batch, index))
                    model.backward(result.loss)
                memory.take(index, result.memory)
                loss += result.loss.item()
            model.finish_gradients()
            descend(model.module, LEARNING_RATE / targets)
            losses.append(total([loss])[0] / targets)
        return losses


@torch.no_grad()
def descend(module, rate):
    for parameter in module.parameters():
        if parameter.grad is not None:
            own, gradient = (each.to_local() if hasattr(each, "to_local") else each for each in (parameter, parameter.grad))
            own.add_(gradient, alpha=-rate)


@torch.no_grad()
def whole_weights(module):
    """Brought together from all ranks; and what each has of them, as bits."""
    weights = {name: parameter.full_tensor().cpu() for name, parameter in module.named_parameters()}
    return weights, hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in weights.values())).hexdigest()


@torch.no_grad()
def bits(weight):
    return hashlib.sha256(weight.detach().cpu().numpy().tobytes()).hexdigest()


@torch.no_grad()
def furthest(weights, reference):
    """How far weights are from the reference's, relative to the largest of each tensor."""
    whole = {name: parameter.cpu() for name, parameter in reference.named_parameters()}
    return max(float((weights[name] - whole[name]).abs().max() / whole[name].abs().max().clamp(min=1e-2)) for name in whole)


class Watched:
    """Of the storages that policies keep elsewhere: how many, and how many of them are weights that were brought together."""

    def __init__(self, model: comm_sharded.ShardedModel) -> None:
        self.taken, self.weights = 0, 0
        addresses: set[int] = set()
        model.when_gathered(lambda weight: addresses.add(local(weight).untyped_storage()._cdata))

        def watching(begin):
            def watched(first, *others):
                tensor = others[0] if isinstance(first, lms.LargeModelSupport) else first
                self.taken += 1
                self.weights += tensor.untyped_storage()._cdata in addresses
                return begin(first, *others)

            return watched

        self._whole, self._begin = narrowing.whole, lms.LargeModelSupport._begin
        narrowing.whole, lms.LargeModelSupport._begin = watching(self._whole), watching(self._begin)  # type: ignore[method-assign]

    def end(self) -> dict[str, int]:
        narrowing.whole, lms.LargeModelSupport._begin = self._whole, self._begin  # type: ignore[method-assign]
        return {"taken": self.taken, "weights_taken": self.weights}


class Forward:
    """A forward context, and one that does nothing."""

    nothing = torch.enable_grad

    def __init__(self, context) -> None:
        self._context = context

    def __call__(self):
        return self._context()


def run(case: Case, ranks, *, dies: bool) -> dict[str, Any]:
    context = precision.forward_context(case.recipe.precision, case.device)
    module = case.without_memory()
    model = comm_sharded.shard(ranks, module, case.layout, case.record.tensor_parallel.split if case.layout.num_tensor > 1 else {})
    drawn = starting_weights.put_starting_weights(module, {}, case.record, case.shape, case.recipe.seed)
    comm.check_same(ranks, "the starting weights", drawn)
    start = {name: bits(weight) for name, weight in whole_weights(module)[0].items()}
    counts = case.layout.tensor_index(ranks.rank) == 0
    if dies and ranks.rank == ranks.world_size - 1:
        os.kill(os.getpid(), signal.SIGKILL)

    def total(own: list[float]) -> list[float]:
        return ranks.all_reduce_sum(torch.tensor([value * counts for value in own], dtype=torch.float64)).tolist()

    share = Share(case.layout.data_rank(ranks.rank), case.layout.num_data_ranks)
    forward = Forward(model.around(policy.around(context, case.recipe.memory, session._weights(model, case.recipe))))
    watched = Watched(model)
    if dies:  # in the forward pass, not in a sum before it
        total = list  # type: ignore[assignment]
    losses = case.train(model, share, forward, total)
    seen = watched.end()
    weights, digest = whole_weights(module)
    report = {"losses": losses, "digest": digest, "held": sum(parameter.to_local().numel() for parameter in module.parameters())}
    if ranks.rank == 0:
        reference = case.whole()
        report |= {"start": start, "expected_start": {name: bits(weight) for name, weight in reference.named_parameters()}}
        report |= {"drawn": drawn.hex(), "expected_drawn": comm.parameter_digest(reference).hex()}
        alone = comm.SoloModel(reference.to(case.device))
        report |= {"expected": case.train(alone, Share(0, 1), Forward(context), list), "furthest": furthest(weights, alone.module)}
    return report | seen | {"whole": sum(weight.numel() for weight in weights.values())}


def main() -> int:
    corpus_path, cases, out = Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    lms.SIZE_BYTES = narrowing.SMALLEST_BYTES = 1  # the twins have small tensors alone
    context = rank.detect(os.environ)
    corpus = Corpus(read_index(corpus_path), "train")
    report: dict[str, Any] = {"rank": context.rank}
    device = torch.device(sys.argv[4])
    ranks = comm_torch.open_torch(Parallel(timeout_s=240), context, run_dir=out, device=device)  # one rank, too
    try:
        for case in cases:
            report[case["name"]] = run(Case(corpus, case, device), ranks, dies="dies" in case["name"])
    except errors.ProttransError as error:
        report["error"] = [type(error).__name__, str(error)]
    (out / f"{context.rank}.json").write_text(json.dumps(report))
    ranks.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
