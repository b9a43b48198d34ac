"""ProtElectra on packed input: who learns from what, the residues that are forged, and its arithmetic is that of its record."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from prottrans_hpc import architecture
from prottrans_hpc.architectures.prot_electra import activation_bytes, discriminator_parameters, flops, num_parameters
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.models.prot_electra import build, sample
from prottrans_hpc.recipe_objectives import Masked, ReplacedToken

RECORD = architecture.get("prot_electra")
TINY = RECORD.size("tiny").shape


@pytest.fixture
def model(strengthen):
    return strengthen(build(TINY))


@pytest.fixture
def batch(corrupted):
    return corrupted(RECORD, ReplacedToken(), [0, 1, 2, 3], max_residues=80)


@pytest.mark.parametrize("size", RECORD.sizes)
def test_the_arithmetic_of_parameters_is_that_of_the_modules(size):
    shape = RECORD.size(size).shape
    with torch.device("meta"):
        built = build(shape)
    assert sum(parameter.numel() for parameter in built.parameters()) == num_parameters(shape)
    alone = sum(parameter.numel() for name, parameter in built.named_parameters() if not name.startswith("generator"))
    assert alone == discriminator_parameters(shape) == num_parameters(dataclasses.replace(shape, generator=None))


def test_a_draw_picks_from_the_inverse_of_the_distribution():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()[None].repeat(6, 1)
    draws = torch.tensor([0.0, 0.0999, 0.1001, 0.5999, 0.6001, 1.0], dtype=torch.float64)
    assert sample(logits, draws).tolist() == [0, 0, 1, 2, 3, 3]
    num = 40_000
    draws = torch.rand(num, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    counts = sample(logits[:1].expand(num, -1), draws).bincount(minlength=4)
    assert (counts / num - torch.tensor([0.1, 0.2, 0.3, 0.4])).abs().max() < 0.015


def test_the_loss_is_the_weighted_sum_of_its_parts(model, batch):
    result = model(batch)
    tokens_per_target = len(batch.tokens) / len(batch.targets)
    with torch.no_grad():
        logits = model.generator_logits(model.generator_hidden(batch))[batch.target_positions]
        guesses = sample(logits, batch.draws)
        forged = torch.zeros(len(batch.tokens))
        forged[batch.target_positions] = (guesses != batch.targets).float()
        read = batch.tokens.clone()
        read[batch.target_positions] = guesses
        scores = model.logits(model.hidden(dataclasses.replace(batch, tokens=read)))[:, 0]
    generator = functional.cross_entropy(logits, batch.targets, reduction="sum")
    discriminator = functional.binary_cross_entropy_with_logits(scores, forged, reduction="sum") / tokens_per_target
    assert result.parts.tolist() == pytest.approx([generator.item(), discriminator.item()], rel=1e-5)
    assert result.loss.item() == pytest.approx((generator + 50.0 * discriminator).item(), rel=1e-5)
    assert result.num_correct == (logits.argmax(-1) == batch.targets).sum()
    assert 0 < forged.sum() < len(batch.targets), "some guesses are right, some are not"


def test_no_special_token_and_no_unmasked_neighbour_is_forged(model, batch):
    """Only targets may differ from the protein, those that the generator saw unmasked included."""
    seen = []
    model.embeddings.register_forward_hook(lambda _module, arguments, _result: seen.append(arguments[0]))
    model(batch)
    generator_read, discriminator_read = seen
    assert torch.equal(generator_read, batch.tokens)
    clean = batch.tokens.clone()
    clean[batch.target_positions] = batch.targets
    differing = (discriminator_read != clean).nonzero().flatten()
    assert set(differing.tolist()) <= set(batch.target_positions.tolist())
    assert not (discriminator_read == RECORD.vocabulary.index("[MASK]"))[clean != 4].all()
    unmasked = batch.target_positions[batch.tokens[batch.target_positions] != 4]
    assert (discriminator_read[unmasked] != clean[unmasked]).any(), "a residue that the generator saw is replaced, too"


def test_the_recipes_weight_and_the_steps_tokens_reach_the_loss(model, batch):
    whole = model(batch)
    assert len(batch.tokens) / len(batch.targets) == pytest.approx(4.0, rel=0.3)
    told = model(dataclasses.replace(batch, loss_weights=(1.0, 7.0), tokens_per_target=2 * len(batch.tokens) / len(batch.targets)))
    assert told.parts[0] == whole.parts[0]
    assert told.parts[1].item() == pytest.approx(whole.parts[1].item() / 2, rel=1e-6)
    assert told.loss.item() == pytest.approx((told.parts[0] + 7.0 * told.parts[1]).item(), rel=1e-6)


def test_micro_batches_add_up_to_the_whole_step(model, corrupted):
    ids = list(range(6))
    whole = corrupted(RECORD, ReplacedToken(), ids, max_residues=60)
    share = len(whole.tokens) / len(whole.targets)
    parts = [dataclasses.replace(corrupted(RECORD, ReplacedToken(), half, max_residues=60), tokens_per_target=share) for half in (ids[:2], ids[2:])]
    together = model(whole)
    assert sum(model(part).loss.item() for part in parts) == pytest.approx(together.loss.item(), rel=1e-6)
    assert torch.stack([model(part).parts for part in parts]).sum(0).tolist() == pytest.approx(together.parts.tolist(), rel=1e-6)


def test_the_discriminator_teaches_the_generator_nothing_but_the_shared_embeddings(model, batch):
    model(dataclasses.replace(batch, loss_weights=(0.0, 1.0))).loss.backward()
    taught = {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert not any(name.startswith("generator") for name in taught)
    assert {"embeddings.words.weight", "embeddings.norm.weight", "discriminator_head.score.weight"} <= taught
    model.zero_grad()
    model(dataclasses.replace(batch, loss_weights=(1.0, 0.0))).loss.backward()
    taught = {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert not any(name.startswith("discriminator") for name in taught)
    assert {"embeddings.words.weight", "embeddings.norm.weight", "generator_head.dense.weight"} <= taught


@pytest.mark.parametrize("case", ["no sequence", "no target"])
def test_a_batch_without_targets_or_tokens_is_connected_to_every_parameter(model, batch, corrupted, case):
    if case == "no sequence":
        empty = corrupted(RECORD, ReplacedToken(), [])
    else:
        nothing = {name: getattr(batch, name)[:0] for name in ("target_positions", "targets", "draws")}
        empty = dataclasses.replace(batch, **nothing, tokens_per_target=4.0)
    result = model(empty)
    result.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert result.parts[0] == 0.0
    assert (result.parts[1] == 0.0) == (case == "no sequence"), "the discriminator learns from every token"


def test_other_objectives_and_a_lone_discriminator_are_refused(model, batch, corrupted):
    with pytest.raises(ConfigError, match="this batch is of another objective"):
        model(corrupted(RECORD, Masked(), [0], max_residues=50))
    alone = build(dataclasses.replace(TINY, generator=None))
    alone.initialise(1)
    with pytest.raises(ConfigError, match="this one has no generator"):
        alone(batch)
    assert alone.hidden(batch).shape == (len(batch.tokens), 64)


def test_bf16_autocast_trains_with_the_loss_of_fp32(model, batch):
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(batch)
        assert model.generator_hidden(batch).dtype == torch.float32, "sums run on in fp32"
    assert abs(narrow.loss - exact.loss) <= 0.05 * exact.loss  # a guess or two may differ


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_flops_are_those_that_torch_counts(size, strengthen, corrupted):
    built = strengthen(build(RECORD.size(size).shape))
    built.backend = "dense"
    batch = corrupted(RECORD, ReplacedToken(), [0], max_residues=200)
    length = len(batch.tokens)
    num_targets = round(0.25 * length)  # the record counts the generator's head for 25 % of the tokens, whatever the batch
    draws = torch.full((num_targets,), 0.5, dtype=torch.float64)
    batch = dataclasses.replace(batch, target_positions=torch.arange(num_targets), targets=torch.full((num_targets,), 7), draws=draws)
    with FlopCounterMode(display=False) as counter:
        built(batch).loss.backward()
    assert counter.get_total_flops() == pytest.approx(flops(built.shape, [length]), rel=1e-3)


@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activation_bytes_are_those_of_the_saved_tensors_to_two_percent(size, precision, strengthen, corrupted, saved_bytes):
    built = strengthen(build(RECORD.size(size).shape))
    batch = corrupted(RECORD, ReplacedToken(), list(range(6)), max_residues=200)
    measured = saved_bytes(built, batch, precision)
    assert activation_bytes(built.shape, batch.cu_seqlens.diff().tolist(), precision) == pytest.approx(measured, rel=0.02)
