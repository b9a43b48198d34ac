"""ProtBert as HuggingFace's BERT: configuration keys, tensor names, WordPiece vocabulary file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..architecture import Vocabulary
from ..architectures.prot_bert import ARCHITECTURE, BertShape
from ..durable import read_json
from .huggingface import HuggingFaceLayout
from .huggingface_config import Keys, embedding_tables, tokenizer_settings, vocabulary_file, with_biases
from .weight_files import listed

KEYS = Keys(
    needed={
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_heads": "num_attention_heads",
        "max_positions": "max_position_embeddings",
        "vocabulary_size": "vocab_size",
    },
    with_default={"num_token_types": "type_vocab_size", "layer_norm_epsilon": "layer_norm_eps", "initializer_range": "initializer_range"},
    fixed={
        "vocab_size": (len(ARCHITECTURE.vocabulary.tokens),),
        "hidden_act": ("gelu",),
        "position_embedding_type": ("absolute", None),
        "is_decoder": (False, None),
        "add_cross_attention": (False, None),
        "tie_word_embeddings": (True, None),
    },
)

LAYER_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "output_norm": "output.LayerNorm",
}
_POOLER, _NEXT_SENTENCE = "bert.pooler.dense", "cls.seq_relationship"


def _write_config(shape: BertShape) -> dict[str, Any]:
    both = shape.has_pooler and shape.has_next_sentence
    values: dict[str, Any] = {"architectures": ["BertForPreTraining" if both else "BertForMaskedLM"], "model_type": "bert"}
    return values | KEYS.write(shape) | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0, "dtype": "float32"}


def _read_config(values: Mapping[str, Any], tensors: frozenset[str]) -> tuple[BertShape | None, list[str]]:
    heads = {"has_pooler": f"{_POOLER}.weight" in tensors, "has_next_sentence": f"{_NEXT_SENTENCE}.weight" in tensors}
    differences = KEYS.differences(values)
    return (None, differences) if differences else KEYS.read(BertShape, values, **heads)


def _names(shape: BertShape) -> dict[str, str]:
    modules = {
        "embeddings.norm": "bert.embeddings.LayerNorm",
        "head.dense": "cls.predictions.transform.dense",
        "head.norm": "cls.predictions.transform.LayerNorm",
    }
    for i in range(shape.num_layers):
        modules |= {f"layers.{i}.{ours}": f"bert.encoder.layer.{i}.{theirs}" for ours, theirs in LAYER_NAMES.items()}
    modules |= {"pooler": _POOLER} if shape.has_pooler else {}
    modules |= {"next_sentence": _NEXT_SENTENCE} if shape.has_next_sentence else {}
    return with_biases(modules) | embedding_tables("bert") | {"head.bias": "cls.predictions.bias"}


def _tokenizer_files(vocabulary: Vocabulary) -> dict[str, bytes]:
    first, last = vocabulary.prefix[0], vocabulary.suffix[0]
    special = {"unk_token": vocabulary.unknown, "sep_token": last, "pad_token": vocabulary.padding, "cls_token": first, "mask_token": vocabulary.mask}
    # The published folder lacks tokenizer_class, without which AutoTokenizer cannot open it.
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
    return {"vocab.txt": vocabulary_file(vocabulary), **tokenizer_settings(settings, special)}


def _tokenizer_problems(folder: Path, vocabulary: Vocabulary) -> list[str]:
    found = {}
    if (folder / "vocab.txt").is_file():
        found["vocab.txt"] = (folder / "vocab.txt").read_text(encoding="utf-8", errors="backslashreplace").splitlines()
    if (folder / "tokenizer.json").is_file():
        found["tokenizer.json"] = _tokens_of_json(read_json(folder / "tokenizer.json"))
    if not found:
        return ["it has neither vocab.txt nor tokenizer.json, so which row of the word table belongs to which residue is not known"]
    return [f"{name}: {line}" for name, tokens in found.items() for line in _vocabulary_differences(tokens, vocabulary)]


def _tokens_of_json(values: Any) -> list[str]:
    try:
        ids = {str(token): int(number) for token, number in values["model"]["vocab"].items()}
    except (KeyError, TypeError, AttributeError, ValueError):
        return []
    return sorted(ids, key=lambda token: ids[token])


def _vocabulary_differences(tokens: list[str], vocabulary: Vocabulary) -> list[str]:
    if len(tokens) != len(vocabulary.tokens):
        lacking, extra = sorted(set(vocabulary.tokens) - set(tokens)), sorted(set(tokens) - set(vocabulary.tokens))
        named = [f"{what} {listed([repr(token) for token in some])}" for what, some in (("without", lacking), ("with", extra)) if some]
        return [f"{len(tokens)} tokens instead of {len(vocabulary.tokens)}" + (f" ({', '.join(named)})" if named else "")]
    differing = [f"token {i} is {found!r}, not {token!r}" for i, (found, token) in enumerate(zip(tokens, vocabulary.tokens, strict=True)) if found != token]
    return [listed(differing, limit=4)] if differing else []


LAYOUT = HuggingFaceLayout(
    model_type="bert",
    classes=("BertForMaskedLM", "BertForPreTraining", "BertModel"),
    write_config=_write_config,
    read_config=_read_config,
    names=_names,
    aliases={"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.bias": "cls.predictions.bias"},
    ignored=frozenset({"bert.embeddings.position_ids"}),
    tokenizer_files=_tokenizer_files,
    tokenizer_problems=_tokenizer_problems,
    usage="""from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModel.from_pretrained(folder)
inputs = tokenizer("M K T A Y I A K Q R", return_tensors="pt")  # one blank between residues; write U, Z, O and B as X
residue_vectors = model(**inputs).last_hidden_state[0, 1:-1]""",
)
