"""XLNet on packed input and on lanes: what must not matter does not matter, and its arithmetic is that of its record."""

from __future__ import annotations

import contextlib
import dataclasses
from unittest import mock

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from prottrans_hpc import architecture
from prottrans_hpc.architectures.prot_xlnet import activation_bytes, flops, lane_bytes, num_parameters
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.models.prot_xlnet import build

RECORD = architecture.get("prot_xlnet")
LENGTH = 48
FROZEN = ("segments", "segment.bias")


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
def test_the_arithmetic_of_parameters_is_that_of_the_modules(size):
    shape = RECORD.size(size).shape
    with torch.device("meta"):
        model = build(shape)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters(shape)


def test_the_published_model_has_409_413_669_parameters():
    with torch.device("meta"):
        model = build(RECORD.size("prot_xlnet").shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == 409_413_669


def test_the_same_seed_draws_the_same_weights_whatever_was_drawn_before():
    models = [build(dataclasses.replace(RECORD.size("tiny").shape, initializer_range=0.02)) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.rand(17)
        model.initialise(seed)
    first, again, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    matrices = torch.cat([p.flatten() for p in models[0].parameters() if p.ndim > 1 and p.requires_grad])
    assert abs(matrices.std().item() - 0.02) < 2e-4
    assert all((p == 1).all() for name, p in models[0].named_parameters() if name.endswith("norm.weight"))
    assert not any(p.any() for name, p in models[0].named_parameters() if p.ndim == 1 and name.endswith("bias"))


def test_segment_terms_are_saved_at_zero_and_never_trained(make_xlnet, xlnet_pack):
    model = make_xlnet()
    frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen.keys() == {name for name in model.state_dict() if name.endswith(FROZEN)} and len(frozen) == 4
    assert not any(parameter.any() for parameter in frozen.values())
    model(xlnet_pack([0])).loss.backward()
    assert all(parameter.grad is None for parameter in frozen.values())


def test_packed_is_the_same_as_one_by_one(make_xlnet, xlnet_pack):
    model, chosen = make_xlnet(), list(range(12))
    together, gradient = loss_and_gradients(model, xlnet_pack(chosen))
    hidden = model.hidden(xlnet_pack(chosen))
    alone, loss, summed = [], 0.0, torch.zeros_like(gradient)
    for number in chosen:
        one_loss, one_gradient = loss_and_gradients(model, xlnet_pack([number]))
        loss, summed = loss + one_loss, summed + one_gradient
        alone.append(model.hidden(xlnet_pack([number])))
    assert (hidden - torch.cat(alone)).abs().max() <= 1e-5
    assert abs(together - loss) <= 1e-6 * loss
    assert (gradient - summed).abs().max() <= 1e-5 * summed.abs().max()


def test_permuting_the_sequences_permutes_the_output(make_xlnet, xlnet_pack):
    model, chosen = make_xlnet(), list(range(20, 28))
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(3)).tolist()
    batches = xlnet_pack(chosen), xlnet_pack([chosen[i] for i in order])
    plain, permuted = (model.hidden(batch).split(batch.cu_seqlens.diff().tolist()) for batch in batches)
    for place, i in enumerate(order):
        assert (permuted[place] - plain[i]).abs().max() <= 1e-5


def test_equal_lengths_run_together_and_give_the_same(make_xlnet, xlnet_lanes):
    """Lanes are one run of products; one by one they are several."""
    model = make_xlnet()
    together, gradient = loss_and_gradients(model, xlnet_lanes(0, [0, 1, 2]))
    parts = [loss_and_gradients(model, xlnet_lanes(0, [lane])) for lane in range(3)]
    assert together == pytest.approx(sum(loss for loss, _ in parts).item(), rel=1e-6)
    assert (gradient - sum(part for _, part in parts)).abs().max() <= 1e-5 * gradient.abs().max()


def test_a_target_sees_what_comes_before_it_in_the_order_and_nothing_else(make_xlnet, xlnet_pack):
    """A change of a token changes the loss of exactly the targets after it in the order."""
    model, batch = make_xlnet(), xlnet_pack([3])
    places = batch.permutation[batch.target_positions]

    def losses(tokens):
        changed = dataclasses.replace(batch, tokens=tokens)
        with mock.patch.object(functional, "cross_entropy", side_effect=functional.cross_entropy) as scored, torch.no_grad():
            model(changed)
        return functional.cross_entropy(*scored.call_args.args, reduction="none")

    base = losses(batch.tokens)
    seen_by_all = int((batch.permutation < 0).nonzero()[5])
    for position in [seen_by_all, *batch.target_positions[:8].tolist()]:
        tokens = batch.tokens.clone()
        tokens[position] = 17 + (tokens[position] - 16) % 20
        moved = (losses(tokens) - base).abs() > 1e-7
        assert torch.equal(moved, places > batch.permutation[position])


def test_the_memory_is_the_last_inputs_of_every_layer_and_is_used(make_xlnet, xlnet_lanes):
    model = make_xlnet(memory_length=64)
    memory, lanes = None, [0, 1, 2]
    for step, held in enumerate((48, 64, 64)):
        batch = xlnet_lanes(step, lanes, memory=memory)
        result = model(batch)
        if memory is not None:
            assert abs(result.loss - model(dataclasses.replace(batch, memory=None)).loss) > 0.1
            assert torch.equal(result.memory[:, :, : held - LENGTH], memory[:, :, -(held - LENGTH) :])
        memory = result.memory
        assert memory.shape == (3, 2, held, 64) and not memory.requires_grad and memory.is_contiguous()
        assert torch.equal(memory[:, 0, -LENGTH:].flatten(0, 1), model.words(batch.tokens))
    assert memory.nbytes == 3 * lane_bytes(model.shape, LENGTH)


def test_a_protein_that_resets_its_lane_sees_no_other(make_xlnet, xlnet_lanes, xlnet_pack, proteins):
    """Whatever the tokens of proteins before it are, in its piece or in the memory."""
    model, lane = make_xlnet(memory_length=64), 1
    starts = [sum(len(protein) + 2 for protein in proteins[20:number]) for number in range(20, 40)]
    step = next(start // LENGTH for start in starts[1:] if start % LENGTH > 4)
    assert any(start % LENGTH > 0 for start in starts if start // LENGTH == step)

    def loss_after_its_start(change: bool) -> torch.Tensor:
        memory = None
        for number in range(step + 1):
            batch = xlnet_lanes(number, [lane], resets=True, memory=memory)
            documents = batch.documents
            if change:
                other = documents < batch.documents[-1] if number == step else torch.ones_like(documents, dtype=torch.bool)
                batch = dataclasses.replace(batch, tokens=torch.where(other & (batch.tokens > 16), 17 + (batch.tokens - 16) % 20, batch.tokens))
            if number == step:
                last = batch.documents[batch.target_positions] == batch.documents[-1]
                batch = dataclasses.replace(batch, target_positions=batch.target_positions[last], targets=batch.targets[last])
                assert last.any()
            result = model(batch)
            memory = result.memory
        return result.loss.detach()

    plain, changed = loss_after_its_start(False), loss_after_its_start(True)
    assert abs(plain - changed) <= 1e-6 * plain


def test_only_so_much_of_the_memory_is_seen_as_was_carried(make_xlnet, xlnet_lanes):
    model = make_xlnet(memory_length=64)
    batch = xlnet_lanes(0, [0, 1])
    memory = torch.randn(2, 2, 64, 64, generator=torch.Generator().manual_seed(1))
    for carried in (0, 10, 64, 500):
        cut = memory[:, :, 64 - min(carried, 64) :] if carried else None
        wanted = model(dataclasses.replace(batch, memory=cut, carried=None)).loss
        found = model(dataclasses.replace(batch, memory=memory, carried=torch.full((2,), carried))).loss
        assert abs(found - wanted) <= 1e-6 * wanted


@pytest.mark.slow  # torch imports its compiler
def test_flex_attention_gives_the_same(make_xlnet, xlnet_pack, xlnet_lanes):
    """Forward on a CPU, where it is not compiled; gradients it has on GPUs alone."""
    pytest.importorskip("torch.nn.attention.flex_attention")
    model = make_xlnet(memory_length=64)
    memory = torch.randn(3, 2, 64, 64, generator=torch.Generator().manual_seed(1))
    packed, lanes = xlnet_pack(list(range(4))), xlnet_lanes(1, [0, 1, 2], resets=True, memory=memory)
    with torch.no_grad():
        hidden, losses = model.hidden(packed), [model(batch).loss for batch in (packed, lanes)]
        model.backend = "flex"
        assert (model.hidden(packed) - hidden).abs().max() <= 1e-5
        assert [model(batch).loss.item() for batch in (packed, lanes)] == pytest.approx([loss.item() for loss in losses], rel=1e-5)


def test_the_clamp_makes_far_distances_equal(make_xlnet, xlnet_pack):
    plain, clamped, wide = (make_xlnet(clamp_length=length) for length in (0, 5, 10_000))
    batch = xlnet_pack([0, 1])
    assert torch.equal(plain.hidden(batch), wide.hidden(batch))
    assert (plain.hidden(batch) - clamped.hidden(batch)).abs().max() > 0.01
    rows = clamped._distances(batch)
    assert torch.equal(rows[: batch.max_length - 5], rows[:1].expand(batch.max_length - 5, -1))
    assert torch.equal(rows[batch.max_length + 5 :], rows[-1:].expand(batch.max_length - 5, -1))


def test_recomputing_layers_gives_the_same_gradients_with_dropout_too(make_xlnet, xlnet_lanes):
    model = make_xlnet(dropout=0.2).train()
    memory = torch.randn(2, 2, 64, 64, generator=torch.Generator().manual_seed(1))
    found = []
    for every in (0, 1, 2):
        model.recompute_every = every
        torch.manual_seed(5)
        found.append(loss_and_gradients(model, xlnet_lanes(1, [0, 1], memory=memory)))
    for loss, gradient in found[1:]:
        assert loss == found[0][0]
        assert (gradient - found[0][1]).abs().max() <= 1e-6 * gradient.abs().max()


def test_dropout_is_for_training_alone(make_xlnet, xlnet_pack):
    model, batch = make_xlnet(dropout=0.3), xlnet_pack([0, 1])
    quiet = model(batch).loss
    assert model(batch).loss == quiet
    losses = [model.train()(batch).loss for _ in range(2)]
    assert len({quiet.item(), *(loss.item() for loss in losses)}) == 3


@pytest.mark.parametrize("case", ["no sequence", "no target", "no lane"])
@pytest.mark.parametrize("bf16", [False, True])
def test_an_empty_batch_gives_zero_loss_connected_to_every_trained_parameter(make_xlnet, xlnet_pack, case, bf16):
    model = make_xlnet()
    batch = xlnet_pack([] if case != "no target" else [0, 1])
    nothing = torch.empty(0, dtype=torch.int64)
    batch = dataclasses.replace(batch, target_positions=nothing, targets=nothing, lanes=nothing if case == "no lane" else None)
    with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
        result = model(batch)
        result.loss.backward()
    assert result.loss == 0.0
    assert result.num_correct == 0
    assert result.memory is None
    assert not gradients(model).any()


def test_bf16_autocast_trains_with_the_loss_of_fp32(make_xlnet, xlnet_lanes):
    model = make_xlnet(num_heads=4)
    batch = xlnet_lanes(0, [0, 1, 2])
    exact, gradient = loss_and_gradients(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        narrow, narrow_gradient = loss_and_gradients(model, batch)
    assert abs(narrow - exact) <= 0.02 * exact
    assert torch.nn.functional.cosine_similarity(narrow_gradient, gradient, dim=0) > 0.98


def test_a_batch_without_an_order_is_refused(make_xlnet, xlnet_pack):
    batch = dataclasses.replace(xlnet_pack([0]), permutation=None)
    with pytest.raises(ConfigError, match="its objective is 'permutation'"):
        make_xlnet()(batch)


def lanes_with_memory(shape, batch):
    """A sixth of the tokens as targets, as the record counts them, and a full memory."""
    targets = torch.arange(0, len(batch.tokens), 6)
    memory = torch.randn(len(batch.lanes), shape.num_layers, shape.memory_length, shape.hidden_size)
    return dataclasses.replace(batch, target_positions=targets, targets=batch.tokens[targets], memory=memory)


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_flops_are_those_that_torch_counts(size, make_xlnet, xlnet_lanes):
    model = make_xlnet(size).train()
    batch = lanes_with_memory(model.shape, xlnet_lanes(1, [0, 1]))
    with FlopCounterMode(display=False) as counter:
        model(batch).loss.backward()
    assert counter.get_total_flops() == pytest.approx(flops(model.shape, [LENGTH] * 2), rel=1e-3)


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.1}])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activation_bytes_are_those_of_the_saved_tensors_to_two_percent(changes, precision, make_xlnet, xlnet_lanes):
    model = make_xlnet("tiny", num_layers=3, hidden_size=96, num_heads=3, **changes).train()
    batch = lanes_with_memory(model.shape, xlnet_lanes(1, [0, 1, 2]))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {tuple(sorted(parameter.flatten(1).shape)) for parameter in model.parameters() if parameter.ndim > 1}
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
    assert activation_bytes(model.shape, [LENGTH] * 3, precision) == pytest.approx(measured, rel=0.02)
