"""Every architecture computes in every half precision: the loss of a packed batch of real proteins beside that of fp32."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from prottrans_hpc import architecture, config, objectives
from prottrans_hpc.corpus.index import read_index
from prottrans_hpc.corpus.reader import Corpus
from prottrans_hpc.corpus.samples import whole_sequences
from prottrans_hpc.objectives.layout import lay_out
from prottrans_hpc.precision_levels import LEVELS
from prottrans_hpc.recipe import read_recipe
from prottrans_hpc.stage import find
from prottrans_hpc.train.loader import to_tensors
from prottrans_hpc.train.precision import forward_context, lower_weights

TWINS = [name for name in config.shipped_names("jobs") if name.startswith("tiny_")]
HALF = [name for name, level in LEVELS.items() if level.is_half]


@pytest.fixture(scope="module", params=TWINS)
def fresh(request, small_corpus):
    recipe = read_recipe(request.param)
    record = architecture.get(recipe.architecture.name)
    module = find(record.build)(record.size(recipe.architecture.size).shape)
    module.initialise(7)
    corpus = Corpus(read_index(small_corpus), "train")

    def batch(count):
        rows = np.arange(count, dtype=np.int64)
        samples = whole_sequences(rows, np.minimum(corpus.lengths_of(rows), 60), epoch=0)
        objective = objectives.get(recipe.objective.name)
        return replace(to_tensors(objective(lay_out(corpus, samples, record.vocabulary), recipe.objective, 5)), tokens_per_target=4.0)

    return module, batch, module(batch(8)).loss.item()


@pytest.mark.parametrize("precision", HALF)
def test_its_loss_is_that_of_fp32_to_two_percent(fresh, precision):
    made, batch, expected = fresh
    module = copy.deepcopy(made)
    lower_weights(module, precision)
    forward = forward_context(precision, torch.device("cpu"))
    for count in (8, 0):
        module.zero_grad()
        with forward():
            loss = module(batch(count)).loss
        (loss * 2.0**-8).backward()
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected if count else 0.0, rel=2e-2)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype and parameter.grad.isfinite().all(), name
