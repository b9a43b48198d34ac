"""Transformer-XL: equal to the reference that was recorded, and the same function in one piece, in many, and in lanes."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from prottrans_hpc import architecture
from prottrans_hpc.architecture import Batch
from prottrans_hpc.architectures.prot_txl import activation_bytes, flops, lane_bytes, num_parameters
from prottrans_hpc.models import causal_attention, prot_txl
from prottrans_hpc.models.causal_attention import Sight, prepare
from prottrans_hpc.models.prot_txl import build

RECORD = architecture.get("prot_txl")
NOTHING = torch.empty(0, dtype=torch.long)
RECORDED = Path(__file__).resolve().parents[1] / "recorded" / "transfo_xl"


@pytest.fixture(scope="module")
def recording():
    """The script that recorded the reference, as a module: it also makes the model and the tokens."""
    spec = importlib.util.spec_from_file_location("record_transfo_xl", RECORDED / "record.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lanes_batch(tokens, *, memory=None, targets=True, carried=None, documents=None):
    """A piece of S lanes, int64 [S, L], each token but a piece's last predicting the next."""
    num, length = tokens.shape
    flat = tokens.flatten()
    positions = torch.arange(num * length)
    positions = positions[positions % length != length - 1] if targets else positions[:0]
    return Batch(
        tokens=flat,
        positions=torch.arange(length).repeat(num),
        cu_seqlens=torch.arange(0, num * length + 1, length, dtype=torch.int32),
        target_positions=positions,
        targets=flat[positions + 1] if targets else NOTHING,
        sample_ids=NOTHING,
        max_length=length,
        num_residues=num * length,
        lanes=torch.arange(num),
        memory=memory,
        carried=carried,
        documents=documents,
    )


def packed(rows):
    lengths = [len(row) for row in rows]
    return Batch(
        tokens=torch.cat(rows),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        target_positions=NOTHING,
        targets=NOTHING,
        sample_ids=NOTHING,
        max_length=max(lengths),
        num_residues=sum(lengths),
    )


def random_tokens(*shape, seed=1):
    return torch.randint(3, 28, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["same_length", "full"])
def test_segments_with_memory_are_those_of_transformers(recording, name, states_of):
    from safetensors.torch import load_file

    about, expected = json.loads((RECORDED / "about.json").read_text()), load_file(RECORDED / "outputs.safetensors")
    model = recording.strong_model().train(name == "full")  # no dropout; lanes in training see all of their memory
    assert sum(float(parameter.detach().double().abs().sum()) for parameter in model.parameters()) == pytest.approx(about["weights"], rel=1e-9)
    tokens, memory = recording.lanes_of_tokens(), None
    for piece in range(recording.PIECES):
        batch = lanes_batch(tokens[:, piece * recording.PIECE : (piece + 1) * recording.PIECE], memory=memory)
        with torch.no_grad():
            states, result = states_of(model, model.layers, batch), model(batch)
        assert float(result.loss) == pytest.approx(about["losses"][name][piece], rel=1e-6)
        memory = result.memory
    for number, hidden in enumerate(states):
        assert (hidden - expected[f"{name}.hidden.{number}"].flatten(0, 1)).abs().max() <= 1e-5
    log_probabilities = torch.log_softmax(model.logits(states[-1]), dim=-1)
    assert (log_probabilities - expected[f"{name}.log_probabilities"].flatten(0, 1)).abs().max() <= 1e-5
    for layer in range(model.shape.num_layers):
        assert (memory[:, layer] - expected[f"{name}.memory.{layer}"]).abs().max() <= 1e-5


def test_reading_at_once_or_in_pieces_of_any_length_is_the_same_function(recording):
    model, tokens = recording.strong_model(), random_tokens(150)
    with torch.no_grad():
        whole = model.hidden(packed([tokens]))
        for length in (7, 40, 64, 149):
            memory, parts = None, []
            for start in range(0, 150, length):
                batch = lanes_batch(tokens[None, start : start + length], memory=memory, targets=False)
                parts.append(model.hidden(batch))
                memory = model(batch).memory
            assert (torch.cat(parts) - whole).abs().max() <= 1e-5


def test_long_proteins_are_read_in_pieces_with_bounded_memory(recording, monkeypatch):
    model, rows = recording.strong_model(), [random_tokens(length, seed=length) for length in (30, 500, 20, 161, 700, 160)]
    with torch.no_grad():
        monkeypatch.setattr(prot_txl, "_SEGMENT_WINDOWS", 1 << 20)
        whole = model.hidden(packed(rows))
        monkeypatch.undo()
        longest = []
        monkeypatch.setattr(prot_txl, "prepare", lambda sight, **kwargs: longest.append(sight.max_length) or prepare(sight, **kwargs))
        assert (model.hidden(packed(rows)) - whole).abs().max() <= 1e-5
        assert (model.hidden(packed(rows[1:2])) - whole[30:530]).abs().max() <= 1e-5
    assert max(longest) == 4 * 40


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_lane_that_resets_reads_each_protein_by_itself(recording, mode):
    """Proteins of 50, 5, 70 tokens in one lane, in pieces of 25, beside a lane of another: what a token sees is of its own protein."""
    model = recording.strong_model().train(mode == "train")
    rows = [random_tokens(length, seed=length) for length in (50, 5, 70)]
    documents = torch.cat([torch.full((len(row),), number) for number, row in enumerate(rows)])
    starts = torch.cat([torch.arange(len(row)) for row in rows])
    lane, other, memory, found = torch.cat(rows), random_tokens(125, seed=9), None, []
    for begin in range(0, 125, 25):
        piece = slice(begin, begin + 25)
        batch = lanes_batch(
            torch.stack([lane[piece], other[piece]]),
            memory=memory,
            carried=torch.stack([starts[begin], torch.tensor(begin)]),
            documents=torch.cat([documents[piece], torch.zeros(25, dtype=torch.long)]),
        )
        with torch.no_grad():
            found.append(model.hidden(batch)[:25])
            memory = model(batch).memory
    if mode == "eval":
        with torch.no_grad():
            expected = model.hidden(packed(rows))
        assert (torch.cat(found) - expected).abs().max() <= 1e-5
    changed = random_tokens(5, seed=77)
    with torch.no_grad():
        first = model.hidden(
            lanes_batch(torch.cat([rows[0], changed, rows[2]])[None, 25:75], memory=None, documents=documents[25:75], carried=torch.zeros(1, dtype=torch.long))
        )
        again = model.hidden(lanes_batch(lane[None, 25:75], memory=None, documents=documents[25:75], carried=torch.zeros(1, dtype=torch.long)))
    assert torch.equal(first[:25], again[:25]) and torch.equal(first[30:], again[30:]) and not torch.equal(first[25:30], again[25:30])


def test_memory_is_context_and_not_trained_through(recording):
    model = recording.strong_model().train()
    tokens = random_tokens(3, 60)
    memory = model(lanes_batch(tokens[:, :30])).memory
    assert not memory.requires_grad and memory.shape == (3, 2, 30, 32)
    with_memory, without = (model(lanes_batch(tokens[:, 30:], memory=some)) for some in (memory, None))
    assert abs(with_memory.loss - without.loss) > 1e-2
    assert with_memory.memory.shape == (3, 2, 40, 32), "as many tokens as the memory holds, not more"
    with_memory.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


CASES = {
    "packed": Sight(torch.tensor([0, 5, 6, 13], dtype=torch.int32), 7),
    "window": Sight(torch.tensor([0, 300, 320], dtype=torch.int32), 300, window=64),
    "memory": Sight(torch.tensor([0, 20, 40], dtype=torch.int32), 20, num_memory=13),
    "carried": Sight(torch.tensor([0, 20, 40, 60], dtype=torch.int32), 20, num_memory=13, carried=torch.tensor([0, 5, 40])),
    "documents": Sight(
        torch.tensor([0, 20, 40], dtype=torch.int32),
        20,
        num_memory=13,
        carried=torch.tensor([7, 40]),
        documents=torch.tensor([0] * 7 + [1] * 13 + [7] + [8] * 2 + [9] * 17),
    ),
    "all": Sight(
        torch.tensor([0, 150, 300], dtype=torch.int32), 150, num_memory=30, carried=torch.tensor([30, 3]), documents=torch.arange(300) // 140, window=33
    ),
}


def by_definition(sight, query, key, value, table, content, distance):
    """Every pair by itself; all of the memory is among the keys."""
    scale, result = query.shape[-1] ** -0.5, []
    for number, (start, end) in enumerate(zip(sight.cu_seqlens[:-1].tolist(), sight.cu_seqlens[1:].tolist(), strict=True)):
        carried = sight.num_memory if sight.carried is None else min(sight.num_memory, int(sight.carried[number]))
        documents = torch.zeros(end) if sight.documents is None else sight.documents
        for row in range(start, end):
            to_row = sight.num_memory + row - start
            far = [distance for distance in range(to_row + 1) if sight.window is None or distance < sight.window]
            own = [d for d in far if (documents[row - d] if d <= row - start else documents[start]) == documents[row]]
            seen = torch.tensor([d for d in own if d - (row - start) <= carried])
            keys = start + number * sight.num_memory + to_row - seen
            scores = ((query[row] + content) * key[keys]).sum(-1) + ((query[row] + distance) * table[len(table) - 1 - seen]).sum(-1)
            result.append((torch.softmax(scores * scale, dim=0)[..., None] * value[keys]).sum(0))
    return torch.stack(result)


@pytest.mark.parametrize("name", CASES)
def test_attention_is_what_its_definition_says_and_so_is_its_gradient(name):
    sight, generator = CASES[name], torch.Generator().manual_seed(0)
    num_rows, num_sequences = int(sight.cu_seqlens[-1]), len(sight.cu_seqlens) - 1
    attention, flex = prepare(sight, backend="blocks"), prepare(sight, backend="flex")
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    inputs = [draw(num_rows, 3, 8), draw(num_sequences, sight.num_memory, 24), draw(num_rows, 24), draw(flex.num_distances, 3, 8), draw(3, 8), draw(3, 8)]
    upstream, found = draw(num_rows, 3, 8), []
    for attend, join, rows in ((None, flex.join, flex.num_distances), (attention.attend, attention.join, attention.num_distances)):
        query, memory, hidden, table, *biases = (part.clone().requires_grad_() for part in inputs)
        keys = (join(memory, hidden) if sight.num_memory else hidden).unflatten(-1, (3, 8))
        arguments = (query, keys, keys * 2, table[len(table) - rows :], *biases)
        result = attend(*arguments) if attend else by_definition(sight, *arguments)
        gradients = torch.autograd.grad((result * upstream).sum(), (query, hidden, table, *biases, *([memory] if sight.num_memory else [])))
        found.append((result.detach(), *gradients))
    assert all((mine - theirs).abs().max() <= 1e-12 for mine, theirs in zip(*found, strict=True))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("name", ["window", "documents", "all"])
def test_the_gpus_back_end_computes_the_same(name):
    sight, generator = CASES[name], torch.Generator().manual_seed(0)
    num_rows, num_sequences = int(sight.cu_seqlens[-1]), len(sight.cu_seqlens) - 1
    query, hidden, memory = (torch.randn(shape, generator=generator) for shape in ((num_rows, 3, 8), (num_rows, 24), (num_sequences, sight.num_memory, 24)))
    biases, results = torch.randn(2, 3, 8, generator=generator), []
    table = torch.randn(sight.max_length + sight.num_memory, 3, 8, generator=generator)
    for backend in ("blocks", "flex"):
        attention = prepare(sight, backend=backend)
        keys = (attention.join(memory, hidden) if sight.num_memory else hidden).unflatten(-1, (3, 8))
        with torch.no_grad():
            results.append(attention.attend(query, keys, keys * 2, table[len(table) - attention.num_distances :], *biases))
    assert (results[0] - results[1]).abs().max() <= 1e-5


def test_dropout_is_on_in_training_only(recording):
    model = build(dataclasses.replace(recording.strong_model().shape, dropout=0.15))
    model.load_state_dict(recording.strong_model().state_dict())
    batch = lanes_batch(random_tokens(2, 30))
    with torch.no_grad():
        trained = [model.train().hidden(batch) for _ in range(2)]
        read = [model.eval().hidden(batch) for _ in range(2)]
    assert not torch.equal(*trained) and torch.equal(*read)
    assert torch.equal(read[0], recording.strong_model().hidden(batch))
    assert 0.10 < (trained[0] == 0).float().mean() < 0.20


@pytest.mark.parametrize(("size", "count"), [("prot_txl", 409_251_868), ("prot_txl_bfd", 562_363_932), ("small", None), ("tiny", None)])
def test_parameters_are_counted_to_the_digit(size, count):
    shape = RECORD.size(size).shape
    with torch.device("meta"):
        module = build(shape)
    assert num_parameters(shape) == sum(parameter.numel() for parameter in module.parameters())
    assert count in (None, num_parameters(shape))


def test_flops_are_those_of_the_products(monkeypatch):
    monkeypatch.setattr(causal_attention, "_BLOCK", 1)  # so that nothing behind a query is computed and thrown away
    model = build(RECORD.size("tiny").shape).train()
    model.initialise(1)
    tokens = random_tokens(2, 24)
    memory = torch.zeros(2, 2, 64, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(dataclasses.replace(lanes_batch(tokens, memory=memory), target_positions=torch.arange(48), targets=tokens.flatten()))
    table = 2 * 2 * (24 + 64) * 64 * 64  # the distances of both layers, which are left out
    assert counter.get_total_flops() - table == pytest.approx(flops(model.shape, [24, 24]) / 3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.15])
def test_activation_bytes_are_those_of_the_saved_tensors_to_two_percent(precision, dropout):
    model = build(dataclasses.replace(RECORD.size("small").shape, dropout=dropout, num_layers=3)).train()
    model.initialise(1)
    tokens = random_tokens(3, 200)
    memory = torch.randn(3, 3, 256, 256)
    batch = dataclasses.replace(lanes_batch(tokens, memory=memory), target_positions=torch.arange(600), targets=tokens.flatten())
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), memory)}
    shapes = {tuple(sorted(parameter.shape)) for parameter in model.parameters()} | {(256, 512)}  # a part of one
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and not (tensor.dtype == torch.bfloat16 and tuple(sorted(tensor.shape)) in shapes):
            saved.setdefault(storage.data_ptr(), tensor)
        return tensor

    narrow = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), narrow:
        result = model(batch)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    assert result.loss.requires_grad
    assert activation_bytes(model.shape, [200] * 3, precision) == pytest.approx(measured, rel=0.02)


def test_a_lanes_memory_has_the_stated_bytes():
    model = build(RECORD.size("tiny").shape).train()
    model.initialise(1)
    memory = model(lanes_batch(random_tokens(3, 100))).memory
    assert memory.untyped_storage().nbytes() == 3 * lane_bytes(model.shape, 100)
    assert 44_928 * lane_bytes(RECORD.size("prot_txl_bfd").shape, 512) == 44_928 * 64 * 2**20
