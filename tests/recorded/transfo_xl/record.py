"""Record what transformers' Transformer-XL computes on real proteins: run again only to change what is recorded.

transformers 4.35.2 was the last release with it; it needs an environment of its own:

    python3.11 -m venv reference && reference/bin/pip install transformers==4.35.2 "numpy<2" torch
    PYTHONPATH=. reference/bin/python tests/recorded/transfo_xl/record.py

The weights are not recorded: `prottrans_hpc` draws the same ones from the seed, and a checksum of them is kept.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from prottrans_hpc import architecture
from prottrans_hpc.architectures.prot_txl import TxlShape
from prottrans_hpc.models.huggingface_transfo_xl import LAYOUT
from prottrans_hpc.models.prot_txl import build

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]
SHAPE = {"num_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 3, "head_size": 16, "memory_length": 40}
LANES, PIECE, PIECES = 2, 32, 4


def strong_model(seed: int = 5):
    """A small model with weights that are far from zero, the same wherever it is built."""
    model = build(TxlShape(**SHAPE)).eval()
    model.initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def lanes_of_tokens() -> torch.Tensor:
    """Two lanes of real proteins, int64 [LANES, PIECE * PIECES]."""
    with gzip.open(REPOSITORY / "data" / "mmseqs2_example_QUERY.fasta.gz", "rt") as file:
        proteins = ["".join(record.splitlines()[1:]) for record in file.read().split(">")[1:]]
    vocabulary = architecture.get("prot_txl").vocabulary
    table = np.frombuffer(vocabulary.residue_table(), np.uint8)
    text = [token for protein in proteins[:8] for token in (*table[np.frombuffer(protein.encode(), np.uint8)].tolist(), vocabulary.index("<eos>"))]
    length = PIECE * PIECES
    return torch.tensor([text[lane * length : (lane + 1) * length] for lane in range(LANES)])


def main() -> None:
    import transformers
    from transformers import TransfoXLConfig, TransfoXLLMHeadModel

    model = strong_model()
    config = LAYOUT.write_config(model.shape)
    recorded, losses = {}, {}
    for name, same_length in (("same_length", True), ("full", False)):
        reference = TransfoXLLMHeadModel(TransfoXLConfig(**{**config, "same_length": same_length})).eval()
        reference.load_state_dict({theirs: model.state_dict()[ours] for ours, theirs in LAYOUT.names(model.shape).items()}, strict=False)
        reference.tie_weights()
        memory = [torch.empty(0, LANES, model.shape.hidden_size)] * model.shape.num_layers
        tokens = lanes_of_tokens()
        losses[name] = []
        for piece in range(PIECES):
            ids = tokens[:, piece * PIECE : (piece + 1) * PIECE]
            with torch.no_grad():
                losses[name].append(float(reference(ids, mems=memory, labels=ids.clone()).losses.sum()))  # of each piece's tokens but the first
                found = reference(ids, mems=memory, output_hidden_states=True)
                memory = found.mems
            if piece == PIECES - 1:  # it depends on all before
                recorded |= {f"{name}.hidden.{i}": states.contiguous() for i, states in enumerate(found.hidden_states)}
                recorded[f"{name}.log_probabilities"] = found.prediction_scores.contiguous()
                recorded |= {f"{name}.memory.{i}": states.transpose(0, 1).contiguous() for i, states in enumerate(memory)}
    checksum = sum(float(parameter.detach().double().abs().sum()) for parameter in model.parameters())
    about = {"transformers": transformers.__version__, "torch": str(torch.__version__), "losses": losses, "weights": checksum, "config": config}
    save_file(recorded, HERE / "outputs.safetensors")
    (HERE / "about.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
