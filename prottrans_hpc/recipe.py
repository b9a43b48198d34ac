"""The recipe: the science of a run, as a human writes it in ``jobs/*.toml``.

A recipe never mentions hardware; a machine profile never mentions science; only the planner knows both.
Sizes are per step and count sequences; a residue is a token, special tokens are not counted.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from . import config, precision_levels, recipe_memory
from .config import STRICT, Count, Fraction, Natural, Positive
from .errors import ConfigError
from .recipe_health import Health
from .recipe_memory import Memory
from .recipe_objectives import Masked, Objective
from .recipe_optimizers import Optimizer
from .recipe_parallel import Parallel, lossy


@dataclass(frozen=True, config=STRICT)
class ArchitectureChoice:
    """Which registered architecture is trained, at which of its sizes."""

    name: str
    """A registered architecture: `prottrans models` lists them."""
    size: str
    """One of its sizes: `prottrans models show NAME` lists them."""


@dataclass(frozen=True, config=STRICT)
class Phase:
    """A stretch of training with its own sequence limit and batch (the papers: 512, then 2,048 residues)."""

    steps: Count
    """Optimizer steps in this phase."""
    max_residues: Count
    """Longest sequence, in residues; what is longer is handled as `order.long_sequences` says."""
    global_batch_size: Count | None = None
    """Sequences a step, over all ranks. Give this or `global_batch_residues`."""
    global_batch_residues: Count | None = None
    """Residues a step, over all ranks: a step takes sequences, in order, until the next would exceed it."""
    warmup_steps: Natural = 0
    """Steps over which the learning rate rises linearly from 0 at the start of this phase."""
    warmup_epochs: Positive | None = None
    """The same in epochs of the corpus, instead of `warmup_steps`; a run has the steps that they come to."""
    learning_rate: Positive | None = None
    """Peak learning rate of this phase, if not the optimizer's."""
    decay_steps: Count | None = None
    """Steps of this phase, warm-up included, after which a linear or cosine decay is over, if not all: the rest stays at its end."""
    optimizer_state: Literal["carry", "reset"] = "carry"
    """Whether this phase goes on with the moments of the one before it, or begins with none."""

    def __post_init__(self) -> None:
        if (self.global_batch_size is None) == (self.global_batch_residues is None):
            raise ValueError("give either global_batch_size or global_batch_residues, not both and not neither")
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} exceeds steps {self.steps}")
        if self.decay_steps is not None and not self.warmup_steps < self.decay_steps <= self.steps:
            raise ValueError(f"decay_steps {self.decay_steps} must be more than warmup_steps {self.warmup_steps} and at most steps {self.steps}")
        if self.warmup_steps and self.warmup_epochs is not None:
            raise ValueError("give either warmup_steps or warmup_epochs, not both")


@dataclass(frozen=True, config=STRICT)
class Schedule:
    """How the learning rate goes over a phase: its warm-up, then its decay."""

    decay: Literal["linear", "inverse_square_root", "cosine", "constant", "exponential_rise"] = "linear"
    final_fraction: Fraction = 0.0
    """Linear and cosine end a phase at this fraction of the peak."""
    first_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-4
    """An exponential rise, the learning rate range test, begins at this fraction of the peak and ends at the peak."""
    warmup: Literal["linear", "constant"] = "linear"
    """During warm-up the rate rises from 0, or is at its peak already and only falls after it (T5's)."""


@dataclass(frozen=True, config=STRICT)
class Order:
    """The order of samples: a pure function of corpus, seed and epoch."""

    long_sequences: Literal["crop", "split"] = "crop"
    """A sequence over the phase's limit: a random window of it, or all its consecutive fragments as samples. Lanes read it whole."""
    block_sequences: Count = 64
    """Consecutive sequences that stay together when blocks are shuffled (sequential reads from disk)."""
    window_blocks: Count = 512
    """Blocks within which single sequences are shuffled again."""


@dataclass(frozen=True, config=STRICT)
class Loading:
    """How batches reach the model; none of it changes which sequences a step sees."""

    bin_residues: Count = 16384
    """Residues of one packed micro batch; raised to the phase's `max_residues` where that is larger."""
    prefetch_steps: Count = 2
    """Steps prepared ahead in the background."""
    uneven_lanes: bool = False
    """Of models with lanes: where the ranks do not divide them, some ranks have one more, and the others wait for them."""


@dataclass(frozen=True, config=STRICT)
class Checkpointing:
    """When training state is saved, and what is kept."""

    every_steps: Count
    keep_last: Count = 3
    keep_every_steps: Natural = 0
    """Checkpoints at multiples of this many steps are kept for ever; 0 keeps none."""
    lane_memory: Literal["saved", "dropped"] = "saved"
    """Of models with lanes. Dropped, checkpoints are smaller, and a resumed run goes on with empty memories: not bitwise as an unbroken one."""


@dataclass(frozen=True, config=STRICT)
class Validation:
    """When the loss on the held-out split is measured."""

    every_steps: Natural = 0
    """0: never."""
    max_sequences: Count = 1024
    """The first so many of the validation split, in a fixed order with fixed masks."""


@dataclass(frozen=True, config=STRICT)
class Divergence:
    """When a loss counts as a spike, and what is done about it."""

    z_score: Positive = 8.0
    """Robust standard deviations above the median of the window before it."""
    window: Annotated[int, Field(ge=10)] = 200
    """Steps; nothing is a spike before so many were taken."""
    patience: Count = 3
    """So many steps in a row must be as high."""
    action: Literal["log", "rollback"] = "log"
    """Tell, or go back to the last checkpoint before it and on with a lower learning rate."""
    rate_factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """What each rollback multiplies the learning rate by, for all steps that follow."""
    max_rollbacks: Count = 4
    """One more ends the run."""


@dataclass(frozen=True, config=STRICT)
class LossScaling:
    """How the loss is scaled before the backward pass, in the precisions whose products are fp16; others ignore it."""

    initial: Positive = 65536.0
    """Of the mean loss; a power of two."""
    growth_every: Count = 2000
    """The scale doubles after so many steps without overflow."""
    floor: Positive = 1.0
    """An overflow halves the scale and skips the step; at this scale it counts as non-finite numbers. A power of two."""

    def __post_init__(self) -> None:
        for name in ("initial", "floor"):
            if math.frexp(getattr(self, name))[0] != 0.5:
                raise ValueError(f"{name} must be a power of two, so that scaling rounds nothing")
        if self.floor > self.initial:
            raise ValueError(f"floor {self.floor} exceeds initial {self.initial}")


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """Everything that defines a training run apart from its hardware and its corpus."""

    description: str
    architecture: ArchitectureChoice
    phases: tuple[Phase, ...]
    optimizer: Optimizer
    checkpoint: Checkpointing
    objective: Objective = Masked()
    schedule: Schedule = Schedule()
    order: Order = Order()
    loading: Loading = Loading()
    parallel: Parallel = Parallel()
    validation: Validation = Validation()
    precision: precision_levels.Name = "fp32"
    """Of weights, products and updates: docs/pretrain.md has a table of the names."""
    loss_scaling: LossScaling = LossScaling()
    divergence: Divergence = Divergence()
    memory: Memory = Memory()
    health: Health = Health()
    seed: Natural = 42
    non_finite_limit: Count = 3
    """So many steps in a row with a non-finite loss or gradient trigger the rollback."""

    def __post_init__(self) -> None:
        if not self.phases:
            raise ValueError("a recipe needs at least one [[phases]]")
        level = precision_levels.LEVELS[self.precision]
        if self.parallel.compression == "powersgd" and (level.weights != "fp32" or level.scales_loss):
            raise ValueError(f"parallel.compression powersgd takes fp32 gradients of one scale in all steps, which precision {self.precision} has not")
        if self.parallel.comm == "horovod" and level.weights == "bf16":
            fitting = ", ".join(name for name, other in precision_levels.LEVELS.items() if other.products == level.products and other.weights != "bf16")
            raise ValueError(
                f"precision {self.precision} has gradients in bf16, which Horovod does not add up: take {fitting}, whose gradients are fp32 "
                "(parallel.compression = 'bf16' sends those in 16 bits), or parallel.comm = 'torch'"
            )

    @property
    def num_steps(self) -> int:
        """Optimizer steps of all phases."""
        return sum(phase.steps for phase in self.phases)


_NOT_SCIENCE = ("description", "loading", "parallel", "checkpoint", "validation", "memory", "health")


def read_recipe(name_or_path: str, settings: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe by name or path with ``--set`` applied. Raises ConfigError."""
    path = config.find_file("jobs", name_or_path)
    values = config.read_toml(path)
    if "expected" in values and "phases" not in values:
        raise ConfigError(f"{name_or_path} is a recipe for a corpus: use it with prottrans preprocess --campaign {name_or_path}")
    return config.parse(Recipe, config.with_settings(values, settings), source=str(path))


def science(recipe: Recipe) -> dict[str, Any]:
    """The fields that define the result; two runs that agree in them are the same experiment."""
    values: dict[str, Any] = config.to_json(recipe)
    return {**{key: value for key, value in values.items() if key not in _NOT_SCIENCE}, **lossy(recipe.parallel), **recipe_memory.lossy(recipe.memory)}


def recipe_from_json(values: dict[str, Any], *, source: str) -> Recipe:
    """The recipe in a run.json. Raises ConfigError when another version wrote fields that this one does not know."""
    try:
        return config.parse(Recipe, values, source=source)
    except ConfigError as error:
        raise ConfigError(f"{error}. The file was written by another version of prottrans-hpc") from error
