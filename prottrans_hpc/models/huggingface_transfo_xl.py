"""ProtTXL as HuggingFace's Transformer-XL: configuration keys and tensor names of transformers 4.35, the last that had it.

Later releases cannot open the folder. There, too, a model without memories given starts from `mem_len` zero vectors that it
attends to; handed empty ones, it computes what this project does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..architecture import Vocabulary
from ..architectures.prot_txl import ARCHITECTURE, TxlShape
from .huggingface import HuggingFaceLayout
from .huggingface_config import Keys, tokenizer_settings, vocabulary_file
from .weight_files import listed

_KEYS = Keys(
    needed={
        "num_layers": "n_layer",
        "hidden_size": "d_model",
        "intermediate_size": "d_inner",
        "num_heads": "n_head",
        "head_size": "d_head",
        "memory_length": "mem_len",
        "vocabulary_size": "vocab_size",
    },
    with_default={"dropout": "dropout", "layer_norm_epsilon": "layer_norm_epsilon", "initializer_range": "init_std"},
    fixed={
        "vocab_size": (len(ARCHITECTURE.vocabulary.tokens),),
        "div_val": (1,),
        "untie_r": (False,),
        "clamp_len": (-1,),
        "dropatt": (0.0,),
        "pre_lnorm": (False,),
        "attn_type": (0,),
        "same_length": (True,),
        "tie_word_embeddings": (True, None),
    },
)
_WITH_OTHER_DEFAULTS = ("div_val", "untie_r", "clamp_len")
"""Fixed, and the library's defaults are others, so that a missing key differs, too."""

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
    values: dict[str, Any] = {"architectures": ["TransfoXLLMHeadModel"], "model_type": "transfo-xl"} | _KEYS.write(shape)
    values |= {"d_embed": shape.hidden_size, "cutoffs": [], "adaptive": False, "tie_projs": [False], "eos_token_id": 2}
    return values | {"init": "normal", "sample_softmax": -1, "torch_dtype": "float32"}


def _read_config(values: Mapping[str, Any], _tensors: frozenset[str]) -> tuple[TxlShape | None, list[str]]:
    differences = _KEYS.differences(values, also_needed=_WITH_OTHER_DEFAULTS)
    if values.get("cutoffs", "missing") != []:
        differences.append(f"cutoffs is {values.get('cutoffs', 'missing')!r}, this architecture has [] (one softmax over all tokens)")
    if values.get("d_embed") != values.get("d_model"):
        differences.append(f"d_embed is {values.get('d_embed')!r}, this architecture has the width of the hidden states, {values.get('d_model')!r}")
    return (None, differences) if differences else _KEYS.read(TxlShape, values)


def _names(shape: TxlShape) -> dict[str, str]:
    names = {f"layers.{i}.{ours}": f"transformer.layers.{i}.{theirs}" for i in range(shape.num_layers) for ours, theirs in _LAYER.items()}
    names |= {"content_bias": "transformer.r_w_bias", "distance_bias": "transformer.r_r_bias"}
    return names | {"words.weight": _WORDS, "head_bias": "crit.out_layers.0.bias"}


def _tokenizer_files(vocabulary: Vocabulary) -> dict[str, bytes]:
    special = {"unk_token": vocabulary.unknown, "pad_token": vocabulary.padding, "eos_token": vocabulary.suffix[0]}
    settings = {"tokenizer_class": "TransfoXLTokenizer", "lower_case": False}
    return {"vocab.txt": vocabulary_file(vocabulary), **tokenizer_settings(settings, special)}


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
