"""ProtBert on packed input: what must not matter does not matter, and its arithmetic is that of its record."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from prottrans_hpc import architecture
from prottrans_hpc.architectures.prot_bert import activation_bytes, flops, num_parameters
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.models.prot_bert import build

RECORD = architecture.get("prot_bert")


def gradients(model):
    found = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None for gradient in found), "a trained parameter is not connected to the loss"
    return torch.cat([gradient.flatten() for gradient in found])


def loss_and_gradients(model, batch):
    model.zero_grad()
    result = model(batch)
    result.loss.backward()
    return result.loss.detach(), gradients(model)


@pytest.mark.parametrize("size", RECORD.sizes)
@pytest.mark.parametrize("heads", [True, False])
def test_the_arithmetic_of_parameters_is_that_of_the_modules(size, heads):
    shape = dataclasses.replace(RECORD.size(size).shape, has_pooler=heads, has_next_sentence=heads)
    with torch.device("meta"):
        model = build(shape)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters(shape)


@pytest.mark.parametrize("size", ["prot_bert", "prot_bert_bfd"])
def test_the_published_models_have_420_984_864_parameters(size):
    with torch.device("meta"):
        model = build(RECORD.size(size).shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == 420_984_864


def test_the_same_seed_draws_the_same_weights_whatever_was_drawn_before():
    shape = RECORD.size("tiny").shape
    models = [build(shape) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.rand(17)
        model.initialise(seed)
    first, again, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    tables = torch.cat([p.flatten() for p in models[0].parameters() if p.ndim > 1])
    assert abs(tables.std().item() - 0.02) < 2e-4
    assert abs(tables.mean().item()) < 2e-4
    assert not any(parameter.any() for name, parameter in models[0].named_parameters() if name.endswith("bias"))
    assert all((parameter == 1).all() for name, parameter in models[0].named_parameters() if name.endswith("norm.weight"))


def test_the_loss_is_the_sum_over_targets_and_knows_the_right_ones(model, pack, proteins):
    batch = pack(proteins[:5])
    result = model(batch)
    logits = model.logits(model.hidden(batch))[batch.target_positions]
    wanted = -torch.log_softmax(logits, dim=-1)[torch.arange(len(batch.targets)), batch.targets].sum()
    assert torch.allclose(result.loss, wanted, rtol=1e-6)
    assert result.num_correct == (logits.argmax(-1) == batch.targets).sum()
    assert result.loss.dtype == torch.float32


def test_packed_is_the_same_as_one_by_one(model, pack, proteins):
    chosen = proteins[:12]
    together, loss, summed = *loss_and_gradients(model, pack(chosen)), 0.0
    hidden = model.hidden(pack(chosen))
    alone, gradient = [], torch.zeros_like(loss)
    for protein in chosen:
        one_loss, one_gradient = loss_and_gradients(model, pack([protein]))
        summed, gradient = summed + one_loss, gradient + one_gradient
        alone.append(model.hidden(pack([protein])))
    assert (hidden - torch.cat(alone)).abs().max() <= 1e-5
    assert abs(together - summed) <= 1e-6 * summed
    assert (loss - gradient).abs().max() <= 1e-5 * gradient.abs().max()


def test_permuting_the_sequences_permutes_the_output(model, pack, proteins):
    chosen = proteins[20:28]
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(3)).tolist()
    lengths = [len(protein) + 2 for protein in chosen]
    plain = model.hidden(pack(chosen)).split(lengths)
    permuted = model.hidden(pack([chosen[i] for i in order])).split([lengths[i] for i in order])
    for place, i in enumerate(order):
        assert (permuted[place] - plain[i]).abs().max() <= 1e-5


def test_a_sequence_does_not_depend_on_its_batch_mates(model, pack, proteins):
    chosen = proteins[40]
    companies = [model.hidden(pack([chosen, *mates]))[: len(chosen) + 2] for mates in ([], proteins[:3], proteins[3:30])]
    assert all((hidden - companies[0]).abs().max() <= 1e-5 for hidden in companies[1:])


def test_what_is_masked_reaches_the_output(model, pack, proteins):
    """The invariances above would also hold for a model that ignores its input."""
    masked, clean = model.hidden(pack(proteins[:1])), model.hidden(pack(proteins[:1], masked=False))
    assert ((masked - clean).abs().amax(dim=-1) > 0.01).all(), "attention carries a change to every residue"


@pytest.mark.parametrize("case", ["no sequence", "no target"])
@pytest.mark.parametrize("bf16", [False, True])
def test_an_empty_batch_gives_zero_loss_connected_to_every_trained_parameter(model, pack, proteins, case, bf16):
    batch = pack([]) if case == "no sequence" else pack(proteins[:2], masked=False)
    with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
        result = model(batch)
        result.loss.backward()
    assert result.loss == 0.0
    assert result.num_correct == 0
    assert not gradients(model).any()


def test_heads_that_masked_training_cannot_train_are_left_alone(model, pack, proteins):
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"pooler.weight", "pooler.bias", "next_sentence.weight", "next_sentence.bias"}
    model(pack(proteins[:2])).loss.backward()
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name in frozen)
    assert frozen <= model.state_dict().keys()


def test_bf16_autocast_trains_with_the_loss_of_fp32(pack, proteins, make_model):
    model = make_model("tiny", num_heads=4)
    exact, gradient = loss_and_gradients(model, pack(proteins[:6]))
    with torch.autocast("cpu", torch.bfloat16):
        narrow, narrow_gradient = loss_and_gradients(model, pack(proteins[:6]))
    assert abs(narrow - exact) <= 0.01 * exact
    assert torch.nn.functional.cosine_similarity(narrow_gradient, gradient, dim=0) > 0.99


def test_a_sequence_longer_than_the_position_table_is_refused(make_model, pack, proteins):
    longest = max(proteins[:50], key=len)
    model = make_model("tiny", max_positions=len(longest) + 1)
    with pytest.raises(ConfigError, match=f"{len(longest) + 2} tokens.* has {len(longest) + 1} positions"):
        model.hidden(pack([longest]))
    assert make_model("tiny", max_positions=len(longest) + 2).hidden(pack([longest])).shape == (len(longest) + 2, 64)


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_flops_are_those_that_torch_counts(size, make_model, pack, proteins):
    """With the plain products, whose backward pass torch counts without a fused kernel's own conventions."""
    model = make_model(size)
    model.backend = "dense"
    batch = pack(proteins[:1])
    length = len(batch.tokens)
    # The record counts the head for 15 % of the tokens, whatever the batch.
    num_targets = round(0.15 * length)
    batch = dataclasses.replace(batch, target_positions=torch.arange(num_targets), targets=torch.full((num_targets,), 7))
    with FlopCounterMode(display=False) as counter:
        model(batch).loss.backward()
    assert counter.get_total_flops() == pytest.approx(flops(model.shape, [length]), rel=1e-3)


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("narrow", [contextlib.nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["fp32", "bf16"])
def test_layers_that_are_computed_again_give_the_same_gradients_to_the_bit(every, narrow, make_model, pack, proteins):
    batch, gradients = pack(proteins[:6]), []
    for recompute_every in (0, every):
        model = make_model("tiny", num_layers=4)
        model.recompute_every = recompute_every
        with narrow():
            result = model(batch)
        result.loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad} | {"loss": result.loss.detach()})
    assert [name for name, gradient in gradients[0].items() if not torch.equal(gradient, gradients[1][name])] == []


@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activation_bytes_are_those_of_the_saved_tensors_to_two_percent(size, precision, make_model, pack, proteins):
    model = make_model(size)
    batch = pack(proteins[:10])
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {tuple(sorted(parameter.shape)) for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        cast_weight = tensor.dtype == torch.bfloat16 and tuple(sorted(tensor.shape)) in shapes
        if storage.data_ptr() not in weights and not cast_weight:
            saved.setdefault(storage.data_ptr(), tensor)
        return tensor

    narrow = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), narrow:
        result = model(batch)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    assert result.loss.requires_grad
    assert activation_bytes(model.shape, batch.cu_seqlens.diff().tolist(), precision) == pytest.approx(measured, rel=0.02)
