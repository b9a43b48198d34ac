"""ELECTRA's objective: a generator predicts masked residues, a discriminator tells which of its guesses are wrong (Clark et al. 2020).

What is drawn here is which residues are targets, which of them the generator sees masked, and one uniform number for
each target. The model turns that number into a residue by the inverse of the generator's distribution. Like BERT's
masks (see `masked`) all of it is addressed by (seed, epoch, sequence, position in the whole sequence), so that a sample
gets the same guesses from the same generator in any batch and on any rank.
"""

from __future__ import annotations

import numpy as np

from ..architecture import Batch
from ..corpus.counter_rng import WORD, Purpose, draw, threshold
from ..recipe_objectives import ReplacedToken
from .layout import Layout
from .masked import draw_targets


def corrupt(layout: Layout, settings: ReplacedToken, seed: int) -> Batch:
    """One micro batch (numpy arrays) with `settings.fraction` of the residues as targets of the generator."""
    samples, vocabulary = layout.samples, layout.vocabulary
    which, residues = draw_targets(samples, share=settings.fraction, seed=seed)
    target_positions = layout.residue_starts[which] + residues
    targets = layout.tokens[target_positions]
    words = draw(seed, Purpose.REPLACEMENT, epochs=samples.epochs[which], sample_ids=samples.ids[which], counters=samples.starts[which] + residues)
    tokens = layout.tokens.copy()
    tokens[target_positions] = np.where(words[0] < threshold(settings.mask_share), vocabulary.index(vocabulary.mask), targets)
    return Batch(
        tokens=tokens,
        positions=layout.positions,
        cu_seqlens=layout.cu_seqlens,
        target_positions=target_positions,
        targets=targets,
        sample_ids=samples.ids,
        max_length=layout.max_length,
        num_residues=layout.num_residues,
        draws=(words[1] + 0.5) / WORD,
        loss_weights=(1.0, settings.discriminator_weight),
    )
