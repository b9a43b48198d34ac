"""Packed batches and lanes of real proteins with an order of factorisation, and XLNets with weights far from zero."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from prottrans_hpc import architecture
from prottrans_hpc.architecture import Batch
from prottrans_hpc.corpus.samples import Samples
from prottrans_hpc.models.prot_xlnet import ProtXLNet, build
from prottrans_hpc.objectives.layout import Layout
from prottrans_hpc.objectives.permutation import permute
from prottrans_hpc.recipe_objectives import Permutation

RECORD = architecture.get("prot_xlnet")
LENGTH = 48


def as_tensors(batch: Batch) -> Batch:
    return dataclasses.replace(batch, **{name: torch.from_numpy(value) for name, value in vars(batch).items() if isinstance(value, np.ndarray)})


def text_of(protein: str) -> np.ndarray:
    residues = np.frombuffer(RECORD.vocabulary.residue_table(), np.uint8)[np.frombuffer(protein.encode(), np.uint8)]
    return np.array([*residues.tolist(), 4, 3])


@pytest.fixture(scope="session")
def xlnet_pack(proteins) -> Callable[..., Batch]:
    """`pack(numbers of proteins)`: one packed batch; the order and the targets of a protein are the same in any company."""

    def make(numbers: list[int]) -> Batch:
        texts = [text_of(proteins[number]) for number in numbers]
        lengths = np.array([len(text) for text in texts], np.int64)
        begins = np.cumsum(lengths) - lengths
        ids = np.array(numbers, np.int64)
        samples = Samples(np.zeros_like(ids), ids, np.zeros_like(ids), lengths - 2)
        tokens = np.concatenate([*texts, np.empty(0, np.int64)])
        positions = np.arange(len(tokens)) - np.repeat(begins, lengths)
        layout = Layout(RECORD.vocabulary, samples, tokens, positions, np.append(begins, len(tokens)).astype(np.int32), begins)
        return as_tensors(permute(layout, Permutation(permute_within=64), 3))

    return make


@pytest.fixture(scope="session")
def xlnet_lanes(proteins) -> Callable[..., Batch]:
    """`lanes(step, lanes, resets, memory)`: the pieces that some lanes read in a step."""

    def make(step: int, lanes: list[int], *, resets: bool = False, memory: torch.Tensor | None = None) -> Batch:
        texts = [np.concatenate([text_of(protein) for protein in proteins[20 * lane : 20 * lane + 20]]) for lane in lanes]
        which = [np.repeat(np.arange(20), [len(protein) + 2 for protein in proteins[20 * lane : 20 * lane + 20]]) for lane in lanes]
        here = slice(step * LENGTH, (step + 1) * LENGTH)
        tokens, documents = (torch.from_numpy(np.stack([row[here] for row in rows])) for rows in (texts, which))
        carried = [int((row[: here.start] == row[here.start]).sum()) if resets else here.start for row in which]
        orders = torch.stack([torch.rand(LENGTH, generator=torch.Generator().manual_seed(97 * lane + step)).argsort() for lane in lanes])
        is_target = (orders % 6 == 0) & (tokens > 16)
        targets = is_target.flatten().nonzero().flatten()
        return Batch(
            tokens=tokens.flatten(),
            positions=torch.arange(LENGTH).repeat(len(lanes)),
            cu_seqlens=torch.arange(len(lanes) + 1, dtype=torch.int32) * LENGTH,
            target_positions=targets,
            targets=tokens.flatten()[targets],
            sample_ids=torch.tensor(lanes),
            max_length=LENGTH,
            num_residues=int((tokens > 16).sum()),
            permutation=torch.where(is_target | (tokens <= 16), orders, -1).flatten(),
            lanes=torch.tensor(lanes),
            documents=documents.flatten() if resets else None,
            carried=torch.tensor(carried),
            memory=memory,
        )

    return make


@pytest.fixture(scope="session")
def make_xlnet() -> Callable[..., ProtXLNet]:
    """`make_xlnet(size, **changes of the shape)`: matrices five times the usual, biases and norms not at their start."""

    def make(size: str = "tiny", **changes: object) -> ProtXLNet:
        model = build(dataclasses.replace(RECORD.size(size).shape, **({"initializer_range": 0.02} | changes)))
        model.initialise(7)
        generator = torch.Generator().manual_seed(8)
        with torch.no_grad():
            for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
                if parameter.ndim > 1:
                    parameter.mul_(5.0)
                else:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return model.eval()

    return make
