"""ProteinLM as HuggingFace's Megatron BERT: configuration keys, tensor names, and a tokenizer that appends no [SEP].

The authors' own conversion has a config.json without `model_type`, tensor names of its own and no prediction head;
such a folder is refused with what it lacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..architecture import Vocabulary
from ..architectures.protein_lm import ARCHITECTURE, ProteinLmShape
from .huggingface import HuggingFaceLayout
from .huggingface_bert import KEYS as BERT_KEYS
from .huggingface_bert import LAYOUT as BERT
from .huggingface_config import Keys, embedding_tables, json_file, tokenizer_settings, vocabulary_file, with_biases

_KEYS = Keys(
    needed=BERT_KEYS.needed,
    with_default={**BERT_KEYS.with_default, "dropout": "hidden_dropout_prob", "attention_dropout": "attention_probs_dropout_prob"},
    fixed={"hidden_act": ("gelu",), "is_decoder": (False, None), "add_cross_attention": (False, None), "tie_word_embeddings": (True, None)},
)
_THEIR_DEFAULTS = {"type_vocab_size": 2}
"""Where a missing key means something else than in our shape."""

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
    return values | _KEYS.write(shape) | {"pad_token_id": ARCHITECTURE.vocabulary.index(ARCHITECTURE.vocabulary.padding), "dtype": "float32"}


def _read_config(values: Mapping[str, Any], tensors: frozenset[str]) -> tuple[ProteinLmShape | None, list[str]]:
    values = _THEIR_DEFAULTS | dict(values)
    differences = _KEYS.differences(values)
    num_tokens, rows = len(ARCHITECTURE.vocabulary.tokens), values.get("vocab_size")
    if isinstance(rows, int) and rows < num_tokens:
        hint = " (the authors' conversion for fine-tuning drops [unused1] and the prediction head)" if rows == num_tokens - 1 else ""
        differences.append(f"vocab_size is {rows}, the vocabulary has {num_tokens} tokens{hint}")
    differences += _foreign_parts(tensors)
    return (None, differences) if differences else _KEYS.read(ProteinLmShape, values)


def _foreign_parts(tensors: frozenset[str]) -> list[str]:
    heads = {"bert.pooler.dense.weight": "a pooler", "cls.seq_relationship.weight": "a next-sentence head"}
    return [f"the weights have {what}, which ProteinLM does not have" for name, what in heads.items() if name in tensors]


def _names(shape: ProteinLmShape) -> dict[str, str]:
    modules = {"norm": "bert.encoder.ln", "head.dense": "cls.predictions.transform.dense", "head.norm": "cls.predictions.transform.LayerNorm"}
    for i in range(shape.num_layers):
        modules |= {f"layers.{i}.{ours}": f"bert.encoder.layer.{i}.{theirs}" for ours, theirs in _LAYER.items()}
    return with_biases(modules) | embedding_tables("bert") | {"head.bias": "cls.predictions.bias"}


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
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    return {"vocab.txt": vocabulary_file(vocabulary), "tokenizer.json": json_file(tokenizer), **tokenizer_settings(settings, special)}


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
