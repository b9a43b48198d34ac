"""BERT's objective: predict corrupted residues from both sides (Devlin et al. 2019, section 3.1).

Each residue is a target by a draw of its own, addressed by (seed, epoch, sequence, position in the whole
sequence): a sample gets the same mask in any batch and on any rank, fragments of one sequence get independent
ones, and a residue's fate does not depend on where a crop begins. Special tokens are neither corrupted nor
predicted.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..architecture import Batch
from ..corpus.counter_rng import Purpose, below, draw, threshold
from ..corpus.samples import Samples
from ..recipe_objectives import Masked
from .layout import Layout

Int64 = npt.NDArray[np.int64]


def corrupt(layout: Layout, settings: Masked, seed: int) -> Batch:
    """One micro batch (numpy arrays) with `settings.fraction` of the residues as targets."""
    samples, vocabulary = layout.samples, layout.vocabulary
    which, residues = draw_targets(samples, share=settings.fraction, seed=seed)
    target_positions = layout.residue_starts[which] + residues
    targets = layout.tokens[target_positions]
    words = draw(seed, Purpose.REPLACEMENT, epochs=samples.epochs[which], sample_ids=samples.ids[which], counters=samples.starts[which] + residues)
    standard = np.array(vocabulary.residue_ids(), np.int64)
    replaced = np.where(words[0] < threshold(settings.mask_share + settings.random_share), standard[below(words[1], len(standard))], targets)
    tokens = layout.tokens.copy()
    tokens[target_positions] = np.where(words[0] < threshold(settings.mask_share), vocabulary.index(vocabulary.mask), replaced)
    return Batch(
        tokens=tokens,
        positions=layout.positions,
        cu_seqlens=layout.cu_seqlens,
        target_positions=target_positions,
        targets=targets,
        sample_ids=samples.ids,
        max_length=layout.max_length,
        num_residues=layout.num_residues,
    )


def draw_targets(samples: Samples, *, share: float, seed: int) -> tuple[Int64, Int64]:
    """Which residues are targets: for each the number of its sample and its place within the sample, in order.

    One Philox block decides about four neighbouring positions of the whole sequence.
    """
    first = samples.starts >> 2
    num_blocks = ((samples.starts + samples.lengths + 3) >> 2) - first
    num_blocks[samples.lengths == 0] = 0
    of_sample = np.repeat(np.arange(len(samples)), num_blocks)
    blocks = np.arange(len(of_sample)) + np.repeat(first - (np.cumsum(num_blocks) - num_blocks), num_blocks)
    words = draw(seed, Purpose.TARGETS, epochs=samples.epochs[of_sample], sample_ids=samples.ids[of_sample], counters=blocks)
    hits = np.flatnonzero((words < threshold(share)).T)
    which = of_sample[hits >> 2]
    residues = blocks[hits >> 2] * 4 + (hits & 3) - samples.starts[which]
    inside = np.flatnonzero((residues >= 0) & (residues < samples.lengths[which]))
    return which[inside], residues[inside]
