"""Slurm's host lists, there and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prottrans_hpc.launch import hostlist

NAMES = st.lists(st.from_regex(r"[a-z][a-z-]{0,5}\d{0,4}", fullmatch=True), max_size=30)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("login", ["login"]),
        ("n[1-3,7],login", ["n1", "n2", "n3", "n7", "login"]),
        ("s[0009-0011]", ["s0009", "s0010", "s0011"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("n[1-2]-ib,x", ["n1-ib", "n2-ib", "x"]),
    ],
)
def test_lists_as_slurm_writes_them(text: str, names: list[str]) -> None:
    assert hostlist.expand(text) == names


@pytest.mark.parametrize("text", ["n[1-", "n[]", "n[a-b]", "n]1["])
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not"):
        hostlist.expand(text)


@given(NAMES)
def test_any_names_come_back(names: list[str]) -> None:
    assert hostlist.expand(hostlist.compress(names)) == names


def test_a_thousand_names_are_short() -> None:
    assert hostlist.compress(f"s{number:04d}" for number in range(1, 937)) == "s[0001-0936]"
