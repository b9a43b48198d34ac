"""ProtAlbert as HuggingFace's ALBERT: configuration keys, tensor names, SentencePiece vocabulary file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..architecture import Vocabulary
from ..architectures.prot_albert import ARCHITECTURE, AlbertShape
from ..config import parse
from ..errors import ConfigError
from . import sentencepiece_model
from .huggingface import HuggingFaceLayout
from .sentencepiece_model import BLANK, Piece, PieceType, SentencePieceModel
from .weight_files import listed

_SPIECE = "spiece.model"
_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "embedding_size": "embedding_size",
    "max_positions": "max_position_embeddings",
    "vocabulary_size": "vocab_size",
}
_KEYS_WITH_DEFAULT = {"num_token_types": "type_vocab_size", "layer_norm_epsilon": "layer_norm_eps", "initializer_range": "initializer_range"}

# What this project's modules compute; the first value is written, a missing key means the same.
_FIXED: dict[str, tuple[Any, ...]] = {
    "vocab_size": (len(ARCHITECTURE.vocabulary.tokens),),
    "hidden_act": ("gelu",),
    "num_hidden_groups": (1,),
    "inner_group_num": (1,),
    "net_structure_type": (0, None),
    "num_memory_blocks": (0, None),
    "position_embedding_type": ("absolute", None),
    "tie_word_embeddings": (True, None),
}

_LAYER_NAME = "albert.encoder.albert_layer_groups.0.albert_layers.0"
_LAYER = {
    "query": "attention.query",
    "key": "attention.key",
    "value": "attention.value",
    "attention_output": "attention.dense",
    "attention_norm": "attention.LayerNorm",
    "up": "ffn",
    "down": "ffn_output",
    "output_norm": "full_layer_layer_norm",
}
_POOLER = "albert.pooler"


def _write_config(shape: AlbertShape) -> dict[str, Any]:
    values: dict[str, Any] = {"architectures": ["AlbertForMaskedLM"], "model_type": "albert"}
    values |= {theirs: getattr(shape, ours) for ours, theirs in (_KEYS | _KEYS_WITH_DEFAULT).items()}
    values |= {key: choices[0] for key, choices in _FIXED.items()}
    values |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "dtype": "float32"}
    ids = {"pad": ARCHITECTURE.vocabulary.padding, "bos": ARCHITECTURE.vocabulary.prefix[0], "eos": ARCHITECTURE.vocabulary.suffix[0]}
    return values | {f"{name}_token_id": ARCHITECTURE.vocabulary.index(token) for name, token in ids.items()}


def _read_config(values: Mapping[str, Any], tensors: frozenset[str]) -> tuple[AlbertShape | None, list[str]]:
    differences = [f"{key} is missing" for key in _KEYS.values() if key not in values]
    if "hidden_act" not in values:
        differences.append("hidden_act is missing, which means 'gelu_new' to ALBERT; this architecture has 'gelu'")
    for key, choices in _FIXED.items():
        if key in values and values[key] not in choices:
            differences.append(f"{key} is {values[key]!r}, this architecture has {choices[0]!r}")
    found = {ours: values[theirs] for ours, theirs in (_KEYS | _KEYS_WITH_DEFAULT).items() if theirs in values}
    if differences:
        return None, differences
    try:
        return parse(AlbertShape, found | {"has_pooler": f"{_POOLER}.weight" in tensors}, source="its shape"), []
    except ConfigError as error:
        return None, [str(error)]


def _names(shape: AlbertShape) -> dict[str, str]:
    modules = {
        "embeddings.norm": "albert.embeddings.LayerNorm",
        "project": "albert.encoder.embedding_hidden_mapping_in",
        "head.dense": "predictions.dense",
        "head.norm": "predictions.LayerNorm",
    }
    modules |= {f"layer.{ours}": f"{_LAYER_NAME}.{theirs}" for ours, theirs in _LAYER.items()}
    modules |= {"pooler": _POOLER} if shape.has_pooler else {}
    names = {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in modules.items() for part in ("weight", "bias")}
    tables = {"words": "word_embeddings", "positions": "position_embeddings", "token_types": "token_type_embeddings"}
    names |= {f"embeddings.{ours}.weight": f"albert.embeddings.{theirs}.weight" for ours, theirs in tables.items()}
    return names | {"head.bias": "predictions.bias"}


def _spiece(vocabulary: Vocabulary) -> SentencePieceModel:
    """As ALBERT's settings make one: the special tokens, signs that are found in any text, and a word for each residue."""
    control = {vocabulary.padding, vocabulary.mask, *vocabulary.prefix, *vocabulary.suffix}
    pieces = []
    for token in vocabulary.tokens:
        if token == vocabulary.unknown:
            pieces.append(Piece(token, kind=PieceType.UNKNOWN))
        elif token in control:
            pieces.append(Piece(token, kind=PieceType.CONTROL))
        elif token.isalpha():
            pieces.append(Piece(BLANK + token, score=-3.0))  # one piece a word: the scores decide nothing
        else:
            pieces.append(Piece(token, kind=PieceType.USER_DEFINED))
    unknown, padding = vocabulary.index(vocabulary.unknown), vocabulary.index(vocabulary.padding)
    return SentencePieceModel(tuple(pieces), unknown_id=unknown, begin_id=-1, end_id=-1, padding_id=padding)


def _tokenizer_files(vocabulary: Vocabulary) -> dict[str, bytes]:
    first, last = vocabulary.prefix[0], vocabulary.suffix[0]
    special = {"unk_token": vocabulary.unknown, "pad_token": vocabulary.padding, "mask_token": vocabulary.mask}
    special |= {"cls_token": first, "bos_token": first, "sep_token": last, "eos_token": last}
    settings = {"tokenizer_class": "AlbertTokenizer", "do_lower_case": False, "keep_accents": True, **special}
    return {
        _SPIECE: sentencepiece_model.render(_spiece(vocabulary)),
        "tokenizer_config.json": (json.dumps(settings, indent=1) + "\n").encode("ascii"),
        "special_tokens_map.json": (json.dumps(special, indent=1) + "\n").encode("ascii"),
    }


def _words_of(folder: Path) -> list[str]:
    """The tokens of the folder's spiece.model in their order, without the sign for a blank."""
    path = folder / _SPIECE
    return [piece.text.removeprefix(BLANK) for piece in sentencepiece_model.parse(path.read_bytes(), source=str(path)).pieces]


def _tokenizer_problems(folder: Path, vocabulary: Vocabulary) -> list[str]:
    if not (folder / _SPIECE).is_file():
        return [f"it has no {_SPIECE}, so which row of the word table belongs to which residue is not known"]
    words = _words_of(folder)
    needed = [token for token in vocabulary.tokens if token.isalpha() or token in _special(vocabulary)]
    lacking = [token for token in needed if token not in words]
    problems = [f"{_SPIECE}: without {listed([repr(token) for token in lacking], limit=30)}"] if lacking else []
    if len(words) != len(vocabulary.tokens):
        problems.append(f"{_SPIECE}: {len(words)} tokens instead of {len(vocabulary.tokens)}")
    return problems


def _special(vocabulary: Vocabulary) -> set[str]:
    return {vocabulary.padding, vocabulary.unknown, vocabulary.mask, *vocabulary.prefix, *vocabulary.suffix}


def _row_order(folder: Path, vocabulary: Vocabulary) -> list[int]:
    """For each of our tokens the row that it has in the folder; signs that no protein has take the rows that are left."""
    words = _words_of(folder)
    rows = {token: words.index(token) for token in vocabulary.tokens if token in words}
    left = iter(row for row in range(len(words)) if row not in rows.values())
    return [rows[token] if token in rows else next(left) for token in vocabulary.tokens]


LAYOUT = HuggingFaceLayout(
    model_type="albert",
    classes=("AlbertForMaskedLM", "AlbertModel"),
    write_config=_write_config,
    read_config=_read_config,
    names=_names,
    aliases={"predictions.decoder.weight": "albert.embeddings.word_embeddings.weight", "predictions.decoder.bias": "predictions.bias"},
    ignored=frozenset({"albert.embeddings.position_ids"}),
    tokenizer_files=_tokenizer_files,
    tokenizer_problems=_tokenizer_problems,
    usage="""from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)  # needs the packages sentencepiece and protobuf
model = AutoModel.from_pretrained(folder)
inputs = tokenizer("M K T A Y I A K Q R", return_tensors="pt")  # one blank between residues; write U, Z, O and B as X
residue_vectors = model(**inputs).last_hidden_state[0, 1:-1]""",
    own_keys=frozenset({"num_hidden_groups", "inner_group_num"}),
    token_rows=("embeddings.words.weight", "head.bias"),
    row_order=_row_order,
)
