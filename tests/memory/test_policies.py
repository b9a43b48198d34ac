"""Every policy on every architecture: gradients are bit for bit the plain ones where nothing is lost, and close where something is."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from prottrans_hpc import architecture, config, objectives
from prottrans_hpc.architecture import Batch
from prottrans_hpc.corpus.index import read_index
from prottrans_hpc.corpus.reader import Corpus
from prottrans_hpc.corpus.samples import whole_sequences
from prottrans_hpc.memory import lms, narrowing, policy
from prottrans_hpc.memory.policy import around
from prottrans_hpc.objectives.layout import lay_out
from prottrans_hpc.recipe import read_recipe, science
from prottrans_hpc.recipe_memory import Memory
from prottrans_hpc.stage import find
from prottrans_hpc.train.loader import to_tensors

TWINS = [name for name in config.shipped_names("jobs") if name.startswith("tiny_")]

LOSSLESS = {
    "layer": Memory(recompute_every=1),
    "attention": Memory(recompute_every=1, recompute_keeps="attention"),
    "narrow": Memory(recompute_every=1, recompute_keeps="attention_and_narrow"),
    "half": Memory(recompute_every=1, recompute_keeps="attention_and_half"),
    "moved": Memory(lms_limit_gib=0.0),
    "moved over a limit": Memory(lms_limit_gib=200 / 2**20),
    "moved of every second layer": Memory(recompute_every=2, lms_limit_gib=100 / 2**20),
    "attention moved": Memory(recompute_every=1, recompute_keeps="attention", lms_limit_gib=0.0),
    "narrow of every second": Memory(recompute_every=2, recompute_keeps="attention_and_narrow"),
}


@dataclass(frozen=True)
class Twin:
    """The smallest size of an architecture with weights far from zero, and a batch of real proteins."""

    module: Any
    batch: Batch

    @property
    def device(self) -> str:
        """Its kind."""
        return str(self.batch.tokens.device.type)

    def gradients(self, memory: Memory, *, autocast: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss and the gradients of a training step."""
        self.module.zero_grad()
        self.module.recompute_every = memory.recompute_every
        torch.manual_seed(3)  # dropout
        forward = around((lambda: torch.autocast(self.device, torch.bfloat16)) if autocast else contextlib.nullcontext, memory, self.module.parameters())
        try:
            with forward():
                loss = self.module(self.batch).loss
            loss.backward()
        finally:
            self.module.recompute_every = 0
        found = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        return loss.detach(), torch.cat([gradient.flatten() for gradient in found])


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=TWINS)
def twin(request: pytest.FixtureRequest, device: str, small_corpus: Any) -> Twin:
    recipe = read_recipe(request.param)
    record = architecture.get(recipe.architecture.name)
    module = find(record.build)(record.size(recipe.architecture.size).shape)
    module.initialise(7)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    corpus = Corpus(read_index(small_corpus), "train")
    rows = np.arange(8, dtype=np.int64)
    samples = whole_sequences(rows, np.minimum(corpus.lengths_of(rows), 60), epoch=0)
    batch = to_tensors(objectives.get(recipe.objective.name)(lay_out(corpus, samples, record.vocabulary), recipe.objective, 5))
    moved: dict[str, Any] = {name: value.to(device) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return Twin(module.train().to(device), replace(batch, **moved))


@pytest.fixture
def naps(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a GPU, kernels that add up in one order only; and before copies and what waits for them delays that would show a missing wait."""
    monkeypatch.setattr(lms, "SIZE_BYTES", 1024)
    if device == "cpu":
        yield
        return
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    dice, made = random.Random(1), policy.LargeModelSupport

    def pause(where: str) -> None:
        if cycles := dice.choice((0, 0, 10_000, 1_000_000)):
            torch.cuda._sleep(cycles)

    monkeypatch.setattr(policy, "LargeModelSupport", lambda *arguments, **named: made(*arguments, **named, pause=pause))
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(was)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_lossless_policies_give_equal_gradients(twin: Twin, autocast: bool, naps: None) -> None:
    loss, gradients = twin.gradients(Memory(), autocast=autocast)
    for name, memory in LOSSLESS.items():
        found = twin.gradients(memory, autocast=autocast)
        assert torch.equal(found[0], loss), name
        assert torch.equal(found[1], gradients), name


def test_bf16_saved_is_close_and_not_equal(twin: Twin, naps: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound that docs/lms.md states: 2 ** -4 of the gradient's length. T5, which does not scale its scores, comes closest."""
    monkeypatch.setattr(narrowing, "SMALLEST_BYTES", 1024)
    loss, gradients = twin.gradients(Memory())
    for memory in (
        Memory(saved="bf16"),
        Memory(recompute_every=1, recompute_keeps="attention", saved="bf16"),
        Memory(recompute_every=2, recompute_keeps="attention", saved="bf16", lms_limit_gib=50 / 2**20),
    ):
        found = twin.gradients(memory)
        assert torch.equal(found[0], loss), "the forward pass is exact"
        error = float((found[1] - gradients).norm() / gradients.norm())
        assert 0.0 < error < 2.0**-4


def test_a_default_section_changes_nothing() -> None:
    forward = contextlib.nullcontext
    assert around(forward, Memory(), ()) is forward
    assert around(forward, Memory(recompute_every=2), ()) is forward


def test_only_what_is_lossy_is_another_experiment() -> None:
    base = science(read_recipe("tiny_prot_bert"))
    assert science(read_recipe("tiny_prot_bert", ("memory.recompute_every=1", "memory.recompute_keeps=attention"))) == base
    assert science(read_recipe("tiny_prot_bert", ("memory.saved=bf16",))) == {**base, "saved": "bf16"}


def test_what_recomputed_layers_keep_needs_recomputed_layers() -> None:
    with pytest.raises(config.ConfigError, match="set recompute_every"):
        read_recipe("tiny_prot_bert", ("memory.recompute_keeps=attention",))
