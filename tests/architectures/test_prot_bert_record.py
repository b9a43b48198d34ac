"""The torch-free record of ProtBert: what was published, and its checks."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from prottrans_hpc import architecture, config
from prottrans_hpc.architectures.prot_bert import BertShape, activation_bytes, flops, num_parameters
from prottrans_hpc.errors import ConfigError

RECORD = architecture.get("prot_bert")


@pytest.mark.parametrize("size", ["prot_bert", "prot_bert_bfd"])
def test_the_published_sizes_have_the_published_numbers(size):
    published = RECORD.size(size)
    shape = published.shape
    assert (shape.num_layers, shape.hidden_size, shape.intermediate_size, shape.num_heads) == (30, 1024, 4096, 16)
    assert shape.max_positions == 40_000
    assert num_parameters(shape) == 420_984_864
    assert published.parameters_published == 420_000_000


def test_the_parameters_without_the_heads_are_those_of_the_released_class():
    shape = dataclasses.replace(RECORD.size("prot_bert").shape, has_pooler=False, has_next_sentence=False)
    assert num_parameters(shape) == 419_933_214


def test_only_the_long_position_table_gives_the_published_count():
    short = dataclasses.replace(RECORD.size("prot_bert").shape, max_positions=512)
    assert round(num_parameters(short) / 1e6, 1) == 380.5


@pytest.mark.parametrize(("size", "said"), [("prot_bert", "80 and as 88 billion"), ("prot_bert_bfd", "V3-512"), ("prot_bert_bfd", "116,736")])
def test_errata_are_attached_to_their_size(size, said):
    errata = " ".join(RECORD.size(size).errata)
    assert said in errata
    assert "1,024 residues for all models" in errata
    assert "sinusoidal" in errata


def test_the_vocabulary_is_in_the_order_of_the_published_weights(repository):
    published = (repository / "tests/recorded/huggingface_prot_bert/vocab.txt").read_text().split()
    assert list(RECORD.vocabulary.tokens) == published
    assert [RECORD.vocabulary.tokens[i] for i in RECORD.vocabulary.residue_ids()] == list("LAGVESIKRDTPNQFYMHCW")


def test_reading_the_record_needs_neither_torch_nor_numpy():
    code = "import sys; from prottrans_hpc import architecture; architecture.get('prot_bert'); print({'torch', 'numpy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_flops_grow_with_the_square_of_each_length_not_of_their_sum():
    shape = RECORD.size("small").shape
    one, two, joined = flops(shape, [300]), flops(shape, [300, 300]), flops(shape, [600])
    assert two == 2 * one
    assert joined - two == 3 * 2 * shape.num_layers * 2 * (600**2 - 2 * 300**2) * shape.hidden_size


def test_bf16_keeps_less_for_the_backward_pass():
    shape = RECORD.size("small").shape
    assert activation_bytes(shape, [300], "bf16") < 0.6 * activation_bytes(shape, [300], "fp32")
    with pytest.raises(ConfigError, match="'fp8'; known are fp32 and bf16"):
        activation_bytes(shape, [300], "fp8")


@pytest.mark.parametrize("change", [{"num_heads": 3}, {"num_layers": 0}, {"hidden_size": "64"}])
def test_a_shape_that_cannot_be_is_refused(change):
    values = dataclasses.asdict(RECORD.size("tiny").shape) | change
    with pytest.raises(ConfigError):
        config.parse(BertShape, values, source="a test")
