"""ProtTXL as HuggingFace's Transformer-XL: configuration keys and tensor names of transformers 4.35, the last that had it.

Later releases cannot open the folder. There, too, a model without memories given starts from `mem_len` zero vectors that it
attends to; handed empty ones, it computes what this project does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..architecture import Vocabulary
from ..architectures.prot_txl import ARCHITECTURE, TxlShape
from ..config import parse
from ..errors import ConfigError
from .huggingface import HuggingFaceLayout
from .weight_files import listed

_KEYS = {
    "num_layers": "n_layer",
    "hidden_size": "d_model",
    "intermediate_size": "d_inner",
    "num_heads": "n_head",
    "head_size": "d_head",
    "memory_length": "mem_len",
    "vocabulary_size": "vocab_size",
}
_KEYS_WITH_DEFAULT = {"dropout": "dropout", "layer_norm_epsilon": "layer_norm_epsilon", "initializer_range": "init_std"}

# What this project's modules compute; the first value is written. The library's defaults are others, so a missing key differs, too.
_FIXED: dict[str, tuple[Any, ...]] = {
    "vocab_size": (len(ARCHITECTURE.vocabulary.tokens),),
    "div_val": (1,),
    "untie_r": (False,),
    "clamp_len": (-1,),
}
_FIXED_WITH_DEFAULT: dict[str, tuple[Any, ...]] = {
    "dropatt": (0.0,),
    "pre_lnorm": (False,),
    "attn_type": (0,),
    "same_length": (True,),
    "tie_word_embeddings": (True, None),
}

_LAYER = {
    "query_key_value.weight": "dec_attn.qkv_net.weight",
    "distance.weight": "dec_attn.r_net.weight",
    "attention_output.weight": "dec_attn.o_net.weight",
    "attention_norm.weight": "dec_attn.layer_norm.weight",
    "attention_norm.bias": "dec_attn.layer_norm.bias",
    "up.weight": "pos_ff.CoreNet.0.weight",
    "up.bias": "pos_ff.CoreNet.0.bias",
    "down.weight": "pos_ff.CoreNet.3.weight",
    "down.bias": "pos_ff.CoreNet.3.bias",
    "output_norm.weight": "pos_ff.layer_norm.weight",
    "output_norm.bias": "pos_ff.layer_norm.bias",
}
_WORDS = "transformer.word_emb.emb_layers.0.weight"


def _write_config(shape: TxlShape) -> dict[str, Any]:
    values: dict[str, Any] = {"architectures": ["TransfoXLLMHeadModel"], "model_type": "transfo-xl"}
    values |= {theirs: getattr(shape, ours) for ours, theirs in (_KEYS | _KEYS_WITH_DEFAULT).items()}
    values |= {key: choices[0] for key, choices in (_FIXED | _FIXED_WITH_DEFAULT).items()}
    values |= {"d_embed": shape.hidden_size, "cutoffs": [], "adaptive": False, "tie_projs": [False], "eos_token_id": 2}
    return values | {"init": "normal", "sample_softmax": -1, "torch_dtype": "float32"}


def _read_config(values: Mapping[str, Any], _tensors: frozenset[str]) -> tuple[TxlShape | None, list[str]]:
    differences = [f"{key} is missing" for key in (*_KEYS.values(), *_FIXED.keys() - {"vocab_size"}) if key not in values]
    for key, choices in (_FIXED | _FIXED_WITH_DEFAULT).items():
        if key in values and values[key] not in choices:
            differences.append(f"{key} is {values[key]!r}, this architecture has {choices[0]!r}")
    if values.get("cutoffs", "missing") != []:
        differences.append(f"cutoffs is {values.get('cutoffs', 'missing')!r}, this architecture has [] (one softmax over all tokens)")
    if values.get("d_embed") != values.get("d_model"):
        differences.append(f"d_embed is {values.get('d_embed')!r}, this architecture has the width of the hidden states, {values.get('d_model')!r}")
    if differences:
        return None, differences
    found = {ours: values[theirs] for ours, theirs in (_KEYS | _KEYS_WITH_DEFAULT).items() if theirs in values}
    try:
        return parse(TxlShape, found, source="its shape"), []
    except ConfigError as error:
        return None, [str(error)]


def _names(shape: TxlShape) -> dict[str, str]:
    names = {f"layers.{i}.{ours}": f"transformer.layers.{i}.{theirs}" for i in range(shape.num_layers) for ours, theirs in _LAYER.items()}
    names |= {"content_bias": "transformer.r_w_bias", "distance_bias": "transformer.r_r_bias"}
    return names | {"words.weight": _WORDS, "head_bias": "crit.out_layers.0.bias"}


def _tokenizer_files(vocabulary: Vocabulary) -> dict[str, bytes]:
    special = {"unk_token": vocabulary.unknown, "pad_token": vocabulary.padding, "eos_token": vocabulary.suffix[0]}
    settings = {"tokenizer_class": "TransfoXLTokenizer", "lower_case": False, **special}
    return {
        "vocab.txt": ("\n".join(vocabulary.tokens) + "\n").encode("ascii"),
        "tokenizer_config.json": (json.dumps(settings, indent=1) + "\n").encode("ascii"),
        "special_tokens_map.json": (json.dumps(special, indent=1) + "\n").encode("ascii"),
    }


def _tokenizer_problems(folder: Path, vocabulary: Vocabulary) -> list[str]:
    path = folder / "vocab.txt"
    if not path.is_file():
        return ["it has no vocab.txt (a token a line; a vocab.pkl is a program and is not run), so which row of the word table is which residue is not known"]
    tokens = path.read_text(encoding="utf-8", errors="backslashreplace").splitlines()
    if len(tokens) != len(vocabulary.tokens):
        return [f"vocab.txt: {len(tokens)} tokens instead of {len(vocabulary.tokens)}"]
    pairs = enumerate(zip(tokens, vocabulary.tokens, strict=True))
    differing = [f"token {i} is {found!r}, not {token!r}" for i, (found, token) in pairs if found != token]
    return [f"vocab.txt: {listed(differing, limit=4)}"] if differing else []


LAYOUT = HuggingFaceLayout(
    model_type="transfo-xl",
    classes=("TransfoXLLMHeadModel", "TransfoXLModel"),
    write_config=_write_config,
    read_config=_read_config,
    names=_names,
    aliases={"crit.out_layers.0.weight": _WORDS},
    ignored=frozenset({"transformer.pos_emb.inv_freq"}),
    tokenizer_files=_tokenizer_files,
    tokenizer_problems=_tokenizer_problems,
    usage="""# transformers 4.35.2 or older: later releases have no Transformer-XL
import torch
from transformers import TransfoXLLMHeadModel

model = TransfoXLLMHeadModel.from_pretrained(folder).eval()
tokens = {token: number for number, token in enumerate(open(f"{folder}/vocab.txt").read().split())}
ids = torch.tensor([[tokens.get(residue, 1) for residue in "MKTAYIAKQR"] + [2]])
nothing = [torch.empty(0, 1, model.config.d_model)] * model.config.n_layer  # else it attends to vectors of zeros first
residue_vectors = model.transformer(ids, mems=nothing).last_hidden_state[0, :-1]""",
)
