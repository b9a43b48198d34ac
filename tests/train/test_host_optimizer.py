"""The optimizer on the host is the optimizer on the device: the same weights, the same state, in every precision of the weights."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prottrans_hpc.errors import CheckpointError
from prottrans_hpc.memory import page_locked
from prottrans_hpc.recipe import read_recipe
from prottrans_hpc.recipe_optimizers import Adafactor, Adam, AdamW, Lamb
from prottrans_hpc.train import host_optimizer, optim, precision
from prottrans_hpc.train.host_optimizer import HostOptimizer

OPTIMIZERS = [Lamb(learning_rate=1e-2), AdamW(learning_rate=1e-2), Adam(learning_rate=1e-2, weight_decay=0.1), Adafactor(learning_rate=1e-2)]
LEVELS = ["fp32", "bf16_o2", "bf16_o3"]
RATES = [1e-2, 7e-3, 5e-3, 3e-3]


class Model(torch.nn.Module):
    """A table that is tied, a norm, biases, a weight that is not trained, and one that gets no gradient at first."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.table = torch.nn.Embedding(40, 24, _weight=torch.randn(40, 24, generator=generator))
        self.dense = torch.nn.Linear(24, 24)
        self.norm = torch.nn.LayerNorm(24)
        self.late = torch.nn.Parameter(torch.randn(24, 7, generator=generator))
        self.fixed = torch.nn.Parameter(torch.ones(5), requires_grad=False)
        self.head = torch.nn.Linear(24, 40)
        self.head.weight = self.table.weight
        with torch.no_grad():
            for parameter in (self.dense.weight, self.dense.bias, self.head.bias):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def trained(model, level, settings, *, on_host, group_parameters=600):
    """The model's masters and its optimizer."""
    masters = precision.lower_weights(model, level)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def build(weights):
        return optim.build_optimizer(weights.items(), settings)

    if on_host:
        masters = host_optimizer.on_host(masters) if parameters["late"].device.type == "cuda" else masters
        return masters, HostOptimizer(parameters, masters, build, group_parameters=group_parameters)
    return masters, build(parameters) if level == "fp32" else precision.HalfWeights(parameters, masters, build)


def take_steps(model, optimizer, steps, *, late_from=0):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (name != "late" or step >= late_from):
                gradient = torch.randn(parameter.shape, generator=generator) * 10.0 ** (step - 2)
                parameter.grad = gradient.to(parameter)
        optimizer.step(RATES[step], 0.5)
        model.zero_grad(set_to_none=True)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("settings", OPTIMIZERS, ids=lambda settings: settings.name)
@pytest.mark.parametrize("level", LEVELS)
def test_weights_and_state_are_those_of_the_device_to_the_bit(settings, level):
    models = Model(), Model()
    (masters, usual), (others, ours) = (trained(model, level, settings, on_host=on_host) for model, on_host in zip(models, (False, True), strict=True))
    for model, optimizer in zip(models, (usual, ours), strict=True):
        take_steps(model, optimizer, range(4), late_from=2)
    assert not torch.equal(models[0].late, Model().late.to(models[0].late.dtype)), "nothing was trained"
    assert_same(models[1].state_dict(), models[0].state_dict())
    assert_same(others, masters)
    assert_same(ours.state_dict(), usual.state_dict())


@pytest.mark.parametrize("settings", OPTIMIZERS, ids=lambda settings: settings.name)
@pytest.mark.parametrize("turn", [(False, True), (True, False)], ids=["device to host", "host to device"])
def test_a_state_goes_over_to_the_other_and_on_to_the_bit(settings, turn):
    straight, first, second = Model(), Model(), Model()
    _, whole = trained(straight, "fp32", settings, on_host=False)
    take_steps(straight, whole, range(4))
    _, before = trained(first, "fp32", settings, on_host=turn[0])
    take_steps(first, before, range(2))
    _, after = trained(second, "fp32", settings, on_host=turn[1])
    take_steps(second, after, range(1))  # what is loaded must replace what was there
    second.load_state_dict(first.state_dict())
    after.load_state_dict({name: tensor.clone() for name, tensor in before.state_dict().items()})
    take_steps(second, after, range(2, 4))
    assert_same(second.state_dict(), straight.state_dict())
    assert_same(after.state_dict(), whole.state_dict())


def test_weights_that_something_else_changed_are_read_again():
    models = Model(), Model()
    optimizers = [trained(model, "fp32", OPTIMIZERS[0], on_host=on_host)[1] for model, on_host in zip(models, (False, True), strict=True)]
    for model, optimizer in zip(models, optimizers, strict=True):
        take_steps(model, optimizer, range(2))
        with torch.no_grad():
            model.dense.weight.mul_(0.5)
        take_steps(model, optimizer, range(2, 4))
    assert_same(models[1].state_dict(), models[0].state_dict())


class Touched(TorchDispatchMode):
    """Notes the memory that operations read or write."""

    def __init__(self):
        super().__init__()
        self.addresses = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.addresses |= {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("level", LEVELS)
def test_the_device_is_read_beside_the_update_and_not_between(level, monkeypatch):
    """On a GPU the CPU would wait there, for everything that the GPU was told."""
    model = Model()
    _, ours = trained(model, level, OPTIMIZERS[0], on_host=True)
    of_device = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    touched, widen = [], ours._widen

    def watched(index):
        with Touched() as mode:
            widen(index)
        touched.append(mode.addresses)

    monkeypatch.setattr(ours, "_widen", watched)
    take_steps(model, ours, range(2))
    assert len(touched) == 2 * len(ours._groups) > 4
    assert not any(addresses & of_device for addresses in touched)


@pytest.mark.parametrize("level", LEVELS)
def test_page_locked_memory_is_as_much_as_is_needed(level, monkeypatch):
    """Not the next power of two of every tensor."""
    asked = []

    def empty_bytes(num_bytes, *, pinned):
        asked.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    monkeypatch.setattr(page_locked, "empty_bytes", empty_bytes)
    _, ours = trained(Model(), level, OPTIMIZERS[0], on_host=True)
    weights = [mirror.weights for group in ours._groups for mirror in group.mirrors if not mirror.is_master]
    largest = max(sum(mirror.parameter.numel() for mirror in group.mirrors) for group in ours._groups)
    num_half = {"fp32": 0, "bf16_o2": 2, "bf16_o3": 3}[level]
    assert sum(asked) == sum(tensor.nbytes for tensor in weights) + 2 * largest * (4 + 2 * num_half)


def test_groups_hold_what_may_travel_together():
    sizes = {"a": 5, "b": 5, "c": 30, "d": 1, "e": 9, "f": 1}
    parameters = {name: torch.empty(size) for name, size in sizes.items()}
    assert host_optimizer._shares(parameters, 10) == [["a", "b"], ["c"], ["d", "e"], ["f"]]


def test_a_state_of_another_model_is_refused_whole():
    _, ours = trained(Model(), "fp32", OPTIMIZERS[0], on_host=True)
    state = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    del state["exp_avg.late"]
    with pytest.raises(CheckpointError, match=r"exp_avg\.late is missing"):
        ours.load_state_dict(state)


def test_on_a_cpu_there_is_nothing_to_move():
    recipe = read_recipe("tiny_prot_bert", ("memory.optimizer_on=host",))
    assert not host_optimizer.moves(recipe, torch.device("cpu"))
    assert host_optimizer.moves(recipe, torch.device("cuda", 0))
    assert not host_optimizer.moves(read_recipe("tiny_prot_bert"), torch.device("cuda", 0))


@pytest.mark.gpu
@pytest.mark.parametrize("level", LEVELS)
def test_on_a_gpu_it_is_the_host_s_update_to_the_bit(level):
    on_gpu, on_cpu = Model().cuda(), Model()
    others, ours = trained(on_gpu, level, OPTIMIZERS[0], on_host=True)
    masters, usual = trained(on_cpu, level, OPTIMIZERS[0], on_host=False)
    take_steps(on_gpu, ours, range(4))
    take_steps(on_cpu, usual, range(4))
    torch.cuda.synchronize()
    assert_same({name: tensor.cpu() for name, tensor in on_gpu.state_dict().items()}, on_cpu.state_dict())
    assert_same({name: tensor.detach() for name, tensor in others.items()}, masters)
    assert all(tensor.device.type == "cpu" for tensor in ours.state_dict().values())
