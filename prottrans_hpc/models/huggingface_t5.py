"""ProtT5 as HuggingFace's T5: configuration keys, tensor names, SentencePiece vocabulary file; whole, or the encoder alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..architecture import Vocabulary
from ..architectures.prot_t5 import ARCHITECTURE, NUM_SENTINELS, T5Shape
from ..durable import read_json
from . import sentencepiece_model
from .huggingface import HuggingFaceLayout
from .huggingface_config import Keys, json_file, tokenizer_settings
from .sentencepiece_model import BLANK, ModelType, Piece, PieceType, SentencePieceModel
from .weight_files import listed

_SPIECE = "spiece.model"
_KEYS = Keys(
    needed={"num_layers": "num_layers", "hidden_size": "d_model", "intermediate_size": "d_ff", "num_heads": "num_heads", "head_size": "d_kv"},
    with_default={
        "num_buckets": "relative_attention_num_buckets",
        "max_distance": "relative_attention_max_distance",
        "dropout": "dropout_rate",
        "layer_norm_epsilon": "layer_norm_epsilon",
        "initializer_factor": "initializer_factor",
    },
    fixed={
        "vocab_size": (len(ARCHITECTURE.vocabulary.tokens),),
        "feed_forward_proj": ("relu",),
        "is_gated_act": (False,),
        "tie_word_embeddings": (True,),  # False would also mean that the decoder's output is not scaled
        "scale_decoder_outputs": (True,),
        "decoder_start_token_id": (ARCHITECTURE.vocabulary.index(ARCHITECTURE.vocabulary.padding), None),
        "eos_token_id": (ARCHITECTURE.vocabulary.index(ARCHITECTURE.vocabulary.suffix[0]), None),
        "pad_token_id": (ARCHITECTURE.vocabulary.index(ARCHITECTURE.vocabulary.padding), None),
    },
)
_NOT_WRITTEN = ("is_gated_act", "scale_decoder_outputs")
_THEIR_DEFAULTS = {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "initializer_factor": 1.0,
}

_PARTS = {
    "attention": ("SelfAttention", {"query": "q", "key": "k", "value": "v", "output": "o"}),
    "cross": ("EncDecAttention", {"query": "q", "key": "k", "value": "v", "output": "o"}),
    "feed_forward": ("DenseReluDense", {"up": "wi", "down": "wo"}),
}
_BIASES = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"

# Natural logarithms of how common each residue was, as the published file has them.
_SCORES = {
    "A": -2.278312,
    "L": -2.302625,
    "G": -2.571374,
    "V": -2.649644,
    "S": -2.734614,
    "R": -2.783694,
    "E": -2.803672,
    "D": -2.880341,
    "T": -2.903266,
    "I": -2.933738,
    "P": -2.989863,
    "K": -3.110422,
    "F": -3.282776,
    "Q": -3.320293,
    "N": -3.351659,
    "Y": -3.605138,
    "M": -3.781081,
    "H": -3.828265,
    "W": -4.356028,
    "C": -4.526664,
    "X": -10.67775,
    "B": -16.22682,
    "O": -16.22682,
    "U": -16.22682,
    "Z": -16.22682,
}


def _write_config(shape: T5Shape) -> dict[str, Any]:
    has_decoder = shape.num_decoder_layers > 0
    values: dict[str, Any] = {"architectures": ["T5ForConditionalGeneration" if has_decoder else "T5EncoderModel"], "model_type": "t5"}
    values |= {key: value for key, value in _KEYS.write(shape).items() if key not in _NOT_WRITTEN}
    # The published encoders, too, say that they are half of something, with as many layers in the other half.
    values |= {"num_decoder_layers": shape.num_decoder_layers or shape.num_layers, "is_encoder_decoder": True, "use_cache": True}
    return values | {"n_positions": 512, "dtype": "float32"}


def _read_config(values: Mapping[str, Any], tensors: frozenset[str]) -> tuple[T5Shape | None, list[str]]:
    if differences := _KEYS.differences(values, also_needed=("vocab_size",)):
        return None, differences
    has_decoder = any(name.startswith("decoder.") for name in tensors)
    layers = values.get("num_decoder_layers")
    num_decoder_layers = (values["num_layers"] if layers is None else layers) if has_decoder else 0
    return _KEYS.read(T5Shape, _THEIR_DEFAULTS | dict(values), num_decoder_layers=num_decoder_layers)


def _names(shape: T5Shape) -> dict[str, str]:
    stacks = {"encoder": (shape.num_layers, ("attention", "feed_forward")), "decoder": (shape.num_decoder_layers, ("attention", "cross", "feed_forward"))}
    names = {"words.weight": "shared.weight"}
    for stack, (num_layers, parts) in stacks.items():
        if not num_layers:
            continue
        names |= {f"{stack}.position_biases.weight": f"{stack}.{_BIASES}", f"{stack}.norm.weight": f"{stack}.final_layer_norm.weight"}
        for layer in range(num_layers):
            for place, part in enumerate(parts):
                ours, theirs = f"{stack}.layers.{layer}.{part}", f"{stack}.block.{layer}.layer.{place}"
                called, matrices = _PARTS[part]
                names[f"{ours}_norm.weight"] = f"{theirs}.layer_norm.weight"
                names |= {f"{ours}.{own}.weight": f"{theirs}.{called}.{other}.weight" for own, other in matrices.items()}
    return names


def _encoder_of(shape: T5Shape) -> T5Shape:
    return dataclasses.replace(shape, num_decoder_layers=0)


def _spiece(vocabulary: Vocabulary) -> SentencePieceModel:
    """As the published one: words of one residue. The sentinels are not in it: T5's tokenizers add them behind."""
    pieces = []
    for token in vocabulary.tokens[: len(vocabulary.tokens) - NUM_SENTINELS]:
        if token in _SCORES:
            pieces.append(Piece(BLANK + token, _SCORES[token]))
        else:
            pieces.append(Piece(token, 0.0, PieceType.UNKNOWN if token == vocabulary.unknown else PieceType.CONTROL))
    ids = {"unknown_id": vocabulary.unknown, "end_id": vocabulary.suffix[0], "padding_id": vocabulary.padding}
    return SentencePieceModel(tuple(pieces), ModelType.WORD, begin_id=-1, **{name: vocabulary.index(token) for name, token in ids.items()})


def _tokenizer_files(vocabulary: Vocabulary) -> dict[str, bytes]:
    special: dict[str, Any] = {"eos_token": vocabulary.suffix[0], "unk_token": vocabulary.unknown, "pad_token": vocabulary.padding}
    sentinels = {"additional_special_tokens": [f"<extra_id_{index}>" for index in range(NUM_SENTINELS)]}
    # The published folder lacks tokenizer_class, without which AutoTokenizer must guess.
    settings = {"tokenizer_class": "T5Tokenizer", "do_lower_case": False, "extra_ids": NUM_SENTINELS}
    files = tokenizer_settings(settings, special) | {"special_tokens_map.json": json_file(special | sentinels)}
    return {_SPIECE: sentencepiece_model.render(_spiece(vocabulary)), **files}


def _tokenizer_problems(folder: Path, vocabulary: Vocabulary) -> list[str]:
    wanted, problems, found = list(vocabulary.tokens), [], False
    if (folder / _SPIECE).is_file():
        pieces = sentencepiece_model.parse((folder / _SPIECE).read_bytes(), source=str(folder / _SPIECE)).pieces
        problems, found = _differences(_SPIECE, {i: piece.text for i, piece in enumerate(pieces)}, wanted[: len(wanted) - NUM_SENTINELS]), True
    if (folder / "tokenizer.json").is_file():
        problems, found = problems + _differences("tokenizer.json", _tokens_of_json(read_json(folder / "tokenizer.json")), wanted), True
    if not found:
        return [f"it has neither {_SPIECE} nor tokenizer.json, so which row of the word table belongs to which residue is not known"]
    return problems


def _tokens_of_json(values: Any) -> dict[int, str]:
    try:
        tokens = {index: str(token) for index, (token, _score) in enumerate(values["model"]["vocab"])}
        return tokens | {int(added["id"]): str(added["content"]) for added in values.get("added_tokens", [])}
    except (KeyError, TypeError, AttributeError, ValueError):
        return {}


def _differences(name: str, tokens: Mapping[int, str], wanted: list[str]) -> list[str]:
    if sorted(tokens) != list(range(len(wanted))):
        return [f"{name}: {len(tokens)} tokens instead of {len(wanted)}"]
    own = [token.removeprefix(BLANK) for _, token in sorted(tokens.items())]
    differing = [f"token {index} is {found!r}, not {token!r}" for index, (found, token) in enumerate(zip(own, wanted, strict=True)) if found != token]
    return [f"{name}: {listed(differing, limit=4)}"] if differing else []


LAYOUT = HuggingFaceLayout(
    model_type="t5",
    classes=("T5ForConditionalGeneration", "T5Model", "T5EncoderModel"),
    write_config=_write_config,
    read_config=_read_config,
    names=_names,
    aliases={f"{name}.weight": "shared.weight" for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")},
    # Early versions of transformers gave the cross attention a bias table that nothing reads.
    ignored=frozenset({"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"}),
    tokenizer_files=_tokenizer_files,
    tokenizer_problems=_tokenizer_problems,
    encoder_of=_encoder_of,
    usage="""from transformers import AutoTokenizer, T5EncoderModel

tokenizer = AutoTokenizer.from_pretrained(folder)
model = T5EncoderModel.from_pretrained(folder)
inputs = tokenizer("M K T A Y I A K Q R", return_tensors="pt")  # one blank between residues; write U, Z, O and B as X
residue_vectors = model(**inputs).last_hidden_state[0, :-1]""",
)
