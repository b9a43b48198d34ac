"""ProteinLM as HuggingFace's Megatron BERT: configuration keys, tensor names, and a tokenizer that appends no [SEP].

The authors' own conversion has a config.json without `model_type`, tensor names of its own and no prediction head;
such a folder is refused with what it lacks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..architecture import Vocabulary
from ..architectures.protein_lm import ARCHITECTURE, ProteinLmShape
from ..config import parse
from ..errors import ConfigError
from .huggingface import HuggingFaceLayout
from .huggingface_bert import LAYOUT as BERT

_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "max_positions": "max_position_embeddings",
    "vocabulary_size": "vocab_size",
}
_KEYS_WITH_DEFAULT = {
    "num_token_types": "type_vocab_size",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "layer_norm_epsilon": "layer_norm_eps",
    "initializer_range": "initializer_range",
}
_THEIR_DEFAULTS = {"type_vocab_size": 2}
"""Where a missing key means something else than in our shape."""

# What this project's modules compute; the first value is written, a missing key means the same.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "tie_word_embeddings": (True, None),
}

_LAYER = {
    "attention_norm": "attention.ln",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "feed_forward_norm": "ln",
    "up": "intermediate.dense",
    "down": "output.dense",
}


def _write_config(shape: ProteinLmShape) -> dict[str, Any]:
    values: dict[str, Any] = {"architectures": ["MegatronBertForMaskedLM"], "model_type": "megatron-bert"}
    values |= {theirs: getattr(shape, ours) for ours, theirs in (_KEYS | _KEYS_WITH_DEFAULT).items()}
    values |= {key: choices[0] for key, choices in _FIXED.items()}
    return values | {"pad_token_id": ARCHITECTURE.vocabulary.index(ARCHITECTURE.vocabulary.padding), "dtype": "float32"}


def _read_config(values: Mapping[str, Any], tensors: frozenset[str]) -> tuple[ProteinLmShape | None, list[str]]:
    values = _THEIR_DEFAULTS | dict(values)
    differences = [f"{key} is missing" for key in _KEYS.values() if key not in values]
    for key, choices in _FIXED.items():
        if key in values and values[key] not in choices:
            differences.append(f"{key} is {values[key]!r}, this architecture has {choices[0]!r}")
    num_tokens, rows = len(ARCHITECTURE.vocabulary.tokens), values.get("vocab_size")
    if isinstance(rows, int) and rows < num_tokens:
        hint = " (the authors' conversion for fine-tuning drops [unused1] and the prediction head)" if rows == num_tokens - 1 else ""
        differences.append(f"vocab_size is {rows}, the vocabulary has {num_tokens} tokens{hint}")
    differences += _foreign_parts(tensors)
    found = {ours: values[theirs] for ours, theirs in (_KEYS | _KEYS_WITH_DEFAULT).items() if theirs in values}
    if differences:
        return None, differences
    try:
        return parse(ProteinLmShape, found, source="its shape"), []
    except ConfigError as error:
        return None, [str(error)]


def _foreign_parts(tensors: frozenset[str]) -> list[str]:
    heads = {"bert.pooler.dense.weight": "a pooler", "cls.seq_relationship.weight": "a next-sentence head"}
    return [f"the weights have {what}, which ProteinLM does not have" for name, what in heads.items() if name in tensors]


def _names(shape: ProteinLmShape) -> dict[str, str]:
    modules = {"norm": "bert.encoder.ln", "head.dense": "cls.predictions.transform.dense", "head.norm": "cls.predictions.transform.LayerNorm"}
    for i in range(shape.num_layers):
        modules |= {f"layers.{i}.{ours}": f"bert.encoder.layer.{i}.{theirs}" for ours, theirs in _LAYER.items()}
    names = {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in modules.items() for part in ("weight", "bias")}
    tables = {"words": "word_embeddings", "positions": "position_embeddings", "token_types": "token_type_embeddings"}
    names |= {f"embeddings.{ours}.weight": f"bert.embeddings.{theirs}.weight" for ours, theirs in tables.items()}
    return names | {"head.bias": "cls.predictions.bias"}


def _tokenizer_files(vocabulary: Vocabulary) -> dict[str, bytes]:
    first = vocabulary.prefix[0]
    special = {
        "unk_token": vocabulary.unknown,
        "sep_token": "[SEP]",
        "pad_token": vocabulary.padding,
        "cls_token": first,
        "mask_token": vocabulary.mask,
    }
    ids = {token: vocabulary.index(token) for token in vocabulary.tokens}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": ids[token], "content": token, "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            for token in sorted(special.values(), key=lambda token: ids[token])
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        # transformers' BertTokenizer would append [SEP], which the model never saw.
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": first, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": first, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {first: {"id": first, "ids": [ids[first]], "tokens": [first]}},
        },
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": vocabulary.unknown},
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"], **special}
    return {
        "vocab.txt": ("\n".join(vocabulary.tokens) + "\n").encode("ascii"),
        "tokenizer.json": (json.dumps(tokenizer, indent=1) + "\n").encode("ascii"),
        "tokenizer_config.json": (json.dumps(settings, indent=1) + "\n").encode("ascii"),
        "special_tokens_map.json": (json.dumps(special, indent=1) + "\n").encode("ascii"),
    }


LAYOUT = HuggingFaceLayout(
    model_type="megatron-bert",
    classes=("MegatronBertForMaskedLM", "MegatronBertModel"),
    write_config=_write_config,
    read_config=_read_config,
    names=_names,
    aliases={"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.bias": "cls.predictions.bias"},
    ignored=frozenset({"bert.embeddings.position_ids"}),
    tokenizer_files=_tokenizer_files,
    tokenizer_problems=BERT.tokenizer_problems,
    own_keys=frozenset({"base_model", "num_hidden_layers"}),
    usage="""from transformers import AutoTokenizer, MegatronBertModel

tokenizer = AutoTokenizer.from_pretrained(folder)
model = MegatronBertModel.from_pretrained(folder, add_pooling_layer=False)
inputs = tokenizer("M K T A Y I A K Q R", return_tensors="pt")  # one blank between residues; [CLS] in front, nothing behind
residue_vectors = model(**inputs).last_hidden_state[0, 1:]""",
)
