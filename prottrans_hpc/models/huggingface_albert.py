"""ProtAlbert as HuggingFace's ALBERT: configuration keys, tensor names, SentencePiece vocabulary file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..architecture import Vocabulary
from ..architectures.prot_albert import ARCHITECTURE, AlbertShape
from . import sentencepiece_model
from .huggingface import HuggingFaceLayout
from .huggingface_bert import KEYS as BERT_KEYS
from .huggingface_config import Keys, embedding_tables, rows_of, tokenizer_settings, with_biases
from .sentencepiece_model import BLANK, Piece, PieceType, SentencePieceModel
from .weight_files import listed

_SPIECE = "spiece.model"
_KEYS = Keys(
    needed={**BERT_KEYS.needed, "embedding_size": "embedding_size"},
    with_default=BERT_KEYS.with_default,
    fixed={
        "vocab_size": (len(ARCHITECTURE.vocabulary.tokens),),
        "hidden_act": ("gelu",),
        "num_hidden_groups": (1,),
        "inner_group_num": (1,),
        "net_structure_type": (0, None),
        "num_memory_blocks": (0, None),
        "position_embedding_type": ("absolute", None),
        "tie_word_embeddings": (True, None),
    },
)

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
    values: dict[str, Any] = {"architectures": ["AlbertForMaskedLM"], "model_type": "albert"} | _KEYS.write(shape)
    values |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "dtype": "float32"}
    ids = {"pad": ARCHITECTURE.vocabulary.padding, "bos": ARCHITECTURE.vocabulary.prefix[0], "eos": ARCHITECTURE.vocabulary.suffix[0]}
    return values | {f"{name}_token_id": ARCHITECTURE.vocabulary.index(token) for name, token in ids.items()}


def _read_config(values: Mapping[str, Any], tensors: frozenset[str]) -> tuple[AlbertShape | None, list[str]]:
    differences = _KEYS.differences(values)
    if "hidden_act" not in values:
        differences.append("hidden_act is missing, which means 'gelu_new' to ALBERT; this architecture has 'gelu'")
    return (None, differences) if differences else _KEYS.read(AlbertShape, values, has_pooler=f"{_POOLER}.weight" in tensors)


def _names(shape: AlbertShape) -> dict[str, str]:
    modules = {
        "embeddings.norm": "albert.embeddings.LayerNorm",
        "project": "albert.encoder.embedding_hidden_mapping_in",
        "head.dense": "predictions.dense",
        "head.norm": "predictions.LayerNorm",
    }
    modules |= {f"layer.{ours}": f"{_LAYER_NAME}.{theirs}" for ours, theirs in _LAYER.items()}
    modules |= {"pooler": _POOLER} if shape.has_pooler else {}
    return with_biases(modules) | embedding_tables("albert") | {"head.bias": "predictions.bias"}


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
    settings = {"tokenizer_class": "AlbertTokenizer", "do_lower_case": False, "keep_accents": True}
    return {_SPIECE: sentencepiece_model.render(_spiece(vocabulary)), **tokenizer_settings(settings, special)}


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
    return rows_of(_words_of(folder), vocabulary)


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
