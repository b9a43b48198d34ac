"""What recomputed layers spare, held against the tensors that torch keeps, for every architecture's record."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from prottrans_hpc import architecture
from prottrans_hpc.launch.batch_arithmetic import plan_batches
from prottrans_hpc.launch.memory_fit import memory_need
from prottrans_hpc.launch.recomputation import activation_bytes
from prottrans_hpc.recipe import read_recipe, science

LENGTHS = [200, 300, 80]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_kept_bytes_are_those_of_the_saved_tensors_to_three_percent(every: int) -> None:
    """Tensors within recomputed layers are not seen by the hook, only their inputs: beside them there is once a whole layer."""
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
    layer = record.activation_bytes(shape, LENGTHS, "fp32") - record.activation_bytes(dataclasses.replace(shape, num_layers=5), LENGTHS, "fp32")
    expected = sum(saved.values()) + layer
    assert activation_bytes(record, shape, LENGTHS, "fp32", every) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("name", sorted(architecture.BUILT_IN))
def test_more_recomputed_layers_keep_less(name: str) -> None:
    record = architecture.get(name)
    for size in record.sizes.values():
        kept = [activation_bytes(record, size.shape, LENGTHS, "bf16", every) for every in (1, 2, 4, 0)]
        assert kept[0] <= kept[1] <= kept[2] <= kept[3] * 1.3
        if size.shape.num_layers >= 12:
            assert kept == sorted(kept) and 0 < kept[0] < 0.5 * kept[3], (size, kept)


def test_the_planner_counts_it_and_the_science_does_not() -> None:
    record, needs = architecture.get("prot_bert"), []
    for every in (0, 1):
        recipe = read_recipe("prot_bert", (f"memory.recompute_every={every}",))
        batches = plan_batches(recipe, num_ranks=64)
        needs.append(memory_need(recipe, record, record.size("prot_bert").shape, batches, on_gpu=True).activations)
        assert "memory" not in science(recipe)
    assert needs[1] < 0.25 * needs[0]
