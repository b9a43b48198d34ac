"""LAMB against the paper's algorithm written out in float64 and against two public implementations; AdamW; clipping; state."""

from __future__ import annotations

import logging
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prottrans_hpc.errors import CheckpointError
from prottrans_hpc.recipe_optimizers import Adafactor, Adam, AdamW, Lamb
from prottrans_hpc.train import kernel, lamb, lamb_shards, optim

SHAPES = {"dense.weight": (37, 53), "dense.bias": (53,), "norm.weight": (53,), "zero.weight": (4, 6), "table.weight": (300, 129), "one.weight": (1, 1)}
LAMB = Lamb(learning_rate=1e-2, weight_decay=0.01)
ADAMW = AdamW(learning_rate=1e-2, weight_decay=0.1)
ADAM = Adam(learning_rate=1e-2, weight_decay=0.1)
ADAFACTOR = Adafactor(learning_rate=1e-2)
ALL = [LAMB, ADAMW, ADAM, ADAFACTOR]
WAYS = ["kernel", "loop", "foreach"]


def make_parameters(seed=0, shapes=SHAPES, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}
    for name in values:
        if name.startswith("zero"):
            values[name].zero_()
    return {name: torch.nn.Parameter(value.to(device)) for name, value in values.items()}


def set_gradients(parameters, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters.values():
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * 10 ** ((step % 4) - 3)).to(parameter.device)


@pytest.fixture
def way(request, monkeypatch):
    if request.param == "kernel" and kernel.extension() is None:
        pytest.skip("THE C KERNEL IS NOT BUILT, so it goes untested: pip install -e . builds it where there is a compiler")
    monkeypatch.setattr(lamb, "choose", lambda slots: lamb.UPDATES[request.param])
    return request.param


class PaperLamb:
    """You et al. 2020, algorithm 2, in NumPy's float64, written from the paper alone."""

    def __init__(self, parameters, chosen):
        self.x = {name: p.detach().cpu().numpy().astype(np.float64) for name, p in parameters.items()}
        self.m = {name: np.zeros_like(x) for name, x in self.x.items()}
        self.v = {name: np.zeros_like(x) for name, x in self.x.items()}
        self.chosen, self.t = chosen, 0

    def step(self, gradients, rate):
        self.t += 1
        c = self.chosen
        for name, g in gradients.items():
            x = self.x[name]
            self.m[name] = c.beta1 * self.m[name] + (1 - c.beta1) * g
            self.v[name] = c.beta2 * self.v[name] + (1 - c.beta2) * g * g
            m_hat = self.m[name] / (1 - c.beta1**self.t)
            v_hat = self.v[name] / (1 - c.beta2**self.t)
            r = m_hat / (np.sqrt(v_hat) + c.epsilon)
            trust = 1.0
            if x.ndim > 1:
                r = r + c.weight_decay * x
                norms = np.linalg.norm(x), np.linalg.norm(r)
                trust = norms[0] / norms[1] if all(norms) else 1.0
            self.x[name] = x - rate * trust * r


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_twenty_steps_are_those_of_the_paper(way):
    parameters = make_parameters()
    ours, paper = optim.build_optimizer(parameters.items(), LAMB), PaperLamb(parameters, LAMB)
    for step in range(20):
        set_gradients(parameters, step)
        rate, factor = 1e-2 / (1 + step), 0.5 + step / 10
        paper.step({name: p.grad.double().numpy() * factor for name, p in parameters.items()}, rate)
        ours.step(rate, factor)
    for name, parameter in parameters.items():
        expected = paper.x[name]
        assert np.abs(parameter.detach().numpy() - expected).max() <= 3e-6 * np.abs(expected).max(), name


@pytest.mark.parametrize("other", ["loop", "foreach"])
@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.sampled_from([1, 2, 7, 8, 9, 511, 512, 513, 16383, 16384, 16385, 40000]), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_all_ways_agree_at_the_borders_of_chunks_and_blocks(other, sizes, seed):
    if kernel.extension() is None:
        pytest.skip("the C kernel is not built")
    shapes = {f"{i}.weight": (1, size) if i % 2 else (size,) for i, size in enumerate(sizes)}
    results = []
    for update in (lamb.update_by_kernel, lamb.UPDATES[other]):
        parameters = make_parameters(seed, shapes)
        set_gradients(parameters, seed)
        slots = [lamb.Slot(p, torch.zeros_like(p), torch.zeros_like(p), optim.decays(n, p)) for n, p in parameters.items()]
        with torch.no_grad():
            update(slots, lamb.Update(1e-2, 0.3, 0.9, 0.999, 1e-6, 0.01, 1 / (1 - 0.9), 1 / (1 - 0.999)))
        results.append([t for s in slots for t in (s.parameter.detach(), s.exp_avg, s.exp_avg_sq)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("way", lamb_shards.HALVES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_two_pieces_of_tensors_take_the_steps_of_the_whole(way, share):
    """As two ranks would, with the sums between them made here; a rank may have nothing of a tensor."""
    if way == "kernel" and kernel.extension() is None:
        pytest.skip("the C kernel is not built")
    whole = make_parameters(5)
    slots = [lamb.Slot(p, torch.zeros_like(p), torch.zeros_like(p), optim.decays(n, p)) for n, p in whole.items()]

    def piece(tensor, index):
        cut = int(share * tensor.numel())
        return tensor.detach().reshape(-1)[:cut] if index == 0 else tensor.detach().reshape(-1)[cut:]

    ranks = [[[piece(t, rank).clone() for t in (s.parameter, s.exp_avg, s.exp_avg_sq)] for s in slots] for rank in (0, 1)]
    halves = lamb_shards.HALVES[way]
    with torch.no_grad():
        for step in range(1, 4):
            set_gradients(whole, step)
            update = lamb.Update(1e-2, 0.3, 0.9, 0.999, 1e-6, 0.01, 1 / (1 - 0.9**step), 1 / (1 - 0.999**step))
            shards = [
                [lamb_shards.Shard(x, piece(s.parameter.grad, rank).clone(), m, v, s.adapts, True) for s, (x, m, v) in zip(slots, held, strict=True)]
                for rank, held in enumerate(ranks)
            ]
            squares = sum(halves.renew_moments(own, update) for own in shards)
            for own in shards:
                halves.renew_parameters(own, update, lamb_shards.trust_ratios(squares * torch.tensor([[s.adapts] for s in slots])))
            lamb.update_by_loop(slots, update)
    for index, slot in enumerate(slots):
        for number, expected in enumerate((slot.parameter.detach(), slot.exp_avg, slot.exp_avg_sq)):
            found = torch.cat([held[index][number] for held in ranks])
            torch.testing.assert_close(found, expected.reshape(-1), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("way", ["kernel"], indirect=True)
def test_the_kernel_gives_the_same_bits_with_any_number_of_threads(way):
    shapes = {"big.weight": (1500, 1024), "bias": (77,), "next.weight": (33, 1000), "last.weight": (900, 700)}
    before, bits = torch.get_num_threads(), set()
    try:
        for num_threads in (1, 2, 3, 7):
            torch.set_num_threads(num_threads)
            parameters = make_parameters(3, shapes)
            optimizer = optim.build_optimizer(parameters.items(), LAMB)
            for step in range(3):
                set_gradients(parameters, step)
                scale = optim.measure_gradients(parameters.values(), scale=0.1, max_norm=1.0)
                optimizer.step(1e-2, scale.factor)
            bits.add((scale.norm.hex(), *(p.detach().numpy().tobytes() for p in parameters.values())))
    finally:
        torch.set_num_threads(before)
    assert len(bits) == 1


def test_torch_optimizer_agrees_where_it_follows_the_paper():
    """It has no bias correction unless told, and then applies it outside the trust ratio: compare where both are past it."""
    libraries = pytest.importorskip("torch_optimizer")
    parameters, theirs_parameters = make_parameters(1), make_parameters(1)
    matrices = {name: p for name, p in parameters.items() if p.ndim > 1}
    theirs_matrices = {name: theirs_parameters[name] for name in matrices}
    ours = long_running(matrices)
    theirs = libraries.Lamb(theirs_matrices.values(), lr=1e-2, weight_decay=0.01, eps=LAMB.epsilon, clamp_value=1e9, debias=False)
    assert_same_steps(ours, matrices, theirs, theirs_matrices)


def test_pytorch_optimizer_agrees_where_it_follows_the_paper():
    """It divides the rate by 1 - beta1^t unless told not to, clamps the weights' norm to 10 and adds epsilon to the ratio's denominator."""
    libraries = pytest.importorskip("pytorch_optimizer")
    parameters, theirs_parameters = make_parameters(1), make_parameters(1)
    matrices = {name: p for name, p in parameters.items() if p.ndim > 1 and p.detach().norm() < 9}
    assert len(matrices) >= 3
    theirs_matrices = {name: theirs_parameters[name] for name in matrices}
    ours = long_running(matrices)
    theirs = libraries.Lamb(theirs_matrices.values(), lr=1e-2, weight_decay=0.01, weight_decouple=False, eps=LAMB.epsilon, adam_debias=True)
    assert_same_steps(ours, matrices, theirs, theirs_matrices)


def long_running(parameters):
    """Our LAMB with so many updates behind it that the bias corrections are 1."""
    optimizer = optim.build_optimizer(parameters.items(), LAMB)
    optimizer.load_state_dict({name: torch.tensor(10**8) if name == "num_updates" else tensor for name, tensor in optimizer.state_dict().items()})
    return optimizer


def assert_same_steps(ours, parameters, theirs, theirs_parameters):
    for step in range(5):
        set_gradients(parameters, step)
        set_gradients(theirs_parameters, step)
        ours.step(1e-2)
        theirs.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, theirs_parameters[name], rtol=2e-5, atol=2e-7, msg=name)


@pytest.mark.parametrize("chosen", [ADAMW, ADAM], ids=lambda chosen: chosen.name)
def test_adam_is_the_published_one_with_its_decay_beside_or_in_the_gradient(chosen):
    parameters = make_parameters(2)
    exact = {name: p.detach().double().numpy().copy() for name, p in parameters.items()}
    m = {name: np.zeros_like(x) for name, x in exact.items()}
    v = {name: np.zeros_like(x) for name, x in exact.items()}
    optimizer = optim.build_optimizer(parameters.items(), chosen)
    for step in range(10):
        set_gradients(parameters, step)
        gradients = {name: p.grad.double().numpy() * 0.25 for name, p in parameters.items()}
        optimizer.step(1e-3, 0.25)
        for name, g in gradients.items():
            decay = 0.1 * exact[name] if exact[name].ndim > 1 else 0.0
            g = g + decay if chosen is ADAM else g
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            direction = (m[name] / (1 - 0.9 ** (step + 1))) / (np.sqrt(v[name] / (1 - 0.999 ** (step + 1))) + chosen.epsilon)
            exact[name] -= 1e-3 * (direction if chosen is ADAM else direction + decay)
    for name, parameter in parameters.items():
        assert np.abs(parameter.detach().numpy() - exact[name]).max() < 2e-6, name


@pytest.mark.parametrize("chosen", ALL, ids=lambda chosen: chosen.name)
def test_a_run_that_goes_on_from_saved_state_has_the_same_bits(chosen, tmp_path):
    from safetensors.torch import load_file, save_file

    straight = make_parameters()
    optimizer = optim.build_optimizer(straight.items(), chosen)
    for step in range(6):
        if step == 3:
            save_file(optimizer.state_dict(), tmp_path / "state.safetensors")
            parameters = {name: torch.nn.Parameter(p.detach().clone()) for name, p in straight.items()}
        set_gradients(straight, step)
        optimizer.step(1e-2 / (step + 1))
    resumed = optim.build_optimizer(parameters.items(), chosen)
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for step in range(3, 6):
        set_gradients(parameters, step)
        resumed.step(1e-2 / (step + 1))
    assert all(torch.equal(parameters[name], straight[name]) for name in straight)
    states = optimizer.state_dict(), resumed.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_hyper_parameters_come_from_the_recipe_and_not_from_a_saved_state():
    names = optim.build_optimizer(make_parameters().items(), LAMB).state_dict().keys()
    assert {name.partition(".")[0] for name in names} == {"num_updates", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("chosen", [LAMB, ADAMW, ADAM], ids=lambda chosen: chosen.name)
def test_a_state_of_another_model_is_refused_by_name_and_changes_nothing(chosen):
    optimizer = optim.build_optimizer(make_parameters().items(), chosen)
    good = {name: torch.ones_like(tensor) for name, tensor in optimizer.state_dict().items()}
    cases = {
        "exp_avg.dense.weight is missing": {n: t for n, t in good.items() if n != "exp_avg.dense.weight"},
        "exp_avg.other is unknown": good | {"exp_avg.other": torch.ones(1)},
        r"exp_avg_sq.dense.bias is torch.float32 \(52,\)": good | {"exp_avg_sq.dense.bias": torch.ones(52)},
        "exp_avg.norm.weight is torch.float64": good | {"exp_avg.norm.weight": torch.ones(53, dtype=torch.float64)},
    }
    for message, state in cases.items():
        with pytest.raises(CheckpointError, match=message):
            optimizer.load_state_dict(state)
    assert all(not tensor.any() for tensor in optimizer.state_dict().values())


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e9])
def test_clipping_by_the_global_norm(max_norm):
    parameters = make_parameters()
    set_gradients(parameters, 3)
    before = {name: p.grad.clone() for name, p in parameters.items()}
    exact = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in parameters.values()))
    found = optim.measure_gradients(parameters.values(), scale=0.125, max_norm=max_norm)
    assert found.norm == pytest.approx(exact * 0.125, rel=1e-12)
    clipped = max_norm == 0.5
    assert found.factor == (pytest.approx(0.5 / exact, rel=1e-12) if clipped else 0.125)
    assert all(torch.equal(before[name], p.grad) for name, p in parameters.items())


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("built", [True, False])
def test_one_bad_number_among_thousands_makes_the_norm_not_finite(poison, built, monkeypatch):
    if not built:
        monkeypatch.setattr(kernel, "can_take", lambda tensors: False)
    parameters = make_parameters()
    set_gradients(parameters, 0)
    assert optim.measure_gradients(parameters.values(), scale=1.0, max_norm=1.0).is_finite
    parameters["table.weight"].grad[299, 128] = poison
    assert not optim.measure_gradients(parameters.values(), scale=1.0, max_norm=1.0).is_finite


def test_a_norm_that_would_overflow_fp32_is_still_a_number():
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 1e38)
    assert optim.measure_gradients([parameter], scale=1.0, max_norm=0.0).norm == pytest.approx(2e38, rel=1e-6)


def test_parameters_without_gradients_are_left_alone():
    parameters = make_parameters()
    assert optim.measure_gradients(parameters.values(), scale=1.0, max_norm=1.0).norm == 0.0
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optim.build_optimizer(parameters.items(), LAMB).step(1e-2)
    assert all(torch.equal(before[name], p) for name, p in parameters.items())


def test_what_is_not_fp32_and_contiguous_goes_another_way():
    parameter = torch.nn.Parameter(torch.randn(6, 4))
    assert kernel.can_take([parameter]) == (kernel.extension() is not None)
    assert not kernel.can_take([parameter, parameter.t()])
    assert not kernel.can_take([parameter, parameter.double()])


def test_a_parameter_that_is_not_contiguous_takes_the_same_steps():
    values = torch.randn(300, 257, generator=torch.Generator().manual_seed(1))
    straight = {"w": torch.nn.Parameter(values.t().contiguous())}
    transposed = {"w": torch.nn.Parameter(values.clone().t())}
    assert not transposed["w"].is_contiguous()
    for parameters in (straight, transposed):
        optimizer = optim.build_optimizer(parameters.items(), LAMB)
        for step in range(3):
            set_gradients(parameters, step)
            optimizer.step(1e-2)
    torch.testing.assert_close(transposed["w"], straight["w"], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("settings", [LAMB, ADAMW])
def test_a_missing_kernel_is_said_once_and_only_where_it_costs_time(monkeypatch, caplog, settings):
    monkeypatch.setitem(sys.modules, "prottrans_hpc.train._lamb", None)
    kernel.extension.cache_clear()
    kernel._tell_missing.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            parameters = make_parameters()
            optimizer = optim.build_optimizer(parameters.items(), settings)
            for step in range(3):
                set_gradients(parameters, step)
                assert optim.measure_gradients(parameters.values(), scale=1.0, max_norm=1.0).is_finite
                optimizer.step(1e-2)
        assert [record.levelname for record in caplog.records if "not built" in record.getMessage()] == ["WARNING"] * (settings is LAMB)
    finally:
        kernel.extension.cache_clear()


def test_the_kernel_refuses_tables_that_do_not_match():
    module = kernel.extension()
    if module is None:
        pytest.skip("the C kernel is not built")
    addresses, sizes = np.zeros((2, 4), dtype=np.uint64), np.array([3, 3], dtype=np.int64)
    with pytest.raises(ValueError, match="do not describe the same tensors"):
        module.step(addresses[:1], sizes, b"\1\1", *[0.5] * 8, 1)
    with pytest.raises(ValueError, match="no memory"):
        module.step(addresses, sizes, b"\1\1", *[0.5] * 8, 1)
    for ratios in ((), (np.ones(1),)):
        with pytest.raises(ValueError, match="one trust ratio for each tensor"):
            module.parameters(np.ones((2, 4), dtype=np.uint64), sizes, b"\1\1", *[0.5] * 8, 1, *ratios)
    with pytest.raises(ValueError, match="negative size"):
        module.sum_of_squares(addresses[:, :1].copy(), -sizes, 1)
    assert module.sum_of_squares(np.zeros((0, 1), dtype=np.uint64), np.zeros(0, dtype=np.int64), 1) == 0.0
    with pytest.raises(ValueError, match="differ in size"):
        kernel.sizes([torch.zeros(3)], [torch.zeros(4)])


@pytest.mark.gpu
@pytest.mark.parametrize("chosen", ALL, ids=lambda chosen: chosen.name)
def test_a_gpu_takes_the_same_steps(chosen):
    results = []
    for device in ("cpu", "cuda"):
        parameters = make_parameters(device=device)
        optimizer = optim.build_optimizer(parameters.items(), chosen)
        for step in range(5):
            set_gradients(parameters, step)
            optimizer.step(1e-2, optim.measure_gradients(parameters.values(), scale=1.0, max_norm=1.0).factor)
        results.append(parameters)
    for name in SHAPES:
        torch.testing.assert_close(results[0][name], results[1][name].cpu(), rtol=1e-5, atol=1e-7)
