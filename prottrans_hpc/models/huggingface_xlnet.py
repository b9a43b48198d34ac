"""ProtXLNet as HuggingFace's XLNet: configuration keys, tensor names, SentencePiece vocabulary file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..architecture import Vocabulary
from ..architectures.prot_xlnet import ARCHITECTURE, XLNetShape
from . import sentencepiece_model
from .huggingface import HuggingFaceLayout
from .huggingface_config import Keys, rows_of, tokenizer_settings
from .sentencepiece_model import BLANK, Piece, PieceType, SentencePieceModel
from .weight_files import listed

_KEYS = Keys(
    needed={"num_layers": "n_layer", "hidden_size": "d_model", "intermediate_size": "d_inner", "num_heads": "n_head", "vocabulary_size": "vocab_size"},
    with_default={"dropout": "dropout", "layer_norm_epsilon": "layer_norm_eps", "initializer_range": "initializer_range"},
    fixed={
        "vocab_size": (len(ARCHITECTURE.vocabulary.tokens),),
        "ff_activation": ("gelu",),
        "attn_type": ("bi",),
        "bi_data": (False,),
        "same_length": (False,),
        "untie_r": (True,),
        "tie_word_embeddings": (True, None),
    },
)

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
    values: dict[str, Any] = {"architectures": ["XLNetLMHeadModel"], "model_type": "xlnet"} | _KEYS.write(shape)
    values |= {"d_head": shape.head_size, "clamp_len": shape.clamp_length or -1, "mem_len": shape.memory_length or None, "reuse_len": None}
    ids = {"pad": ARCHITECTURE.vocabulary.padding, "bos": "<s>", "eos": "</s>"}
    values |= {f"{name}_token_id": ARCHITECTURE.vocabulary.index(token) for name, token in ids.items()}
    # A protein by itself has no memory, so none is worth returning.
    return values | {"use_mems_eval": False, "use_mems_train": False, "dtype": "float32"}


def _read_config(values: Mapping[str, Any], _tensors: frozenset[str]) -> tuple[XLNetShape | None, list[str]]:
    if differences := _KEYS.differences(values):
        return None, differences
    clamp, memory = values.get("clamp_len", -1), values.get("mem_len")
    shape, problems = _KEYS.read(XLNetShape, values, clamp_length=0 if clamp == -1 else clamp, memory_length=0 if memory is None else memory)
    if shape and values.get("d_head", shape.head_size) != shape.head_size:
        return None, [f"d_head is {values['d_head']!r}, this architecture has d_model / n_head = {shape.head_size}"]
    return shape, problems


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
    settings = {"tokenizer_class": "XLNetTokenizer", "do_lower_case": False, "model_input_names": ["input_ids", "attention_mask"]}
    return {_SPIECE: sentencepiece_model.render(_spiece(vocabulary)), **tokenizer_settings(settings, special)}


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
    return rows_of(_tokens_of(folder, vocabulary), vocabulary)


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
