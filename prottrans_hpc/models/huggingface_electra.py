"""ProtElectra as HuggingFace's ELECTRA: the discriminator in the folder itself, the generator in generator/ within it.

The embeddings, which the two share, are written into both and must be equal where both are read. A folder without
generator/, as the released discriminator, is read as a discriminator alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..architectures.prot_electra import ElectraShape, GeneratorShape
from . import huggingface_bert
from .huggingface import Companion, HuggingFaceLayout
from .huggingface_config import Keys, embedding_tables, with_biases

_OWN = ("num_layers", "hidden_size", "intermediate_size", "num_heads")
"""What a generator has of its own; the rest is the discriminator's, too."""
_KEYS = Keys({**huggingface_bert.KEYS.needed, "embedding_size": "embedding_size"}, huggingface_bert.KEYS.with_default, huggingface_bert.KEYS.fixed)


def _config(shape: ElectraShape, own: ElectraShape | GeneratorShape, name: str) -> dict[str, Any]:
    values: dict[str, Any] = {"architectures": [name], "model_type": "electra"}
    values |= _KEYS.write(shape) | {_KEYS.needed[ours]: getattr(own, ours) for ours in _OWN}
    return values | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0, "dtype": "float32"}


def _write_discriminator_config(shape: ElectraShape) -> dict[str, Any]:
    return _config(shape, shape, "ElectraForPreTraining")


def _write_generator_config(shape: ElectraShape) -> dict[str, Any]:
    assert shape.generator, "its names are empty without it"
    return _config(shape, shape.generator, "ElectraForMaskedLM")


def _read_config(values: Mapping[str, Any], _tensors: frozenset[str]) -> tuple[ElectraShape | None, list[str]]:
    """Either of the two models, as if it were a discriminator alone."""
    differences = _KEYS.differences(values)
    return (None, differences) if differences else _KEYS.read(ElectraShape, values, generator=None)


def _join(shape: ElectraShape, other: ElectraShape) -> tuple[ElectraShape, list[str]]:
    """The pair of a discriminator and a generator, both read by `_read_config`, and what they do not share though they must."""
    problems = [
        f"{key} is {getattr(other, name)!r}, the discriminator's is {getattr(shape, name)!r}"
        for name, key in _KEYS.by_field.items()
        if name not in (*_OWN, "initializer_range") and getattr(other, name) != getattr(shape, name)
    ]
    return dataclasses.replace(shape, generator=GeneratorShape(**{name: getattr(other, name) for name in _OWN})), problems


def _encoder_names(own: ElectraShape | GeneratorShape, ours: str, heads: Mapping[str, str], embedding_size: int) -> dict[str, str]:
    modules = {"embeddings.norm": "electra.embeddings.LayerNorm", **heads}
    if own.hidden_size != embedding_size:
        modules[f"{ours}.project"] = "electra.embeddings_project"
    for i in range(own.num_layers):
        modules |= {f"{ours}.layers.{i}.{name}": f"electra.encoder.layer.{i}.{theirs}" for name, theirs in huggingface_bert.LAYER_NAMES.items()}
    return with_biases(modules) | embedding_tables("electra")


def _discriminator_names(shape: ElectraShape) -> dict[str, str]:
    heads = {"discriminator_head.dense": "discriminator_predictions.dense", "discriminator_head.score": "discriminator_predictions.dense_prediction"}
    return _encoder_names(shape, "discriminator", heads, shape.embedding_size)


def _generator_names(shape: ElectraShape) -> dict[str, str]:
    if not shape.generator:
        return {}
    heads = {"generator_head.dense": "generator_predictions.dense", "generator_head.norm": "generator_predictions.LayerNorm"}
    return _encoder_names(shape.generator, "generator", heads, shape.embedding_size) | {"generator_head.bias": "generator_lm_head.bias"}


_GENERATOR = HuggingFaceLayout(
    model_type="electra",
    classes=("ElectraForMaskedLM",),
    write_config=_write_generator_config,
    read_config=_read_config,
    names=_generator_names,
    aliases={"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
    ignored=frozenset({"electra.embeddings.position_ids"}),
    tokenizer_files=huggingface_bert.LAYOUT.tokenizer_files,
    tokenizer_problems=huggingface_bert.LAYOUT.tokenizer_problems,
    usage="",
)

LAYOUT = HuggingFaceLayout(
    model_type="electra",
    classes=("ElectraForPreTraining", "ElectraModel"),
    write_config=_write_discriminator_config,
    read_config=_read_config,
    names=_discriminator_names,
    aliases={},
    ignored=frozenset({"electra.embeddings.position_ids"}),
    tokenizer_files=huggingface_bert.LAYOUT.tokenizer_files,
    tokenizer_problems=huggingface_bert.LAYOUT.tokenizer_problems,
    usage="""from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForPreTraining, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModel.from_pretrained(folder)
inputs = tokenizer("M K T A Y I A K Q R", return_tensors="pt")  # one blank between residues; write U, Z, O and B as X
residue_vectors = model(**inputs).last_hidden_state[0, 1:-1]
discriminator = AutoModelForPreTraining.from_pretrained(folder)  # log odds that a residue was replaced
generator = AutoModelForMaskedLM.from_pretrained(f"{folder}/generator")  # only where the folder generator/ exists""",
    companions={"generator": Companion(_GENERATOR, _join)},
)
