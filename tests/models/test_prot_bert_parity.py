"""ProtBert is the function of transformers' BERT: same weights, same real proteins, same numbers."""

from __future__ import annotations

import pytest
import torch

from prottrans_hpc.models.huggingface_bert import LAYOUT

transformers = pytest.importorskip("transformers", reason="the reference implementation: pip install 'prottrans-hpc[interop]'")


@pytest.fixture(params=["tiny", "deep", "wide heads"])
def pair(request, make_model):
    """One of ours, and theirs with the same weights; the layout's own configuration and names connect them."""
    changes = {"tiny": {}, "deep": {"num_layers": 6, "hidden_size": 96, "num_heads": 3}, "wide heads": {"hidden_size": 128, "num_heads": 2}}[request.param]
    ours = make_model("tiny", **changes).eval()
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**LAYOUT.write_config(ours.shape))).eval()
    state = ours.state_dict()
    absent = theirs.load_state_dict({name: state[own] for own, name in LAYOUT.names(ours.shape).items()}, strict=False)
    assert set(absent.missing_keys) <= {*LAYOUT.aliases, *LAYOUT.ignored}
    assert not absent.unexpected_keys
    theirs.tie_weights()
    return ours, theirs


def padded(batch):
    """The same sequences as transformers takes them: rows of equal length with a mask."""
    rows = batch.tokens.split(batch.cu_seqlens.diff().tolist())
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    targets = torch.full_like(batch.tokens, -100)
    targets[batch.target_positions] = batch.targets
    labels = torch.nn.utils.rnn.pad_sequence(targets.split([len(row) for row in rows]), batch_first=True, padding_value=-100)
    real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return tokens, real, labels


def reference(theirs, batch):
    tokens, real, labels = padded(batch)
    states = theirs.bert(input_ids=tokens, attention_mask=real, output_hidden_states=True).hidden_states
    logits = theirs.cls.predictions(states[-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    chosen = real.bool()
    return [state[chosen] for state in states], logits[chosen], loss


def test_all_hidden_states_logits_and_losses_agree_on_mixed_lengths(pair, pack, proteins, states_of):
    ours, theirs = pair
    batch = pack(proteins[:16])
    assert batch.max_length > 2 * int(batch.cu_seqlens.diff().min()), "the batch must mix lengths"
    wanted_states, wanted_logits, wanted_loss = reference(theirs, batch)
    states = states_of(ours, ours.layers, batch)
    assert len(states) == len(wanted_states) == ours.shape.num_layers + 1
    for state, wanted in zip(states, wanted_states, strict=True):
        assert (state - wanted).abs().max() <= 1e-5
    assert (ours.logits(states[-1]) - wanted_logits).abs().max() <= 1e-5
    assert ours(batch).loss.item() == pytest.approx(wanted_loss.item(), rel=1e-6)


def test_gradients_agree(pair, pack, proteins):
    ours, theirs = pair
    batch = pack(proteins[30:38])
    ours(batch).loss.backward()
    reference(theirs, batch)[2].backward()
    gradients = dict(theirs.named_parameters())
    trained = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.requires_grad}
    largest = max(gradient.abs().max().item() for gradient in trained.values())
    for own, name in LAYOUT.names(ours.shape).items():
        if own in trained:
            assert (trained[own] - gradients[name].grad).abs().max() <= 1e-5 * largest, own


def test_the_class_that_the_published_weights_load_into_gives_the_same_logits(pair, pack, proteins):
    """BertForMaskedLM, whole, with its own loss: a mean over targets."""
    ours, theirs = pair
    masked = transformers.BertForMaskedLM(theirs.config).eval()
    masked.load_state_dict(theirs.state_dict(), strict=False)
    masked.tie_weights()
    batch = pack(proteins[50:58])
    tokens, real, labels = padded(batch)
    found = masked(input_ids=tokens, attention_mask=real, labels=labels)
    assert (ours.logits(ours.hidden(batch)) - found.logits[real.bool()]).abs().max() <= 1e-5
    assert ours(batch).loss.item() / len(batch.targets) == pytest.approx(found.loss.item(), rel=1e-6)


def test_the_residue_table_tokenises_as_bert_tokenizer_does(repository, tokens_of, query_proteins):
    folder = repository / "tests" / "recorded" / "huggingface_prot_bert"
    tokenizer = transformers.BertTokenizer.from_pretrained(folder, do_lower_case=False)
    assert len(query_proteins) == 500
    for protein in query_proteins:
        assert tokenizer(" ".join(protein))["input_ids"] == tokens_of(protein).tolist()


def test_rare_residues_have_tokens_of_their_own(repository, tokens_of):
    tokenizer = transformers.BertTokenizer.from_pretrained(repository / "tests" / "recorded" / "huggingface_prot_bert", do_lower_case=False)
    assert tokenizer(" ".join("MKTUZOBXJ"))["input_ids"] == tokens_of("MKTUZOBXJ").tolist()
