"""A causal model that was trained to read proteins backwards embeds them so, and its rows come in the order of the residues."""

from __future__ import annotations

import dataclasses

import torch

from prottrans_hpc import architecture
from prottrans_hpc.embed.batches import build_encoder
from prottrans_hpc.embed.model import Model
from prottrans_hpc.models.prot_txl import build

PROTEINS = [b"MKTAYIAKQR", b"GGW", b"ACDEFGHIKLMNPQRSTVWY"]


def test_a_reversed_model_sees_what_follows_a_residue():
    record = architecture.get("prot_txl")
    module = build(record.size("tiny").shape).eval()
    module.initialise(1)
    forward = Model(record, module.shape, module, build_encoder(record.vocabulary), torch.device("cpu"), None)
    backward = dataclasses.replace(forward, is_reversed=True)
    expected = torch.cat([forward.hidden([protein[::-1]]).flip(0) for protein in PROTEINS])
    assert (backward.hidden(PROTEINS) - expected).abs().max() <= 1e-5
    other = [b"MKTAYIAKQW", *PROTEINS[1:]]
    changed = [(model.hidden(other) != model.hidden(PROTEINS)).any(dim=1)[:10] for model in (forward, backward)]
    assert changed[0].tolist() == [False] * 9 + [True] and bool(changed[1].all())
