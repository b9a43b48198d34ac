"""One real training step of a recipe, watched: what its weights, gradients, optimizer state and activations take, and its peak.

The micro batch is a full one of the longest phase, of a corpus or of random proteins; models with memory have theirs. On a
GPU the allocator counts, on a CPU `StorageTracker` (temporaries inside one operation are then not seen). `prottrans memory`
holds what is predicted without torch against this.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import architecture
from ..architecture import Architecture, Batch, LossSum
from ..corpus.alphabet import Rules
from ..corpus.builder import build
from ..corpus.identity import BuildOptions
from ..corpus.index import read_index
from ..corpus.order import SamplePosition
from ..corpus.pool import ThisProcess
from ..corpus.reader import Corpus
from ..memory.lms import LargeModelSupport
from ..memory.policy import around
from ..recipe import Phase, Recipe
from ..stage import find
from ..train import host_optimizer, precision
from ..train.lane_loader import load_lane_steps
from ..train.loader import Share, load_steps
from ..train.optim import Optimizer, build_optimizer, measure_gradients
from .storage_tracker import StorageTracker

_RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
_MEAN_RESIDUES = 300


@dataclass(frozen=True)
class Measured:
    """Bytes on the device, of one rank."""

    parameters: int
    gradients: int
    masters: int
    optimizer: int
    lanes: int
    """What a model with memory had of these lanes."""
    activations: int
    """What the forward pass left alive."""
    peak: int
    """The most at once in forward pass, backward pass and update, everything counted."""
    lengths: tuple[int, ...]
    """Tokens of each sequence of the micro batch."""
    num_decoder: int | None
    """Tokens that a decoder read."""


def one_micro_batch(recipe: Recipe, record: Architecture) -> Recipe:
    """The recipe as two steps, each of one full micro batch of its longest sequences."""
    longest = max(phase.max_residues for phase in recipe.phases)
    bins = max(recipe.loading.bin_residues, longest)
    sequences, residues = (bins // longest, None) if record.lanes else (None, bins)
    phase = Phase(steps=2, max_residues=longest, global_batch_size=sequences, global_batch_residues=residues)
    # Twice as much room as there is to pack: otherwise what just fills a micro batch is spread over two.
    room = bins if record.lanes else 2 * bins
    return replace(recipe, phases=(phase,), loading=replace(recipe.loading, bin_residues=room))


@contextlib.contextmanager
def some_corpus(folder: Path | None, *, num_residues: int) -> Iterator[Corpus]:
    """The training split of a corpus, or random proteins in a temporary one that holds several steps of so many residues."""
    if folder is not None:
        yield Corpus(read_index(folder), "train")
        return
    with tempfile.TemporaryDirectory(prefix="prottrans-memory-") as place:
        fasta, made, draw = Path(place) / "random.fasta", Path(place) / "corpus", random.Random(1)
        lengths = [max(40, round(draw.gauss(_MEAN_RESIDUES, 120))) for _ in range(4 * (num_residues // _MEAN_RESIDUES) + 64)]
        fasta.write_text("".join(f">r{number}\n{''.join(draw.choices(_RESIDUES, k=length))}\n" for number, length in enumerate(lengths)), encoding="ascii")
        build(BuildOptions((str(fasta),), made, Rules()), ThisProcess())
        yield Corpus(read_index(made), "train")


class Trainee:
    """A model with its optimizer and a full micro batch, which may take steps."""

    def __init__(self, recipe: Recipe, corpus: Corpus, *, shape: Any = None, device: torch.device | None = None) -> None:
        """`shape` stands in for that of the recipe's size."""
        self.recipe, self.device = recipe, device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        record = architecture.get(recipe.architecture.name)
        self.module: Any = find(record.build)(shape or record.size(recipe.architecture.size).shape)
        self.module.initialise(recipe.seed)
        self.module = self.module.to(self.device).train()
        self.module.recompute_every = recipe.memory.recompute_every
        self.lms = _large_model_support(recipe, self.module)
        policies = replace(recipe.memory, lms_limit_gib=None)
        self.forward = around(precision.forward_context(recipe.precision, self.device), policies, self.module.parameters())
        masters = precision.lower_weights(self.module, recipe.precision)
        moves = host_optimizer.moves(recipe, self.device)
        self.masters = {id(master): master for master in (host_optimizer.on_host(masters) if moves else masters).values()}
        self.optimizer = _optimizer(self.module, masters, recipe, moves=moves)
        self.trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.batch = self._draw(record, corpus)

    def _draw(self, record: Architecture, corpus: Corpus) -> Batch:
        """The fullest micro batch of the first step; with lanes of the second, whose memory the first has filled."""
        recipe = one_micro_batch(self.recipe, record)
        steps = (load_lane_steps if record.lanes else load_steps)(corpus, recipe, record.vocabulary, share=Share(0, 1), position=SamplePosition(), step=0)
        batch = self._to_device(next(steps).micro_batches[-1])
        if record.counts_tokens:
            batch = replace(batch, tokens_per_target=len(batch.tokens) / max(1, len(batch.targets)))
        if record.lanes:
            with torch.no_grad(), self.forward():
                memory = self.module(batch).memory
            batch = replace(self._to_device(next(steps).micro_batches[-1]), memory=memory)
        return batch

    def _to_device(self, batch: Batch) -> Batch:
        tensors: dict[str, Any] = {name: value.to(self.device) for name, value in vars(batch).items() if isinstance(value, Tensor)}
        return replace(batch, **tensors)

    def run_forward(self) -> LossSum:
        """The loss of the micro batch, connected to the graph, and the lanes' new memory."""
        with self.lms or contextlib.nullcontext(), self.forward():
            result: LossSum = self.module(self.batch)
        return result

    def update(self) -> None:
        """Move the weights by the gradients, which become zero and stay."""
        scale = measure_gradients(self.trained, scale=1.0 / max(1, len(self.batch.targets)), max_norm=1.0)
        self.optimizer.step(1e-4, scale.factor)
        torch._foreach_zero_([parameter.grad for parameter in self.trained if parameter.grad is not None])

    def held(self) -> list[Tensor]:
        """What is there between steps and during all of them."""
        inputs = [value for value in vars(self.batch).values() if isinstance(value, Tensor)]
        gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        state = list(self.optimizer.state_dict().values())
        return [*self.module.parameters(), *self.module.buffers(), *self.masters.values(), *gradients, *state, *inputs]


def _large_model_support(recipe: Recipe, module: nn.Module) -> LargeModelSupport | None:
    """Ours, and not the one that `around` makes, so that its host memory can be told from the device's where both are a CPU's."""
    limit = recipe.memory.lms_limit_gib
    if limit is None:
        return None
    return LargeModelSupport(int(limit * 2**30), parameters=module.parameters())


def _optimizer(module: nn.Module, masters: dict[str, Tensor], recipe: Recipe, *, moves: bool) -> Optimizer:
    if moves:
        return host_optimizer.build_host_optimizer(module, masters, recipe)
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not masters and all(parameter.dtype == torch.float32 for parameter in trained.values()):
        return build_optimizer(trained.items(), recipe.optimizer)
    return precision.HalfWeights(trained, masters, lambda weights: build_optimizer(weights.items(), recipe.optimizer))


def measure(trainee: Trainee) -> Measured:
    """What one step takes. With `memory.optimizer_on` = "host" the optimizer's state does not count, on a CPU neither: it stands for a GPU then."""
    for parameter in trainee.trained:
        parameter.grad = torch.zeros_like(parameter)
    left, most = _count_allocated(trainee) if trainee.device.type == "cuda" else _count_tracked(trainee)
    on_host, batch = trainee.recipe.memory.optimizer_on == "host", trainee.batch
    fixed = {
        "parameters": _bytes(trainee.module.parameters()) + _bytes(trainee.module.buffers()),
        "gradients": _bytes(parameter.grad for parameter in trainee.trained),
        "masters": 0 if on_host else _bytes(trainee.masters.values()),
        "optimizer": 0 if on_host else _bytes(trainee.optimizer.state_dict().values()),
        "lanes": 0 if batch.memory is None else batch.memory.nbytes,
    }
    return Measured(
        **fixed,
        activations=left,
        peak=sum(fixed.values()) + most,
        lengths=tuple(batch.cu_seqlens.diff().tolist()),
        num_decoder=None if batch.decoder_tokens is None else len(batch.decoder_tokens),
    )


def step_seconds(trainee: Trainee, *, num_steps: int = 3) -> float:
    """The shortest of some whole steps, after one that warms up."""
    found = []
    for _ in range(num_steps + 1):
        began = time.perf_counter()
        trainee.run_forward().loss.backward()
        trainee.update()
        if trainee.device.type == "cuda":
            torch.cuda.synchronize(trainee.device)
        found.append(time.perf_counter() - began)
    return min(found[1:])


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum({id(tensor): tensor.nbytes for tensor in tensors if tensor is not None}.values())


def _count_tracked(trainee: Trainee) -> tuple[int, int]:
    """Bytes that the forward pass leaves, and the most at once, beside what is always there."""
    tracker = StorageTracker(*trainee.held())
    with tracker:
        result = trainee.run_forward()
        left = tracker.live_bytes
        result.loss.backward()
        del result
        trainee.update()
    return left, tracker.peak_bytes


def _count_allocated(trainee: Trainee) -> tuple[int, int]:
    # Active bytes: what Python has dropped counts until other streams are done with it, too.
    torch.cuda.synchronize(trainee.device)
    torch.cuda.reset_peak_memory_stats(trainee.device)
    before = _active_bytes(trainee.device, "current")
    result = trainee.run_forward()
    left = _active_bytes(trainee.device, "current") - before
    result.loss.backward()
    del result
    trainee.update()
    torch.cuda.synchronize(trainee.device)
    return left, _active_bytes(trainee.device, "peak") - before


def _active_bytes(device: torch.device, kind: str) -> int:
    return int(torch.cuda.memory_stats(device)[f"active_bytes.all.{kind}"])
