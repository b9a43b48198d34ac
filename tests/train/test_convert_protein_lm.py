"""ProteinLM out to HuggingFace's layout and back: what transformers opens, the tokens of real proteins, what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from prottrans_hpc import architecture
from prottrans_hpc.architecture import Batch
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.models.protein_lm import build
from prottrans_hpc.stage import run_stage
from prottrans_hpc.train import checkpoint

RECORD = architecture.get("protein_lm")


def export(source: Path, out: Path) -> None:
    run_stage("export", {"source": str(source), "to": "hf", "out": str(out), "json": False})


def import_(source: Path, out: Path) -> None:
    run_stage("import", {"source": str(source), "out": str(out), "json": False})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A checkpoint of a tiny ProteinLM, and its module."""
    model = build(RECORD.size("tiny").shape)
    model.initialise(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.1)
    path = tmp_path_factory.mktemp("trained") / "checkpoint"
    checkpoint.write_model_checkpoint(path, record=RECORD, shape=model.shape, weights=model.state_dict(), origin={"imported_from": "a test"})
    return path, model.eval()


@pytest.fixture(scope="module")
def exported(trained: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That checkpoint in HuggingFace layout. Tests must not change it."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    export(trained[0], folder)
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy to damage, without the manifest: as from anywhere else."""
    copy = tmp_path / "hf"
    copy.mkdir()
    for path in exported.iterdir():
        if path.name != "manifest.json":
            (copy / path.name).write_bytes(path.read_bytes())
    return copy


def edit_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value != "remove"}))


def edit_weights(folder: Path, **added: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors") | added
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_an_exported_folder_opens_in_transformers_and_computes_the_same(trained: tuple[Path, Any], exported: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference implementation: pip install 'prottrans-hpc[interop]'")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    inputs = tokenizer(" ".join("MKTUZJ"), return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[2, 17, 15, 24, 25, 30, 4]], "[CLS] in front, nothing behind, J unknown"
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.sep_token_id) == (0, 1, 3)
    masked, report = transformers.AutoModelForMaskedLM.from_pretrained(exported, output_loading_info=True)
    assert type(masked).__name__ == "MegatronBertForMaskedLM"
    assert not set(report["missing_keys"]) | set(report["mismatched_keys"])
    tokens, nothing = inputs["input_ids"][0], torch.empty(0, dtype=torch.long)
    batch = Batch(tokens, torch.arange(7), torch.tensor([0, 7], dtype=torch.int32), nothing, nothing, torch.zeros(1), 7, 6)
    ours = trained[1]
    found = masked(**inputs, output_hidden_states=True)
    hidden = ours.hidden(batch)
    assert (found.hidden_states[-1][0] - hidden).abs().max() <= 1e-5
    assert (found.logits[0] - ours.logits(hidden)).abs().max() <= 1e-5


def test_all_shipped_proteins_are_tokenised_as_the_reference_does(exported: Path, repository: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference implementation: pip install 'prottrans-hpc[interop]'")
    with gzip.open(repository / "data" / "mmseqs2_example_QUERY.fasta.gz", "rt") as file:
        proteins = ["".join(record.splitlines()[1:]) for record in file.read().split(">")[1:]]
    assert len(proteins) == 500
    vocabulary = repository / "tests" / "recorded" / "proteinlm" / "iupac_vocab.txt"
    reference = transformers.BertTokenizer(str(vocabulary), do_lower_case=False)
    own = transformers.AutoTokenizer.from_pretrained(exported)
    table = np.frombuffer(RECORD.vocabulary.residue_table(), np.uint8)
    for protein in proteins:
        wanted = reference(" ".join(protein))["input_ids"]
        assert wanted[-1] == 3, "BertTokenizer appends [SEP], which ProteinLM was not trained with"
        assert own(" ".join(protein))["input_ids"] == wanted[:-1] == [2, *table[np.frombuffer(protein.encode(), np.uint8)].tolist()]


def test_the_round_trip_changes_no_bit(trained: tuple[Path, Any], exported: Path, tmp_path: Path) -> None:
    import_(exported, tmp_path / "imported")
    record, shape, weights = checkpoint.load_model(tmp_path / "imported")
    original = trained[1].state_dict()
    assert (record.name, shape) == ("protein_lm", trained[1].shape)
    assert weights.keys() == original.keys()
    assert all(torch.equal(weights[name], original[name]) for name in original)
    export(tmp_path / "imported", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu', this architecture has 'gelu'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"vocab_size": 30}, "vocab_size is 30, the vocabulary has 31 tokens"),
        ({"hidden_size": "remove"}, "hidden_size is missing"),
        ({"num_attention_heads": 7}, "must be a multiple of num_heads 7"),
    ],
)
def test_a_foreign_configuration_is_told(folder: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ConfigError, match=said):
        import_(folder, tmp_path / "imported")


def test_heads_that_the_model_does_not_have_are_told(folder: Path, tmp_path: Path) -> None:
    edit_weights(folder, **{"cls.seq_relationship.weight": torch.zeros(2, 64)})
    with pytest.raises(ConfigError, match="the weights have a next-sentence head"):
        import_(folder, tmp_path / "imported")


def test_the_folder_of_the_authors_conversion_is_refused_with_what_can_be_read(folder: Path, repository: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_bytes((repository / "tests" / "recorded" / "proteinlm" / "config.json").read_bytes())
    with pytest.raises(ConfigError, match=r"cannot be read as protein_lm: .*vocab_size is 30, .*conversion for fine-tuning drops \[unused1\]"):
        import_(folder, tmp_path / "imported")
