"""ProtElectra is transformers' ELECTRA twice: same weights, same real proteins, same hidden states, scores and losses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from prottrans_hpc import architecture
from prottrans_hpc.architectures.prot_electra import GeneratorShape
from prottrans_hpc.models.huggingface_electra import LAYOUT
from prottrans_hpc.models.prot_electra import build, sample
from prottrans_hpc.recipe_objectives import ReplacedToken

transformers = pytest.importorskip("transformers", reason="the reference implementation: pip install 'prottrans-hpc[interop]'")

RECORD = architecture.get("prot_electra")
GENERATOR = LAYOUT.companions["generator"].layout
SHAPES = {
    "tiny": {},
    "equal widths": {"generator": GeneratorShape(num_layers=3, hidden_size=64, intermediate_size=96, num_heads=4)},
    "narrow embeddings": {"embedding_size": 48, "num_layers": 4},
}


@pytest.fixture(params=SHAPES)
def trio(request, strengthen):
    """One of ours, and their generator and discriminator with the same weights; the layouts' configurations and names connect them."""
    ours = strengthen(build(dataclasses.replace(RECORD.size("tiny").shape, **SHAPES[request.param]))).eval()
    theirs = []
    for layout, kind in ((GENERATOR, transformers.ElectraForMaskedLM), (LAYOUT, transformers.ElectraForPreTraining)):
        model = kind(transformers.ElectraConfig(**layout.write_config(ours.shape))).eval()
        absent = model.load_state_dict({name: ours.state_dict()[own] for own, name in layout.names(ours.shape).items()}, strict=False)
        assert set(absent.missing_keys) <= {*layout.aliases, *layout.ignored}
        assert not absent.unexpected_keys
        model.tie_weights()
        theirs.append(model)
    return ours, *theirs


def test_names_cover_every_tensor(trio):
    ours = trio[0]
    assert LAYOUT.names(ours.shape).keys() | GENERATOR.names(ours.shape).keys() == ours.state_dict().keys()


def test_hidden_states_scores_and_both_losses_agree_on_mixed_lengths(trio, corrupted, padded, states_of):
    ours, generator, discriminator = trio
    batch = corrupted(RECORD, ReplacedToken(), list(range(12)), max_residues=300)
    assert batch.max_length > 2 * int(batch.cu_seqlens.diff().min()), "the batch must mix lengths"
    tokens, real, labels = padded(batch)
    chosen = real.bool()
    guessed = generator(input_ids=tokens, attention_mask=real, labels=labels, output_hidden_states=True)
    assert (ours.generator_hidden(batch) - guessed.hidden_states[-1][chosen]).abs().max() <= 1e-5
    # Scores of these strong weights are larger than 1, and rounding goes with them.
    assert (ours.generator_logits(ours.generator_hidden(batch)) - guessed.logits[chosen]).abs().max() <= 1e-5 * max(1.0, guessed.logits.abs().max().item())

    forged = batch.tokens.clone()
    forged[batch.target_positions] = sample(guessed.logits[chosen][batch.target_positions].detach(), batch.draws)
    clean = batch.tokens.clone()
    clean[batch.target_positions] = batch.targets
    read = dataclasses.replace(batch, tokens=forged)
    is_forged = padded(dataclasses.replace(batch, tokens=(forged != clean).long()))[0]
    judged = discriminator(input_ids=padded(read)[0], attention_mask=real, labels=is_forged, output_hidden_states=True)
    states = states_of(ours, ours.discriminator.layers, read)
    assert len(states) == len(judged.hidden_states) == ours.shape.num_layers + 1
    for state, wanted in zip(states, judged.hidden_states, strict=True):
        assert (state - wanted[chosen]).abs().max() <= 1e-5
    assert (ours.logits(states[-1])[:, 0] - judged.logits[chosen]).abs().max() <= 1e-5 * max(1.0, judged.logits.abs().max().item())

    result = ours(batch)
    assert (result.parts / len(batch.targets)).tolist() == pytest.approx([guessed.loss.item(), judged.loss.item()], rel=1e-6)
    assert result.loss.item() / len(batch.targets) == pytest.approx((guessed.loss + 50.0 * judged.loss).item(), rel=1e-6)


def test_gradients_agree(trio, corrupted, padded):
    ours, generator, discriminator = trio
    batch = corrupted(RECORD, ReplacedToken(), list(range(30, 36)), max_residues=200)
    tokens, real, labels = padded(batch)
    ours(batch).loss.backward()
    guessed = generator(input_ids=tokens, attention_mask=real, labels=labels)
    clean, forged = batch.tokens.clone(), batch.tokens.clone()
    clean[batch.target_positions] = batch.targets
    forged[batch.target_positions] = sample(guessed.logits[real.bool()][batch.target_positions].detach(), batch.draws)
    read, is_forged = (padded(dataclasses.replace(batch, tokens=rows))[0] for rows in (forged, (forged != clean).long()))
    judged = discriminator(input_ids=read, attention_mask=real, labels=is_forged)
    ((guessed.loss + 50.0 * judged.loss) * len(batch.targets)).backward()
    wanted: dict[str, torch.Tensor] = {}
    for layout, model in ((GENERATOR, generator), (LAYOUT, discriminator)):
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        for own, name in layout.names(ours.shape).items():  # what is shared learns from both
            wanted[own] = wanted.get(own, 0.0) + gradients[name]
    largest = max(gradient.abs().max().item() for gradient in wanted.values())
    for name, parameter in ours.named_parameters():
        # A forged token may be [PAD], the first row, which transformers keeps from learning; ELECTRA's own code does not.
        first = 1 if name == "embeddings.words.weight" else 0
        assert (parameter.grad - wanted[name])[first:].abs().max() <= 1e-5 * largest, name
