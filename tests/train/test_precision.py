"""Precisions on one module: what is held and computed in which type, masters, half updates, refusal where the hardware cannot."""

from __future__ import annotations

import typing

import pytest
import torch

from prottrans_hpc import architecture
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.models import prot_bert
from prottrans_hpc.precision_levels import LEVELS, Name
from prottrans_hpc.recipe import LossScaling, Phase
from prottrans_hpc.recipe_optimizers import Adafactor, Adam, AdamW, Lamb
from prottrans_hpc.train import precision
from prottrans_hpc.train.loss_scale import LossScale
from prottrans_hpc.train.optim import build_optimizer
from prottrans_hpc.train.precision import HalfWeights, forward_context, lower_weights

CPU = torch.device("cpu")
HALF = [name for name, level in LEVELS.items() if level.weights != "fp32"]
TYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def tiny_bert() -> torch.nn.Module:
    model = prot_bert.build(architecture.get("prot_bert").size("tiny").shape)
    model.initialise(1)
    return model


def test_every_precision_of_a_recipe_is_described():
    assert set(typing.get_args(Name)) == set(LEVELS)


@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16", "fp16"])
def test_weights_and_gradients_stay_fp32_while_products_take_the_precision(name):
    layer = torch.nn.Linear(8, 8)
    assert lower_weights(layer, name) == {}
    make = forward_context(name, CPU)
    for _ in range(2):
        with make():
            out = layer(torch.randn(4, 8))
        assert out.dtype == TYPES[LEVELS[name].products]
        out.float().sum().backward()
    assert layer.weight.dtype == layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_half_products_are_near_fp32(name):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 64), torch.randn(16, 64)
    with forward_context(name, CPU)():
        low = layer(x)
    torch.testing.assert_close(low.float(), layer(x), rtol=2e-2, atol=2e-2)
    assert not torch.equal(low.float(), layer(x))


@pytest.mark.parametrize("name", HALF)
def test_what_becomes_half_and_what_stays(name):
    model, full = tiny_bert(), tiny_bert()
    masters = lower_weights(model, name)
    level, norms = LEVELS[name], {f"{of}.{kind}" for of, module in model.named_modules() if precision.is_norm(module) for kind in ("weight", "bias")}
    assert len(norms) >= 10
    for key, parameter in model.named_parameters():
        untouched = not parameter.requires_grad or (level.has_masters and key in norms)
        assert parameter.dtype == (torch.float32 if untouched else TYPES[level.weights]), key
        assert (key in masters) == (level.has_masters and not untouched)
        original = full.get_parameter(key)
        assert torch.equal(masters.get(key, original), original)
        assert torch.equal(parameter, original.to(parameter.dtype))


def test_norms_compute_in_fp32_and_hand_half_on():
    model, seen = tiny_bert(), []
    lower_weights(model, "fp16_o2")
    norm = model.layers[0].output_norm
    norm.register_forward_hook(lambda module, arguments, result: seen.append((arguments[0].dtype, result.dtype)))
    norm(torch.randn(3, 64).half())
    assert seen == [(torch.float32, torch.float16)]


def test_a_tied_weight_has_one_master_by_both_names():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    masters = lower_weights(model, "bf16_o2")
    assert set(masters) == {"0.weight", "1.weight"} and masters["0.weight"] is masters["1.weight"]
    assert model[1].weight is model[0].weight


@pytest.mark.parametrize("settings", [Lamb(learning_rate=0.01), AdamW(learning_rate=0.01), Adam(learning_rate=0.01), Adafactor(learning_rate=0.01)])
def test_masters_take_the_steps_of_fp32_and_the_half_weights_are_their_rounding(settings):
    torch.manual_seed(0)
    full, half = torch.nn.Linear(40, 30), torch.nn.Linear(40, 30)
    half.load_state_dict(full.state_dict())
    masters = lower_weights(half, "fp16_o2")
    plain = build_optimizer(full.named_parameters(), settings)
    optimizer = HalfWeights(dict(half.named_parameters()), masters, lambda parameters: build_optimizer(parameters.items(), settings))
    for _ in range(5):
        for name, parameter in half.named_parameters():
            parameter.grad = torch.randn(parameter.shape).half()
            full.get_parameter(name).grad = parameter.grad.float()
        plain.step(0.01, 0.5)
        optimizer.step(0.01, 0.5)
    for name, parameter in full.named_parameters():
        assert torch.equal(masters[name], parameter)
        assert torch.equal(half.get_parameter(name), parameter.half())
        assert masters[name].grad is None


@pytest.mark.parametrize("settings", [Lamb(learning_rate=0.01), Adam(learning_rate=0.01), Adafactor(learning_rate=0.01)])
def test_pure_half_weights_are_updated_in_fp32_that_is_freed_again(settings):
    torch.manual_seed(0)
    half = torch.nn.Linear(40, 30)
    lower_weights(half, "fp16_o3")
    optimizer = HalfWeights(dict(half.named_parameters()), {}, lambda parameters: build_optimizer(parameters.items(), settings))
    assert all(copy.untyped_storage().nbytes() == 0 for _, copy in optimizer._pairs)
    once = {name: torch.nn.Parameter(p.detach().float()) for name, p in half.named_parameters()}
    plain = build_optimizer(once.items(), settings)
    for name, parameter in half.named_parameters():
        parameter.grad = torch.randn(parameter.shape).half()
        once[name].grad = parameter.grad.float()
    plain.step(0.01)
    optimizer.step(0.01)
    assert all(torch.equal(half.get_parameter(name), parameter.half()) for name, parameter in once.items())
    assert all(copy.untyped_storage().nbytes() == 0 for _, copy in optimizer._pairs)
    assert all(tensor.dtype == torch.float32 for name, tensor in optimizer.state_dict().items() if name != "num_updates")


@pytest.mark.parametrize(("name", "instead"), [("bf16", "fp16"), ("bf16_o2", "fp16_o2"), ("tf32", "fp32")])
def test_a_gpu_without_it_is_refused_by_name(monkeypatch, name, instead):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-16GB")
    with pytest.raises(ConfigError, match=rf"Tesla V100.*'{instead}'"):
        forward_context(name, torch.device("cuda", 0))


def test_the_loss_scale_doubles_after_good_steps_and_halves_after_an_overflow():
    scale, values = LossScale(LossScaling(initial=4.0, growth_every=2, floor=2.0)), []
    for event in "gggogog":
        values.append(scale.value)
        if event == "g":
            scale.grow()
        else:
            assert scale.back_off()
    assert values == [4.0, 4.0, 8.0, 8.0, 4.0, 4.0, 2.0]
    assert scale.to_json() == {"value": 2.0, "num_good_steps": 1}
    other = LossScale(LossScaling())
    other.take(scale.to_json())
    assert (other.value, other.num_good_steps) == (2.0, 1)
    assert not scale.back_off(), "it is at its floor"
    other.take(None)
    assert (other.value, other.num_good_steps) == (65536.0, 0)


def test_the_loss_scale_ends_somewhere():
    scale = LossScale(LossScaling(initial=2.0**23, growth_every=1))
    for _ in range(3):
        scale.grow()
    assert scale.value == 2.0**24


@pytest.mark.parametrize(
    ("phase", "multiplier"),
    [({"global_batch_size": 12, "max_residues": 512}, 2.0**16 / 2**13), ({"global_batch_residues": 4096, "max_residues": 512}, 2.0**16 / 2**12)],
)
def test_a_summed_loss_is_scaled_by_a_power_of_two_that_the_recipe_alone_decides(phase, multiplier):
    assert LossScale(LossScaling()).multiplier(Phase(steps=1, **phase)) == multiplier


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(LEVELS))
def test_a_gpu_computes_in_every_precision(name):
    """One step of a tiny ProtBert against fp32 on the CPU: the loss to 2 %, finite gradients of the weights' type."""
    from prottrans_hpc.architecture import Batch

    device, length = torch.device("cuda"), 60
    places = torch.arange(length).repeat(2)
    batch = {"tokens": torch.randint(5, 25, (2 * length,)), "positions": places, "cu_seqlens": torch.tensor([0, length, 2 * length], dtype=torch.int32)}
    batch |= {"target_positions": torch.arange(0, 2 * length, 7), "sample_ids": torch.arange(2)}
    batch["targets"] = batch["tokens"][batch["target_positions"]]
    expected = tiny_bert()(Batch(**batch, max_length=length, num_residues=2 * length)).loss.item()
    model = tiny_bert().to(device)
    context = forward_context(name, device)
    lower_weights(model, name)
    with context():
        loss = model(Batch(**{key: value.to(device) for key, value in batch.items()}, max_length=length, num_residues=2 * length)).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=2e-2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == parameter.dtype
            assert parameter.grad.isfinite().all()
    torch.set_float32_matmul_precision("highest")
