"""Every published preset carries the paper's contradictions that concern it, and no other does."""

from __future__ import annotations

import pytest

from prottrans_hpc import architecture
from prottrans_hpc.architectures import errata

TXL, BERT = {"prot_txl", "prot_txl_bfd"}, {"prot_bert", "prot_bert_bfd"}
T5_BFD, T5_U50 = {"prot_t5_xl_bfd", "prot_t5_xxl_bfd"}, {"prot_t5_xl_u50", "prot_t5_xxl_u50"}
OTHERS = {"prot_xlnet", "prot_albert", "prot_electra"}
CONCERNED = {
    errata.UNIREF100: {"prot_txl", "prot_bert", *OTHERS},
    errata.BFD: {"prot_txl_bfd", "prot_bert_bfd", *T5_BFD},
    errata.HOROVOD: BERT | OTHERS | T5_BFD | T5_U50,
    errata.LMS: TXL | BERT,
}
SIZES = {name: size for record in architecture.available() for name, size in record.sizes.items() if name.startswith("prot_")}


@pytest.mark.parametrize("note", CONCERNED, ids=["UNIREF100", "BFD", "HOROVOD", "LMS"])
def test_a_note_is_on_the_presets_that_it_concerns(note: str) -> None:
    assert {name for name, size in SIZES.items() if note in size.errata} == CONCERNED[note]


def test_the_epochs_of_a_warm_up_depend_on_which_size_of_uniref100_is_right() -> None:
    tokens = 5_500 * 22_464 * 512
    (said,) = (line for line in SIZES["prot_txl"].errata if "warm-up" in line)
    assert f"{tokens / 88e9:.2f} of 88 billion residues, {tokens / 80e9:.2f} of 80 billion" in said
