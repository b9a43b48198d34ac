"""What the policies keep for the gradient: what recomputed layers spare, and what is there at the worst moment of the backward pass."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest

from prottrans_hpc import architecture
from prottrans_hpc.launch.batch_arithmetic import plan_batches
from prottrans_hpc.launch.memory_fit import memory_need
from prottrans_hpc.launch.recomputation import Kept, Tokens, kept_bytes
from prottrans_hpc.recipe import Recipe, read_recipe, science
from prottrans_hpc.recipe_memory import Memory

LENGTHS = [200, 300, 80]
TINY = read_recipe("tiny_prot_bert")


def kept(record: Any, shape: Any, kept_in: str, memory: Memory, recipe: Recipe = TINY) -> Kept:
    return kept_bytes(record, shape, Tokens(LENGTHS), kept_in, replace(recipe, memory=memory))


@pytest.mark.parametrize("every", [0, 1, 2, 3])
def test_what_the_forward_pass_leaves_is_what_torch_saves_to_three_percent(every: int) -> None:
    """Tensors within recomputed layers are not seen by the hook, only their inputs."""
    import torch

    from prottrans_hpc.models import prot_bert

    record = architecture.get("prot_bert")
    shape: Any = dataclasses.replace(record.size("tiny").shape, num_layers=6)
    model = prot_bert.build(shape)
    model.initialise(1)
    model.recompute_every = every
    total = sum(LENGTHS)
    places = torch.cat([torch.arange(length) for length in LENGTHS])
    starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    targets = torch.arange(0, total, 7)[: round(0.15 * total)]
    batch = architecture.Batch(torch.full((total,), 7), places, starts, targets, torch.full((len(targets),), 7), torch.arange(3), max(LENGTHS), total)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = model(batch)
    assert result.loss.requires_grad
    assert kept(record, shape, "fp32", Memory(recompute_every=every)).after_forward == pytest.approx(sum(saved.values()), rel=0.03)


def test_the_worst_moment_is_found() -> None:
    layers = Kept(whole=(10, 10, 10), held=(1, 10, 1), rest=5, working=(2, 2, 2))
    assert layers.after_forward == 17
    assert layers.peak == 5 + (1 + 10) + 10 + 2, "the last layer, computed again, beside what those before it hold"
    assert replace(layers, held=(1, 1, 1)).peak == 5 + 2 + 10 + 2
    assert replace(layers, held=(10, 10, 10)).peak == 35 + 2
    assert replace(layers, finish=30).peak == 17 + 30


@pytest.mark.parametrize("name", sorted(architecture.BUILT_IN))
def test_policies_keep_less_the_more_they_compute_again(name: str) -> None:
    record = architecture.get(name)
    recipe = read_recipe(f"tiny_{name}")
    for size in record.sizes.values():
        peaks = {every: kept(record, size.shape, "bf16", Memory(recompute_every=every), recipe).peak for every in (1, 2, 4, 0)}
        assert peaks[1] <= peaks[2] <= peaks[4] <= peaks[0]
        if size.shape.num_layers < 12:
            continue
        assert 0 < peaks[1] < 0.5 * peaks[0]
        keeping = [
            kept(record, size.shape, "bf16", Memory(recompute_every=1, recompute_keeps=keeps), recipe).after_forward
            for keeps in ("nothing", "attention", "attention_and_narrow", "attention_and_half")
        ]
        assert keeping == sorted(keeping) and len(set(keeping)) == 4


def test_the_planner_counts_it_and_the_science_does_not() -> None:
    record, needs = architecture.get("prot_bert"), []
    for every in (0, 1):
        recipe = read_recipe("prot_bert", (f"memory.recompute_every={every}",))
        batches = plan_batches(recipe, num_ranks=64)
        needs.append(memory_need(recipe, record, record.size("prot_bert").shape, batches, on_gpu=True).activations)
        assert "memory" not in science(recipe)
    assert needs[1] < 0.25 * needs[0]
