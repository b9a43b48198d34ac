"""From a mapped corpus to the micro batches of each optimizer step, prepared ahead of the model.

Every rank draws the whole step from the order, plans it, and gathers and corrupts its own bins only. What a
step holds is a pure function of corpus, recipe and position; the rank and the world size decide where it is
computed. How a model uses a batch does not concern this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .. import objectives
from ..architecture import Batch, Vocabulary
from ..corpus.order import SampleOrder, SamplePosition, enter_phase, next_step
from ..corpus.packing import plan_step
from ..corpus.reader import Corpus
from ..corpus.samples import Samples, whole_sequences
from ..objectives.layout import lay_out
from ..recipe import Recipe
from .prefetch import Prefetcher
from .schedule import phase_of

Int64 = npt.NDArray[np.int64]

VALIDATION_EPOCH = (1 << 32) - 1
"""The epoch that addresses the random numbers of validation: training never gets there."""


@dataclass(frozen=True)
class LaneSums:
    """What one rank's lanes read in a step, or, summed over the ranks, what all lanes do."""

    num_samples: int
    """Proteins that begin there."""
    fingerprint: int
    """Sum of 32 bits a lane."""


@dataclass(frozen=True)
class LoadedStep:
    """What one rank computes in one optimizer step."""

    step: int
    """Finished steps before this one."""
    phase: int
    """Index of the phase that the step belongs to."""
    micro_batches: tuple[Batch, ...]
    """Torch tensors on the CPU; equally many on every rank, the emptiest first."""
    lengths: Int64
    """Tokens of each of this rank's sequences, special tokens included: what FLOPs are counted from."""
    num_targets: int
    """Of this rank."""
    num_residues: int
    """Of this rank, without special tokens."""
    num_tokens: int
    """Of this rank, with special tokens."""
    samples: Samples
    """All samples of the step, over all ranks, in the order of the corpus; with lanes see `lane_sums`."""
    position_before: SamplePosition
    """Where the order stood before this step."""
    position_after: SamplePosition
    """What a checkpoint behind this step has to remember."""
    lane_sums: LaneSums | None = None
    """With lanes, where `samples` are the proteins that begin in this rank's pieces: what all ranks' together come to."""

    @property
    def begins_lanes(self) -> bool:
        """Whether these are lanes at their beginning, without anything before them."""
        return self.lane_sums is not None and self.position_before.consumed == 0

    @property
    def sample_ids(self) -> Int64:
        """Sequences of the whole global step, int64 [S]; with split sequences one may occur repeatedly."""
        return self.samples.ids


@dataclass(frozen=True)
class Share:
    """Which part of a global step is wanted."""

    rank: int
    world_size: int


Load = Callable[..., Iterator[LoadedStep]]
"""`(corpus, recipe, vocabulary, share=, position=, step=)` -> the steps of one rank."""


class Loader:
    """The steps of a run from `step` and `position` to its last one, `loading.prefetch_steps` ahead; owns its thread."""

    def __init__(
        self,
        corpus: Corpus,
        recipe: Recipe,
        vocabulary: Vocabulary,
        *,
        rank: int,
        world_size: int,
        position: SamplePosition,
        step: int,
        pin_memory: bool = False,
        load: Load | None = None,
    ) -> None:
        """`load` makes the steps: `load_steps` unless something else is given."""
        steps = (load or load_steps)(corpus, recipe, vocabulary, share=Share(rank, world_size), position=position, step=step)
        self._steps = Prefetcher(_pinned(steps) if pin_memory else steps, depth=recipe.loading.prefetch_steps, name="loader")

    @property
    def wait_s(self) -> float:
        """How long the last step was waited for."""
        return self._steps.wait_s

    def __iter__(self) -> Iterator[LoadedStep]:
        return self

    def __next__(self) -> LoadedStep:
        return next(self._steps)

    def close(self) -> None:
        """Stop loading; steps that were prepared are dropped. May be called twice."""
        self._steps.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load_steps(corpus: Corpus, recipe: Recipe, vocabulary: Vocabulary, *, share: Share, position: SamplePosition, step: int) -> Iterator[LoadedStep]:
    """The steps from `step` to the end of the recipe, in this thread.

    `position` counts samples under the limit of the phase that made the step before.
    """
    orders = [SampleOrder(corpus, seed=recipe.seed, order=recipe.order, max_residues=phase.max_residues) for phase in recipe.phases]
    for number in range(step, recipe.num_steps):
        index, phase, done = phase_of(recipe, number)
        if done == 0 and index > 0:
            position = enter_phase(orders[index], position, previous=orders[index - 1])
        samples, after = next_step(orders[index], position, phase)
        batches = _micro_batches(corpus, samples, recipe, vocabulary, share=share, max_residues=phase.max_residues)
        yield loaded_step(number, index, tuple(batches), samples, (position, after))
        position = after


def validation_batches(corpus: Corpus, recipe: Recipe, vocabulary: Vocabulary, *, rank: int, world_size: int, max_residues: int | None = None) -> list[Batch]:
    """This rank's share of the first `validation.max_sequences` of a validation split: the same sequences and masks each time.

    What is longer than `max_residues` (by default the longest limit of any phase, so that losses can be compared
    across phases) is cut behind it. All ranks get equally many batches; the caller sums losses and targets.
    """
    limit = max_residues or max(phase.max_residues for phase in recipe.phases)
    ids = np.arange(min(corpus.num_sequences, recipe.validation.max_sequences))
    samples = whole_sequences(ids, np.minimum(corpus.lengths_of(ids), limit), epoch=VALIDATION_EPOCH)
    return list(_micro_batches(corpus, samples, recipe, vocabulary, share=Share(rank, world_size), max_residues=limit))


def _micro_batches(corpus: Corpus, samples: Samples, recipe: Recipe, vocabulary: Vocabulary, *, share: Share, max_residues: int) -> Iterator[Batch]:
    plan = plan_step(samples.lengths, bin_residues=max(recipe.loading.bin_residues, max_residues), num_ranks=share.world_size)
    objective = objectives.get(recipe.objective.name)
    for members in plan.bins_of(share.rank):
        yield to_tensors(objective(lay_out(corpus, samples.take(members), vocabulary), recipe.objective, recipe.seed))


def to_tensors(batch: Batch) -> Batch:
    """The arrays of an objective as torch tensors over the same memory."""
    return _replaced(batch, np.ndarray, torch.from_numpy)


def _replaced(batch: Batch, kind: type, change: Callable[[Any], Any]) -> Batch:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, kind)}
    return replace(batch, **changed)


def loaded_step(
    step: int, phase: int, batches: tuple[Batch, ...], samples: Samples, positions: tuple[SamplePosition, SamplePosition], lane_sums: LaneSums | None = None
) -> LoadedStep:
    """Count what the micro batches of one rank hold; `positions` are before and after the step."""
    lengths = np.concatenate([np.diff(batch.cu_seqlens.numpy()).astype(np.int64) for batch in batches])
    return LoadedStep(
        step=step,
        phase=phase,
        micro_batches=batches,
        lengths=lengths,
        num_targets=sum(len(batch.targets) for batch in batches),
        num_residues=sum(batch.num_residues for batch in batches),
        num_tokens=int(lengths.sum()),
        samples=samples,
        position_before=positions[0],
        position_after=positions[1],
        lane_sums=lane_sums,
    )


def _pinned(steps: Iterator[LoadedStep]) -> Iterator[LoadedStep]:
    """With the tensors in page-locked memory, from which a copy to a GPU runs beside its work."""
    for loaded in steps:
        yield replace(loaded, micro_batches=tuple(_replaced(batch, torch.Tensor, torch.Tensor.pin_memory) for batch in loaded.micro_batches))
