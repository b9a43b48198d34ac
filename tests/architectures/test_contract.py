"""What every registered architecture promises, whatever it computes: packing, company, recomputation and emptiness do not matter."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from prottrans_hpc import architecture, config, objectives
from prottrans_hpc.architecture import Architecture, Batch
from prottrans_hpc.corpus.index import read_index
from prottrans_hpc.corpus.reader import Corpus
from prottrans_hpc.corpus.samples import whole_sequences
from prottrans_hpc.objectives.layout import lay_out
from prottrans_hpc.recipe import Recipe, read_recipe
from prottrans_hpc.stage import find
from prottrans_hpc.train.loader import to_tensors

TWINS = [name for name in config.shipped_names("jobs") if name.startswith("tiny_")]


@dataclass(frozen=True)
class Twin:
    """The smallest size of an architecture, with weights that are far from zero, and packed batches of real proteins for it."""

    recipe: Recipe
    record: Architecture
    module: Any
    corpus: Corpus

    def batch(self, ids: list[int], *, max_residues: int = 60) -> Batch:
        """Some proteins, cut to `max_residues`, as the recipe's objective corrupts them."""
        rows = np.array(ids, np.int64)
        samples = whole_sequences(rows, np.minimum(self.corpus.lengths_of(rows), max_residues), epoch=0)
        objective = objectives.get(self.recipe.objective.name)
        made = to_tensors(objective(lay_out(self.corpus, samples, self.record.vocabulary), self.recipe.objective, 5))
        return replace(made, tokens_per_target=4.0)

    def loss_and_gradients(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        self.module.zero_grad()
        result = self.module(batch)
        result.loss.backward()
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        assert all(parameter.grad is not None for parameter in trained), "a trained parameter is not connected to the loss"
        return result.loss.detach(), torch.cat([parameter.grad.flatten() for parameter in trained])

    def hidden(self, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = self.module.hidden(batch)
        return found


@pytest.fixture(scope="module", params=TWINS)
def twin(request, small_corpus) -> Twin:
    recipe = read_recipe(request.param)
    record = architecture.get(recipe.architecture.name)
    module = find(record.build)(record.size(recipe.architecture.size).shape)
    module.initialise(7)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return Twin(recipe, record, module.eval(), Corpus(read_index(small_corpus), "train"))


def test_the_record_counts_the_parameters(twin):
    shape = twin.record.size(twin.recipe.architecture.size).shape
    assert sum(parameter.numel() for parameter in twin.module.parameters()) == twin.record.num_parameters(shape)


def test_the_same_seed_draws_the_same_weights(twin):
    shape = twin.record.size(twin.recipe.architecture.size).shape
    drawn = []
    for seed in (1, 1, 2):
        module = find(twin.record.build)(shape)
        torch.rand(seed + 3)
        module.initialise(seed)
        drawn.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert drawn[0].isfinite().all()


def test_packed_is_the_same_as_one_by_one(twin):
    ids = list(range(10))
    loss, gradient = twin.loss_and_gradients(twin.batch(ids))
    alone = [twin.loss_and_gradients(twin.batch([i])) for i in ids]
    assert abs(loss - sum(one for one, _ in alone)) <= 2e-6 * abs(loss)
    assert (gradient - torch.stack([one for _, one in alone]).sum(0)).abs().max() <= 2e-5 * gradient.abs().max()


def test_permuting_the_sequences_permutes_the_output(twin):
    ids = [3, 1, 8, 2, 30, 17]
    order = [4, 0, 5, 2, 1, 3]
    plain = twin.batch(ids)
    rows = twin.hidden(plain).split(plain.cu_seqlens.diff().tolist())
    permuted = twin.batch([ids[i] for i in order])
    for row, i in zip(twin.hidden(permuted).split(permuted.cu_seqlens.diff().tolist()), order, strict=True):
        assert (row - rows[i]).abs().max() <= 1e-5


def test_an_embedding_does_not_depend_on_its_batch_mates(twin):
    companies = [twin.hidden(twin.batch([40, *mates]))[: int(twin.batch([40]).cu_seqlens[1])] for mates in ([], [0, 1, 2], list(range(3, 30)))]
    assert all((hidden - companies[0]).abs().max() <= 1e-5 for hidden in companies[1:])


def test_what_is_read_reaches_the_output(twin):
    """The invariances above would also hold for a model that ignores its input."""
    batch = twin.batch([5])
    other = twin.hidden(replace(batch, tokens=batch.tokens.flip(0)))
    assert ((twin.hidden(batch) - other).abs().amax(dim=-1) > 1e-3).float().mean() > 0.9


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_computing_layers_again_gives_equal_gradients(twin, every, mode):
    batch = twin.batch(list(range(6)))
    found = []
    try:
        for recompute in (0, every):
            twin.module.train(mode == "train").recompute_every = recompute
            torch.manual_seed(3)  # dropout
            found.append(twin.loss_and_gradients(batch))
    finally:
        twin.module.eval().recompute_every = 0
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("bf16", [False, True])
def test_an_empty_batch_gives_zero_loss_connected_to_every_trained_parameter(twin, bf16):
    with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
        loss, gradient = twin.loss_and_gradients(twin.batch([]))
    assert loss == 0.0
    assert not gradient.any()


def test_bf16_is_close_to_fp32(twin):
    batch = twin.batch(list(range(8)))
    exact, _ = twin.loss_and_gradients(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, gradient = twin.loss_and_gradients(batch)
    assert gradient.isfinite().all()
    assert abs(exact - rounded) <= 0.05 * abs(exact)


def test_flops_and_activations_grow_with_the_input(twin):
    shape, lengths = twin.record.size(twin.recipe.architecture.size).shape, (40, 60)
    assert 0 < twin.record.flops(shape, lengths[:1]) < twin.record.flops(shape, lengths)
    for precision in ("fp32", "bf16"):
        assert 0 < twin.record.activation_bytes(shape, lengths[:1], precision) < twin.record.activation_bytes(shape, lengths, precision)
