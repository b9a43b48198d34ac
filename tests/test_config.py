"""Finding, reading and overriding TOML files, and what is said about faults in them."""

from __future__ import annotations

import json
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic.dataclasses import dataclass

from prottrans_hpc import config
from prottrans_hpc.errors import ConfigError


@dataclass(frozen=True, config=config.STRICT)
class Inner:
    steps: config.Count
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, config=config.STRICT)
class Outer:
    name: str
    inner: Inner
    parts: tuple[Inner, ...] = ()
    limit: int | None = None
    peaks: dict[str, Inner] | None = None


GOOD = {"name": "x", "inner": {"steps": 3}}


def faults(values) -> str:
    with pytest.raises(ConfigError) as caught:
        config.parse(Outer, values, source="my.toml")
    return str(caught.value)


def test_good_values_become_the_noun():
    parsed = config.parse(Outer, GOOD | {"parts": [{"steps": 1, "rate": 1}]}, source="my.toml")
    assert parsed == Outer(name="x", inner=Inner(steps=3), parts=(Inner(steps=1, rate=1.0),))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nmae": "y"}, "unknown key nmae (did you mean 'name'?)"),
        ({"inner": {"steps": 3, "rtae": 1.0}}, "unknown key inner.rtae (did you mean 'rate'?)"),
        ({"inner": {"steps": 3, "zzz": 1.0}}, "unknown key inner.zzz (known: steps, rate, kind)"),
        ({"parts": [{"steps": 1}, {"steps": 2, "setps": 1}]}, "unknown key parts.1.setps (did you mean 'steps'?)"),
        ({"peaks": {"bf16": {"steps": 2, "setps": 1}}}, "unknown key peaks.bf16.setps (did you mean 'steps'?)"),
        ({"inner": {}}, "missing key inner.steps"),
        ({"inner": {"steps": 12.5}}, "inner.steps = 12.5"),
        ({"inner": {"steps": True}}, "inner.steps = True"),
        ({"inner": {"steps": "3"}}, "inner.steps = '3'"),
        ({"inner": {"steps": 0}}, "inner.steps = 0: input should be greater than or equal to 1"),
        ({"inner": {"steps": 3, "rate": float("nan")}}, "inner.rate = nan"),
        ({"inner": {"steps": 3, "rate": float("inf")}}, "inner.rate = inf"),
        ({"inner": {"steps": 3, "kind": "c"}}, "inner.kind = 'c': input should be 'a' or 'b'"),
        ({"inner": 5}, "inner = 5"),
        ({"name": None}, "name = None"),
        ({"limit": "none"}, "limit = 'none'"),
    ],
)
def test_a_fault_is_named_with_file_and_key(change, said):
    message = faults(GOOD | change)
    assert message.startswith("my.toml: ")
    assert said in message


def test_all_faults_are_told_at_once():
    message = faults({"nmae": "x", "inner": {"steps": -1, "rate": "fast", "kind": 3}, "parts": {}})
    for part in ("nmae", "missing key name", "inner.steps", "inner.rate", "inner.kind", "parts"):
        assert part in message


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("inner.steps=7", {"name": "x", "inner": {"steps": 7}}),
        ("inner.rate=1e-3", {"name": "x", "inner": {"steps": 3, "rate": 1e-3}}),
        ("name=bare words", {"name": "bare words", "inner": {"steps": 3}}),
        ('name="7"', {"name": "7", "inner": {"steps": 3}}),
        ("name=a=b", {"name": "a=b", "inner": {"steps": 3}}),
        ("limit=[1, 2]", {"name": "x", "inner": {"steps": 3}, "limit": [1, 2]}),
        ("new.section.key=true", {"name": "x", "inner": {"steps": 3}, "new": {"section": {"key": True}}}),
        ("name=1\ninner = 2", {"name": "1\ninner = 2", "inner": {"steps": 3}}),
        ("name=", {"name": "", "inner": {"steps": 3}}),
    ],
)
def test_a_setting_replaces_one_value(setting, expected):
    assert config.with_settings(GOOD, [setting]) == expected
    assert GOOD == {"name": "x", "inner": {"steps": 3}}


def test_a_number_indexes_a_list_and_later_settings_win():
    values = {"phases": [{"steps": 1}, {"steps": 2}]}
    assert config.with_settings(values, ["phases.1.steps=5", "phases.1.steps=6"]) == {"phases": [{"steps": 1}, {"steps": 6}]}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("steps", "not of the form section.key=value"),
        ("=3", "not of the form section.key=value"),
        ("phases.2.steps=1", "phases is a list of 2; give an index from 0 to 1, not '2'"),
        ("phases.first.steps=1", "not 'first'"),
        ("phases.-1.steps=1", "not '-1'"),
        ("name.x=1", "name is a value, not a section"),
    ],
)
def test_a_setting_that_cannot_be_applied_is_refused(setting, said):
    with pytest.raises(ConfigError, match=r"--set") as caught:
        config.with_settings({"name": "x", "phases": [{"steps": 1}, {"steps": 2}]}, [setting])
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["a", "A-1_b.c", "x" * 64])
def test_safe_names_pass(name):
    assert config.check_name(name, what="the run") == name


@pytest.mark.parametrize("name", ["", "x" * 65, "a b", "a/b", "..", ".hidden", "-rf", "a\n", "a;b", "$(x)", "\u00e9", "a\x1b[31m"])
def test_unsafe_names_are_refused(name):
    with pytest.raises(ConfigError, match="the run"):
        config.check_name(name, what="the run")


def test_shipped_files_are_found_by_name_and_others_by_path(tmp_path):
    assert "tiny_prot_bert" in config.shipped_names("jobs")
    assert config.find_file("jobs", "tiny_prot_bert").name == "tiny_prot_bert.toml"
    own = tmp_path / "own.toml"
    own.write_text("")
    assert config.find_file("jobs", str(own)) == own


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("tiny_prot_brt", "did you mean 'tiny_prot_bert'?"),
        ("tiny_prot_brt", "a path must end in .toml"),
        ("nowhere/own.toml", "is not a file"),
        ("../hpc/laptop", "not a usable name"),
    ],
)
def test_a_file_that_is_not_there_says_what_is(value, said):
    with pytest.raises(ConfigError) as caught:
        config.find_file("jobs", value)
    assert said in str(caught.value)


@pytest.mark.parametrize("content", [b"a = ", b"a = 1\na = 2\n", b"\xff\xfe"])
def test_a_file_that_is_not_toml_is_named(tmp_path, content):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML"):
        config.read_toml(path)


def test_differences_name_every_leaf():
    old = {"a": 1, "b": {"c": [1, 2], "d": "x"}, "e": [1]}
    new = {"a": 1, "b": {"c": [1, 3], "d": "x"}, "e": [1, 2], "f": True}
    assert config.differences(old, new) == ["b.c.1: 2 -> 3", "e: [1] -> [1, 2]", "f: None -> True"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(min_size=1), inner), max_leaves=10
)


@given(JSON)
def test_nothing_differs_from_itself(value):
    assert config.differences(value, json.loads(json.dumps(value))) == []


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",))))
def test_any_text_after_the_equals_sign_is_a_value_and_sets_nothing_else(text):
    assert set(config.with_settings({"a": 1}, [f"b={text}"])) == {"a", "b"}


def test_a_noun_goes_to_json_and_back():
    noun = Outer(name="x", inner=Inner(steps=3), parts=(Inner(steps=1),))
    assert config.parse(Outer, json.loads(json.dumps(config.to_json(noun))), source="run.json") == noun
