"""The registry of architectures, with real entry points of third parties."""

from __future__ import annotations

import dataclasses

import pytest

from prottrans_hpc import architecture
from prottrans_hpc.errors import ConfigError


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    """`plug_in(name, target, code)` makes an installed distribution with an entry point, as pip leaves it behind."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name: str, target: str, code: str = "") -> None:
        metadata = tmp_path / f"{name}_plugin-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[prottrans_hpc.architectures]\n{name} = {target}\n")
        (tmp_path / f"{target.partition(':')[0]}.py").write_text(code)

    return make


ANOTHER = """
import dataclasses
from prottrans_hpc.architectures.prot_bert import ARCHITECTURE
RECORD = dataclasses.replace(ARCHITECTURE, name="another")
"""


def test_every_built_in_record_loads_under_its_own_name():
    assert architecture.BUILT_IN
    for name in architecture.BUILT_IN:
        record = architecture.get(name)
        assert record.name == name
        assert record.sizes
        assert record.objectives


def test_a_third_party_is_listed_and_found(plug_in):
    plug_in("another", "another_module:RECORD", ANOTHER)
    assert "another" in architecture.names()
    assert architecture.get("another").name == "another"
    assert {record.name for record in architecture.available()} >= {"another", "prot_bert"}


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise RuntimeError('licence server is down')", "RuntimeError: licence server is down"),
        ("import a_package_that_is_not_there", "a_package_that_is_not_there"),
        ("", "has no attribute 'RECORD'"),
        ("RECORD = 42", "gives a int, not an Architecture record"),
    ],
)
def test_a_broken_plug_in_is_a_warning_unless_asked_for(plug_in, capsys, code, said, request):
    name = f"broken_{abs(hash(request.node.name))}"  # a module of its own: Python keeps modules by name
    plug_in(name, f"{name}_module:RECORD", code)
    assert name in architecture.names()
    assert capsys.readouterr().err == ""  # listing imports nothing
    assert "prot_bert" in [record.name for record in architecture.available()]
    assert said in capsys.readouterr().err
    with pytest.raises(ConfigError) as caught:
        architecture.get(name)
    assert said in str(caught.value)
    assert name in str(caught.value)


def test_a_plug_in_cannot_replace_a_built_in(plug_in, capsys):
    plug_in("prot_bert", "hijack_module:RECORD", "raise SystemExit('hijacked')")
    assert architecture.get("prot_bert").build.startswith("prottrans_hpc.")
    assert "the built-in one is used" in capsys.readouterr().err


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError) as caught:
        architecture.get("prot_brt")
    assert "did you mean 'prot_bert'?" in str(caught.value)
    assert f"registered are {', '.join(architecture.names())}" in str(caught.value)


@pytest.mark.parametrize("name", ["prot_t5_xl", "prot_t5_xl_bfd"])
def test_the_name_of_a_size_is_answered_with_its_family_and_not_with_one_that_looks_like_it(name: str) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'prot_t5'\?"):
        architecture.get(name)


def test_an_unknown_size_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"no size 'huge'; its sizes are .*tiny"):
        architecture.get("prot_bert").size("huge")


def test_a_vocabulary_maps_every_byte():
    vocabulary = architecture.get("prot_bert").vocabulary
    table = vocabulary.residue_table()
    assert len(table) == 256
    assert [vocabulary.tokens[table[ord(residue)]] for residue in "LAGX"] == list("LAGX")
    assert {vocabulary.tokens[table[byte]] for byte in b"*-a1 \x00\xff"} == {vocabulary.unknown}
    assert sorted(vocabulary.tokens[i] for i in vocabulary.residue_ids()) == sorted("ACDEFGHIKLMNPQRSTVWY")


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        architecture.get("prot_bert").name = "other"
