"""ProtXLNet as HuggingFace's XLNet: configuration keys, tensor names, SentencePiece vocabulary file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..architecture import Vocabulary
from ..architectures.prot_xlnet import ARCHITECTURE, XLNetShape
from ..config import parse
from ..errors import ConfigError
from . import sentencepiece_model
from .huggingface import HuggingFaceLayout
from .sentencepiece_model import BLANK, Piece, PieceType, SentencePieceModel
from .weight_files import listed

_KEYS = {
    "num_layers": "n_layer",
    "hidden_size": "d_model",
    "intermediate_size": "d_inner",
    "num_heads": "n_head",
    "vocabulary_size": "vocab_size",
}
_KEYS_WITH_DEFAULT = {"dropout": "dropout", "layer_norm_epsilon": "layer_norm_eps", "initializer_range": "initializer_range"}

# What this project's modules compute; the first value is written, a missing key means the same.
_FIXED: dict[str, tuple[Any, ...]] = {
    "vocab_size": (len(ARCHITECTURE.vocabulary.tokens),),
    "ff_activation": ("gelu",),
    "attn_type": ("bi",),
    "bi_data": (False,),
    "same_length": (False,),
    "untie_r": (True,),
    "tie_word_embeddings": (True, None),
}

_ATTENTION = {
    "query": "q",
    "key": "k",
    "value": "v",
    "output": "o",
    "distance": "r",
    "content.bias": "r_w_bias",
    "position.bias": "r_r_bias",
    "segment.bias": "r_s_bias",
    "segments": "seg_embed",
    "norm.weight": "layer_norm.weight",
    "norm.bias": "layer_norm.bias",
}
_FEED_FORWARD = {"up": "layer_1", "down": "layer_2", "norm": "layer_norm"}
_SPIECE = "spiece.model"


def _write_config(shape: XLNetShape) -> dict[str, Any]:
    values: dict[str, Any] = {"architectures": ["XLNetLMHeadModel"], "model_type": "xlnet"}
    values |= {theirs: getattr(shape, ours) for ours, theirs in (_KEYS | _KEYS_WITH_DEFAULT).items()}
    values |= {key: choices[0] for key, choices in _FIXED.items()}
    values |= {"d_head": shape.head_size, "clamp_len": shape.clamp_length or -1, "mem_len": shape.memory_length or None, "reuse_len": None}
    ids = {"pad": ARCHITECTURE.vocabulary.padding, "bos": "<s>", "eos": "</s>"}
    values |= {f"{name}_token_id": ARCHITECTURE.vocabulary.index(token) for name, token in ids.items()}
    # A protein by itself has no memory, so none is worth returning.
    return values | {"use_mems_eval": False, "use_mems_train": False, "dtype": "float32"}


def _read_config(values: Mapping[str, Any], _tensors: frozenset[str]) -> tuple[XLNetShape | None, list[str]]:
    differences = [f"{key} is missing" for key in _KEYS.values() if key not in values]
    for key, choices in _FIXED.items():
        if key in values and values[key] not in choices:
            differences.append(f"{key} is {values[key]!r}, this architecture has {choices[0]!r}")
    if differences:
        return None, differences
    found = {ours: values[theirs] for ours, theirs in (_KEYS | _KEYS_WITH_DEFAULT).items() if theirs in values}
    clamp, memory = values.get("clamp_len", -1), values.get("mem_len")
    found |= {"clamp_length": 0 if clamp == -1 else clamp, "memory_length": 0 if memory is None else memory}
    try:
        shape = parse(XLNetShape, found, source="its shape")
    except ConfigError as error:
        return None, [str(error)]
    if values.get("d_head", shape.head_size) != shape.head_size:
        return None, [f"d_head is {values['d_head']!r}, this architecture has d_model / n_head = {shape.head_size}"]
    return shape, []


def _names(shape: XLNetShape) -> dict[str, str]:
    names = {"words.weight": "transformer.word_embedding.weight", "query_start": "transformer.mask_emb", "head.bias": "lm_loss.bias"}
    for i in range(shape.num_layers):
        names |= {f"layers.{i}.attention.{ours}": f"transformer.layer.{i}.rel_attn.{theirs}" for ours, theirs in _ATTENTION.items()}
        for ours, theirs in _FEED_FORWARD.items():
            names |= {f"layers.{i}.feed_forward.{ours}.{part}": f"transformer.layer.{i}.ff.{theirs}.{part}" for part in ("weight", "bias")}
    return names


def _spiece(vocabulary: Vocabulary) -> SentencePieceModel:
    """As XLNet's settings make one: control symbols, signs that are found in any text, and a word for each residue."""
    pieces = []
    for token in vocabulary.tokens:
        if token == vocabulary.unknown:
            pieces.append(Piece(token, kind=PieceType.UNKNOWN))
        elif token.isalpha():
            pieces.append(Piece(BLANK + token, score=-3.0))  # one piece a word: the scores decide nothing
        else:
            # <eop> is one that XLNet wants to find in text.
            pieces.append(Piece(token, kind=PieceType.USER_DEFINED if len(token) == 1 or token == "<eop>" else PieceType.CONTROL))
    index = vocabulary.index
    return SentencePieceModel(tuple(pieces), unknown_id=index(vocabulary.unknown), begin_id=index("<s>"), end_id=index("</s>"), padding_id=-1)


def _tokenizer_files(vocabulary: Vocabulary) -> dict[str, bytes]:
    separator, summary = vocabulary.suffix
    special: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": vocabulary.unknown, "sep_token": separator, "cls_token": summary}
    special |= {"pad_token": vocabulary.padding, "mask_token": vocabulary.mask, "additional_special_tokens": ["<eop>", "<eod>"]}
    # Without token types, as the published embeddings are made: a protein is one segment.
    settings = {"tokenizer_class": "XLNetTokenizer", "do_lower_case": False, "model_input_names": ["input_ids", "attention_mask"], **special}
    return {
        _SPIECE: sentencepiece_model.render(_spiece(vocabulary)),
        "tokenizer_config.json": (json.dumps(settings, indent=1) + "\n").encode("ascii"),
        "special_tokens_map.json": (json.dumps(special, indent=1) + "\n").encode("ascii"),
    }


def _tokens_of(folder: Path, vocabulary: Vocabulary) -> list[str]:
    """Our names of the tokens in the folder's spiece.model, in its order; the unknown one may be called otherwise there."""
    path = folder / _SPIECE
    model = sentencepiece_model.parse(path.read_bytes(), source=str(path))
    tokens = [piece.text.removeprefix(BLANK) for piece in model.pieces]
    tokens[model.unknown_id] = vocabulary.unknown
    return tokens


def _tokenizer_problems(folder: Path, vocabulary: Vocabulary) -> list[str]:
    if not (folder / _SPIECE).is_file():
        return [f"it has no {_SPIECE}, so which row of the word table belongs to which residue is not known"]
    tokens = _tokens_of(folder, vocabulary)
    residues = [vocabulary.tokens[i] for i in vocabulary.residue_ids()]
    needed = {vocabulary.unknown, vocabulary.mask, vocabulary.padding, *vocabulary.suffix, *residues}
    lacking = sorted(needed - set(tokens))
    problems = [f"{_SPIECE}: without {listed([repr(token) for token in lacking], limit=30)}"] if lacking else []
    if len(tokens) != len(vocabulary.tokens):
        problems.append(f"{_SPIECE}: {len(tokens)} tokens instead of {len(vocabulary.tokens)}")
    return problems


def _row_order(folder: Path, vocabulary: Vocabulary) -> list[int]:
    """For each of our tokens the row that it has in the folder; signs that no protein has take the rows that are left."""
    tokens = _tokens_of(folder, vocabulary)
    rows = {token: tokens.index(token) for token in vocabulary.tokens if token in tokens}
    left = iter(row for row in range(len(tokens)) if row not in rows.values())
    return [rows[token] if token in rows else next(left) for token in vocabulary.tokens]


LAYOUT = HuggingFaceLayout(
    model_type="xlnet",
    classes=("XLNetLMHeadModel", "XLNetModel"),
    write_config=_write_config,
    read_config=_read_config,
    names=_names,
    aliases={"lm_loss.weight": "transformer.word_embedding.weight"},
    ignored=frozenset(),
    tokenizer_files=_tokenizer_files,
    tokenizer_problems=_tokenizer_problems,
    usage="""from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)  # needs the packages sentencepiece and protobuf
model = AutoModel.from_pretrained(folder)
inputs = tokenizer("M K T A Y I A K Q R", return_tensors="pt")  # one blank between residues; X, U, Z, O and B are unknown to it
residue_vectors = model(**inputs).last_hidden_state[0, :-2]  # behind the residues come <sep> and <cls>""",
    token_rows=("words.weight", "head.bias"),
    row_order=_row_order,
)
