"""ProtAlbert on packed input: one layer applied again and again, and its arithmetic is that of its record."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from prottrans_hpc import architecture
from prottrans_hpc.architectures.prot_albert import activation_bytes, flops, num_parameters
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.models.prot_albert import build
from prottrans_hpc.recipe_objectives import Masked

RECORD = architecture.get("prot_albert")
TINY = RECORD.size("tiny").shape


@pytest.fixture
def model(strengthen):
    return strengthen(build(TINY))


@pytest.mark.parametrize("size", RECORD.sizes)
@pytest.mark.parametrize("has_pooler", [True, False])
def test_the_arithmetic_of_parameters_is_that_of_the_modules(size, has_pooler):
    shape = dataclasses.replace(RECORD.size(size).shape, has_pooler=has_pooler)
    with torch.device("meta"):
        built = build(shape)
    assert sum(parameter.numel() for parameter in built.parameters()) == num_parameters(shape)


def test_the_layer_is_there_once_and_learns_from_each_application(model, corrupted):
    batch = corrupted(RECORD, Masked(), [0, 1, 2], max_residues=50)
    assert sum(name.endswith("query.weight") for name in model.state_dict()) == 1
    deeper = build(dataclasses.replace(TINY, num_layers=3))
    deeper.load_state_dict(model.state_dict())
    gradients = []
    for one in (model, deeper):
        one(batch).loss.backward()
        gradients.append(one.layer.query.weight.grad)
    assert not torch.allclose(*gradients)
    # The gradient is the sum over what two layers with equal weights of their own would get.
    twins = [dataclasses.replace(TINY, num_layers=1)] * 2
    first, second = (build(shape) for shape in twins)
    for one in (first, second):
        one.load_state_dict(model.state_dict())
    second.embeddings, second.project, second.head = first.embeddings, first.project, first.head
    attend, hidden = _attend(first, batch)
    hidden = second.layer(first.layer(hidden, attend, hidden.dtype), attend, hidden.dtype)
    logits = first.logits(hidden[batch.target_positions])
    torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum").backward()
    wanted = first.layer.query.weight.grad + second.layer.query.weight.grad
    assert (gradients[0] - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def _attend(model, batch):
    from prottrans_hpc.models import attention

    hidden = model.project(model.embeddings(batch.tokens, batch.positions))
    return attention.prepare(batch.cu_seqlens, batch.max_length, dtype=hidden.dtype), hidden


def test_the_pooler_is_left_alone(model, corrupted):
    model(corrupted(RECORD, Masked(), [0], max_residues=50)).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == {"pooler.weight", "pooler.bias"}


def test_bf16_autocast_trains_with_the_loss_of_fp32(model, corrupted):
    batch = corrupted(RECORD, Masked(), list(range(6)), max_residues=100)
    exact = model(batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(batch).loss
        assert model.hidden(batch).dtype == torch.float32, "sums run on in fp32"
    assert abs(narrow - exact) <= 0.01 * exact


def test_a_sequence_longer_than_the_position_table_is_refused(corrupted):
    short = build(dataclasses.replace(TINY, max_positions=51))
    short.initialise(1)
    with pytest.raises(ConfigError, match=r"52 tokens.* has 51 positions"):
        short.hidden(corrupted(RECORD, Masked(), [0], max_residues=50))


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_flops_are_those_that_torch_counts(size, strengthen, corrupted):
    built = strengthen(build(RECORD.size(size).shape))
    built.backend = "dense"
    batch = corrupted(RECORD, Masked(), [0], max_residues=200)
    length = len(batch.tokens)
    num_targets = round(0.15 * length)  # the record counts the head for 15 % of the tokens, whatever the batch
    batch = dataclasses.replace(batch, target_positions=torch.arange(num_targets), targets=torch.full((num_targets,), 7))
    with FlopCounterMode(display=False) as counter:
        built(batch).loss.backward()
    assert counter.get_total_flops() == pytest.approx(flops(built.shape, [length]), rel=1e-3)


@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activation_bytes_are_those_of_the_saved_tensors_to_two_percent(size, precision, strengthen, corrupted, saved_bytes):
    built = strengthen(build(RECORD.size(size).shape))
    batch = corrupted(RECORD, Masked(), list(range(6)), max_residues=200)
    measured = saved_bytes(built, batch, precision)
    assert activation_bytes(built.shape, batch.cu_seqlens.diff().tolist(), precision) == pytest.approx(measured, rel=0.02)
