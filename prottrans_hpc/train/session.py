"""What one rank holds while it trains, built once at the start: corpus, model, optimizer, saver, and how far it is."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .. import architecture
from ..architecture import Architecture
from ..comm import Comm, ParallelModel, check_same
from ..corpus.index import Index, read_index
from ..corpus.order import SamplePosition
from ..corpus.reader import Corpus
from ..errors import ConfigError, IdentityError
from ..memory.policy import around, saves_otherwise
from ..memory.storages import Parameters
from ..parallel_layout import ParallelLayout, layout_on
from ..precision_levels import LEVELS
from ..recipe import Recipe
from ..run_dir import Run, RunDir
from ..stage import find
from . import host_optimizer, precision
from .divergence import SpikeDetector
from .lane_loader import load_lane_steps
from .lane_memory import LaneMemory
from .loader import Loader, load_steps
from .loss_scale import LossScale
from .node_timings import NodeTimings
from .optim import Optimizer, SumOverRanks, build_optimizer
from .records import Records
from .saving import Saver
from .starting_weights import build_without_memory, put_starting_weights
from .stragglers import Stragglers
from .timing import StepTiming

if TYPE_CHECKING:
    from ..comm_sharded import ShardedModel

_log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far the run is; together with the tensors, all that a checkpoint has to hold."""

    step: int = 0
    """Optimizer steps taken, those skipped for non-finite numbers included."""
    position: SamplePosition = field(default_factory=SamplePosition)
    samples: int = 0
    """Samples consumed in all."""


@dataclass
class Session:
    """One rank's part of a start."""

    run: Run
    run_dir: RunDir
    comm: Comm
    layout: ParallelLayout
    """Which ranks have a whole model each, and which share one."""
    record: Architecture
    shape: Any
    module: nn.Module
    model: ParallelModel
    optimizer: Optimizer
    masters: dict[str, Tensor]
    """The fp32 weights that half ones of these names in the module are copies of; empty in most precisions."""
    loss_scale: LossScale | None
    """Where the products are fp16."""
    divergence: SpikeDetector
    forward: precision.Context
    corpus: Corpus
    validation: Corpus | None
    """The held-out split; None when the recipe measures no validation loss or the corpus has none."""
    saver: Saver
    records: Records | None
    """On rank 0 only."""
    peak_flops: float | None
    """Of all ranks' GPUs together in this precision, per second; None when the machine profile does not say."""
    timing: StepTiming
    node_timings: NodeTimings = field(default_factory=NodeTimings)
    """Whatever is put there goes nowhere until the stage gives it a file."""
    progress: Progress = field(default_factory=Progress)
    last_saved: int = 0
    """Newest step in a checkpoint, or on its way into one."""
    failed_at: int | None = None
    """The step at which non-finite numbers last made the run go back to a checkpoint."""
    memory: LaneMemory = field(default_factory=LaneMemory)
    """Of this rank's lanes; stays empty for models without."""
    stragglers: Stragglers = field(default_factory=Stragglers)

    @property
    def data_rank(self) -> int:
        """Which share of every step this rank works on; the same for all of a tensor group."""
        return self.layout.data_rank(self.comm.rank)

    @property
    def counts(self) -> bool:
        """Whether what this rank has counted of its share is added up: of a tensor group, one rank's is."""
        return self.layout.tensor_index(self.comm.rank) == 0

    def open_loader(self) -> Loader:
        """The steps from here on."""
        return Loader(
            self.corpus,
            self.run.recipe,
            self.record.vocabulary,
            rank=self.data_rank,
            world_size=self.layout.num_data_ranks,
            position=self.progress.position,
            step=self.progress.step,
            pin_memory=self.comm.device.type == "cuda",
            load=load_lane_steps if self.record.lanes else load_steps,
        )


def read_corpus_index(run: Run) -> Index:
    """The index of the run's corpus. Raises IdentityError when the corpus is not that of run.json."""
    index = read_index(run.corpus)
    if index.sha256 != run.corpus_sha256:
        raise IdentityError(f"the corpus {run.corpus} has changed since the run was made: its index had SHA-256 {run.corpus_sha256}, it now has {index.sha256}")
    return index


def open_session(run: Run, run_dir: RunDir, comm: Comm, *, index: Index, start_id: str, records: Records | None) -> Session:
    """Build everything, with starting weights; `index` is the corpus where this node reads it. Collective."""
    recipe = run.recipe
    record = architecture.get(recipe.architecture.name)
    shape = record.size(recipe.architecture.size).shape
    layout = layout_on(recipe.parallel, run.machine, comm.world_size)
    # What is cut never has memory as a whole: it may have no room.
    module = _whole(record, shape, recipe, comm) if layout.is_plain else build_without_memory(record, shape)
    module.train()
    module.recompute_every = recipe.memory.recompute_every
    forward = precision.forward_context(recipe.precision, comm.device)
    masters = precision.lower_weights(module, recipe.precision)
    timing = StepTiming(comm.device)
    model: ParallelModel
    if layout.is_plain:
        model = comm.parallel(module, recipe.parallel.bucket_mib)
        forward = around(forward, recipe.memory, module.parameters())
    else:
        model = _sharded(comm, module, layout, record)
        masters = precision.cut_masters(masters, module)
        check_same(comm, "the parameters", put_starting_weights(module, masters, record, shape, recipe.seed))
        forward = model.around(around(forward, recipe.memory, _weights(model, recipe)))
    if host_optimizer.moves(recipe, comm.device):
        masters = host_optimizer.on_host(masters)
    return Session(
        run=run,
        run_dir=run_dir,
        comm=comm,
        layout=layout,
        record=record,
        shape=shape,
        module=module,
        model=model,
        optimizer=_optimizer(module, masters, recipe, timing.timed("exposed_comm", comm.all_reduce_sum)),
        masters=masters,
        loss_scale=LossScale(recipe.loss_scaling) if LEVELS[recipe.precision].scales_loss else None,
        divergence=SpikeDetector(recipe.divergence),
        forward=forward,
        corpus=Corpus(index, "train"),
        validation=_held_out(run, Corpus(index, "validation")) if "validation" in index.splits else None,
        saver=Saver(run_dir, comm, recipe.checkpoint, start_id=start_id),
        records=records,
        peak_flops=_peak_flops(run, comm),
        timing=timing,
    )


def _whole(record: Architecture, shape: Any, recipe: Recipe, comm: Comm) -> Any:
    """The modules with the starting weights, on the device."""
    module = find(record.build)(shape)
    module.initialise(recipe.seed)
    return module.to(comm.device)


def _sharded(comm: Comm, module: nn.Module, layout: ParallelLayout, record: Architecture) -> ShardedModel:
    if comm.name != "torch":
        raise ConfigError(f"a model is cut over ranks of torch.distributed only; these talk over {comm.name}: set parallel.comm = 'torch'")
    # Found by name: it imports much that whole models need not wait for.
    model: ShardedModel = find("prottrans_hpc.comm_sharded:shard")(comm, module, layout, record.tensor_parallel.split if record.tensor_parallel else {})
    return model


def _weights(model: ShardedModel, recipe: Recipe) -> Parameters:
    """Those of a sharded model, and from its first forward pass on those that are brought together."""
    weights = Parameters(model.module.parameters())
    if saves_otherwise(recipe.memory):
        model.when_gathered(weights.add)
    return weights


def _optimizer(module: nn.Module, masters: dict[str, Tensor], chosen: Recipe, sum_over_ranks: SumOverRanks) -> Optimizer:
    if host_optimizer.moves(chosen, next(module.parameters()).device):
        return host_optimizer.build_host_optimizer(module, masters, chosen, sum_over_ranks)
    if LEVELS[chosen.precision].weights == "fp32":
        return build_optimizer(module.named_parameters(), chosen.optimizer, sum_over_ranks)
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    return precision.HalfWeights(trained, masters, lambda parameters: build_optimizer(parameters.items(), chosen.optimizer, sum_over_ranks))


def _held_out(run: Run, corpus: Corpus) -> Corpus | None:
    if not run.recipe.validation.every_steps:
        return None
    if not corpus.num_sequences:
        _log.info("no validation loss is measured: the corpus has no validation split (preprocess --validation makes one)")
        return None
    return corpus


def _peak_flops(run: Run, comm: Comm) -> float | None:
    gpu = run.machine.node.gpu
    products = LEVELS[run.recipe.precision].products
    if gpu is None or comm.device.type != "cuda" or products not in gpu.peak_tflops:
        return None
    return gpu.peak_tflops[products] * 1e12 * comm.world_size * max(1, run.allocation.gpus_per_rank)
