"""Every byte has exactly one meaning."""

from __future__ import annotations

import pytest

from prottrans_hpc.corpus.alphabet import Rules
from prottrans_hpc.errors import ConfigError


@pytest.mark.parametrize("keep_rare", [False, True])
def test_the_table(keep_rare: bool) -> None:
    table = Rules(keep_rare=keep_rare).table()
    for byte in range(256):
        letter = chr(byte).upper() if byte < 0x80 else ""
        if letter and letter in "ACDEFGHIKLMNPQRSTVWYX":
            assert table[byte] == ord(letter)
        elif letter and letter in "BOUZ":
            assert table[byte] == (ord(letter) if keep_rare else 0x80 | ord("X"))
        elif letter and letter in "*-.":
            assert table[byte] == 0x80
        elif letter and letter in " \t\n\r\v\f":
            assert table[byte] == 0
        else:
            assert table[byte] == 0x80 | ord("x"), byte


def test_counts_have_names() -> None:
    counted = [0] * 256
    for byte, num in {ord("B"): 2, ord("b"): 1, ord("*"): 4, ord("-"): 5, ord("J"): 6, ord("j"): 1, 0xE9: 7, 0x1B: 8}.items():
        counted[byte] = num
    assert Rules().counts(counted) == {"replaced": {"B": 3}, "removed": {"*": 4, "-": 5}, "invalid": {"0x1B": 8, "J": 7, "0xE9": 7}}


def test_an_unknown_rule_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="error, x, skip"):
        Rules("ignore")
