"""The steps of a model with lanes: each rank reads the next pieces of its own lanes, and those alone.

Which lanes a rank has depends on the world size, what a lane reads does not. No rank knows all samples of a step;
what metrics say about them is summed over the ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from .. import objectives
from ..architecture import Batch, Vocabulary
from ..corpus.lanes import LaneOrder, Pieces, enter_phase, own_lanes
from ..corpus.order import SamplePosition
from ..corpus.reader import Corpus
from ..corpus.samples import whole_sequences
from ..errors import ConfigError
from ..objectives.lane_layout import lay_out_lanes
from ..recipe import Phase, Recipe
from .loader import LaneSums, LoadedStep, Share, loaded_step, to_tensors
from .schedule import phase_of

Int64 = npt.NDArray[np.int64]


def load_lane_steps(corpus: Corpus, recipe: Recipe, vocabulary: Vocabulary, *, share: Share, position: SamplePosition, step: int) -> Iterator[LoadedStep]:
    """The steps from `step` to the end of the recipe, in this thread; `position` counts steps of the epoch.

    Raises ConfigError when the lanes cannot be shared out over the ranks as the recipe wants, DataError when the corpus has too little text for them.
    """
    orders = [_order_of(corpus, recipe, phase, vocabulary) for phase in recipe.phases]
    for number in range(step, recipe.num_steps):
        index, phase, done = phase_of(recipe, number)
        if done == 0 and index > 0:
            position = enter_phase(orders[index], position, previous=orders[index - 1])
        pieces = [orders[index].pieces(position, some) for some in split_lanes(recipe, phase, share)]
        batches = tuple(_batch(corpus, some, recipe, vocabulary) for some in pieces)
        begun = [np.flatnonzero(some.offsets == 0) for some in pieces]
        ids = np.concatenate([some.ids[which] for some, which in zip(pieces, begun, strict=True)])
        lengths = np.concatenate([some.lengths[which] for some, which in zip(pieces, begun, strict=True)])
        samples = whole_sequences(ids, lengths, epoch=position.epoch)
        after = orders[index].behind(position)
        sums = LaneSums(len(samples), sum(map(_fingerprint, pieces)))
        yield loaded_step(number, index, batches, samples, (position, after), lane_sums=sums)
        position = after


def split_lanes(recipe: Recipe, phase: Phase, share: Share) -> list[Int64]:
    """A rank's lanes by micro batch: as many together as `loading.bin_residues` holds pieces, evenly; equally many micro batches on every rank,
    of which some may be empty. Raises ConfigError when the ranks do not divide the lanes and the recipe wants them to.
    """
    assert phase.global_batch_size is not None
    fewest, rest = divmod(phase.global_batch_size, share.world_size)
    if rest and not recipe.loading.uneven_lanes:
        raise ConfigError(
            f"{phase.global_batch_size} lanes (global_batch_size) cannot be shared out evenly over {share.world_size} ranks: each lane stays on one rank "
            "(loading.uneven_lanes = true gives some ranks one more)"
        )
    at_once = max(1, recipe.loading.bin_residues // phase.max_residues)
    num_micro_batches = max(1, -(-(fewest + bool(rest)) // at_once))
    return np.array_split(np.array(own_lanes(phase.global_batch_size, share.rank, share.world_size), np.int64), num_micro_batches)


def _order_of(corpus: Corpus, recipe: Recipe, phase: Phase, vocabulary: Vocabulary) -> LaneOrder:
    if phase.global_batch_size is None:
        raise ConfigError("a model with lanes needs phases.N.global_batch_size, the number of lanes, not global_batch_residues")
    return LaneOrder(
        corpus,
        seed=recipe.seed,
        order=recipe.order,
        num_lanes=phase.global_batch_size,
        piece_tokens=phase.max_residues,
        num_specials=len(vocabulary.prefix) + len(vocabulary.suffix),
    )


def _batch(corpus: Corpus, pieces: Pieces, recipe: Recipe, vocabulary: Vocabulary) -> Batch:
    is_reversed = getattr(recipe.objective, "direction", "forward") == "reverse"
    objective = objectives.get(recipe.objective.name)
    batch = to_tensors(objective(lay_out_lanes(corpus, pieces, vocabulary, is_reversed=is_reversed), recipe.objective, recipe.seed))
    # One without lanes has nothing to remember: to a model it is an empty batch of any kind.
    return batch if len(pieces.lanes) else replace(batch, lanes=None, documents=None, carried=None)


def _fingerprint(pieces: Pieces) -> int:
    """The sum of 32 bits a lane that tell what it reads: with 65,536 lanes still exact in the fp64 of the status."""
    rows = np.stack([pieces.lanes[pieces.piece_of], pieces.starts[pieces.piece_of], pieces.ids, pieces.offsets], axis=1)
    borders = np.searchsorted(pieces.piece_of, np.arange(len(pieces.lanes) + 1))
    return sum(zlib.crc32(rows[begin:end].tobytes()) for begin, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True))
