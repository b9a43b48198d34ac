"""Adafactor against the reference's over many steps, and against the paper's algorithm written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prottrans_hpc.recipe_optimizers import Adafactor
from prottrans_hpc.train import adafactor, optim

SHAPES = {"dense.weight": (37, 53), "wide.weight": (3, 700), "bias": (53,), "one.weight": (1, 1), "stack.weight": (2, 3, 5, 7), "zero.weight": (4, 6)}
T5 = Adafactor(learning_rate=1e-2)


def make(seed: int = 0, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}
    return {name: torch.nn.Parameter(torch.zeros_like(value) if name.startswith("zero") else value) for name, value in drawn.items()}


def gradients(step: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, torch.Tensor]:
    """Of changing size, some of them zero."""
    generator = torch.Generator().manual_seed(1000 + step)
    return {name: torch.randn(shape, generator=generator) * 10.0 ** (step % 5 - 3) * (step != 3 or name != "bias") for name, shape in shapes.items()}


def take(optimizer: optim.Optimizer, parameters: dict[str, torch.nn.Parameter], step: int, rate: float, factor: float = 1.0) -> None:
    for name, gradient in gradients(step).items():
        parameters[name].grad = gradient / factor
    optimizer.step(rate, factor)


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        ({}, {}),
        ({"weight_decay": 0.1}, {"weight_decay": 0.1}),
        ({"scale_by_parameter": False}, {"scale_parameter": False}),
        ({"clip_update": 0.3, "decay_exponent": 0.5}, {"clip_threshold": 0.3, "decay_rate": -0.5}),
    ],
)
def test_a_hundred_steps_are_those_of_the_reference(settings, theirs, monkeypatch):
    """They decay every tensor, so there is none but matrices where weights decay. Small blocks: their borders count, too."""
    optimization = pytest.importorskip("transformers.optimization")
    monkeypatch.setattr(adafactor, "_PIECE", 300)
    chosen = Adafactor(learning_rate=1.0, **settings)
    ours, reference = make(), make()
    optimizer = optim.build_optimizer(ours.items(), chosen)
    groups = [
        {"params": [p for name, p in reference.items() if name != "bias"]},
        {"params": [reference["bias"]], "weight_decay": 0.0},
    ]
    other = optimization.Adafactor(groups, lr=1.0, relative_step=False, **{"scale_parameter": True, **theirs})
    for step in range(100):
        rate = 0.05 / max(step + 1, 10) ** 0.5
        take(optimizer, ours, step, rate, factor=0.125)
        for name, gradient in gradients(step).items():
            reference[name].grad = gradient
        for group in other.param_groups:
            group["lr"] = rate
        other.step()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, reference[name], rtol=2e-5, atol=2e-7, msg=name)
    for name, tensor in optimizer.state_dict().items():
        if name != "num_updates":
            quantity, _, of = name.partition(".")
            torch.testing.assert_close(tensor, other.state[reference[of]][quantity], rtol=1e-5, atol=0.0, msg=name)


def test_two_matrices_by_the_paper():
    """Algorithm 4 in float64, written from the paper."""
    parameters = {name: p for name, p in make(5).items() if name in ("dense.weight", "wide.weight")}
    x = {name: p.detach().double().numpy().copy() for name, p in parameters.items()}
    rows, columns = ({name: np.zeros(value.shape[axis]) for name, value in x.items()} for axis in (0, 1))
    optimizer = optim.build_optimizer(parameters.items(), T5)
    for step in range(10):
        for name, g in ((name, gradients(step)[name]) for name in x):
            parameters[name].grad = g
            g = g.double().numpy()
            keep = 1.0 - (step + 1.0) ** -0.8
            rows[name] = keep * rows[name] + (1 - keep) * (g * g + 1e-30).mean(axis=1)
            columns[name] = keep * columns[name] + (1 - keep) * (g * g + 1e-30).mean(axis=0)
            u = g / np.sqrt(np.outer(rows[name], columns[name]) / rows[name].mean())
            u /= max(1.0, np.sqrt((u * u).mean()))
            x[name] -= 1e-2 * max(1e-3, np.sqrt((x[name] ** 2).mean())) * u
        optimizer.step(1e-2)
    for name, parameter in parameters.items():
        assert np.abs(parameter.detach().numpy() - x[name]).max() <= 2e-6 * np.abs(x[name]).max()


def test_the_state_is_a_number_a_row_and_a_number_a_column():
    state = optim.build_optimizer(make().items(), T5).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items() if "stack" in name or "bias" in name} == {
        "exp_avg_sq_row.stack.weight": (2, 3, 5),
        "exp_avg_sq_col.stack.weight": (2, 3, 7),
        "exp_avg_sq.bias": (53,),
    }


def test_blocks_change_nothing_but_the_last_bits(monkeypatch):
    results = []
    for piece in (64, 1 << 17):
        monkeypatch.setattr(adafactor, "_PIECE", piece)
        parameters = make(2)
        optimizer = optim.build_optimizer(parameters.items(), T5)
        for step in range(5):
            take(optimizer, parameters, step, 1e-2)
        results.append(parameters)
    for name in SHAPES:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=2e-6, atol=1e-8)


def test_a_matrix_that_is_not_contiguous_takes_the_same_steps():
    values = torch.randn(30, 57, generator=torch.Generator().manual_seed(1)) * 0.1
    straight, transposed = {"w": torch.nn.Parameter(values.t().contiguous())}, {"w": torch.nn.Parameter(values.clone().t())}
    for parameters in (straight, transposed):
        optimizer = optim.build_optimizer(parameters.items(), T5)
        parameters["w"].grad = torch.randn(57, 30, generator=torch.Generator().manual_seed(2))
        optimizer.step(1e-2)
    torch.testing.assert_close(transposed["w"], straight["w"], rtol=2e-6, atol=1e-8)


def test_settings_of_another_optimizer_are_refused():
    from prottrans_hpc.errors import ConfigError
    from prottrans_hpc.recipe import read_recipe

    with pytest.raises(ConfigError, match=r"unknown key optimizer\.beta1"):
        read_recipe("tiny_prot_bert", ("optimizer.name=adafactor", "optimizer.beta1=0.9"))
    assert read_recipe("tiny_prot_bert", ("optimizer.name=adafactor",)).optimizer.clip_norm >= 0.0
