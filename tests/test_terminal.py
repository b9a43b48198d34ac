"""What reaches a terminal: escaped text, levels, progress on a terminal and elsewhere."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prottrans_hpc import terminal


@given(st.text() | st.binary())
def test_no_text_reaches_the_terminal_with_a_character_that_moves_it(text):
    safe = terminal.printable(text)
    assert all(c == " " or c.isprintable() for c in safe)
    assert len(safe) <= 200


@given(st.text(alphabet="ACDEFGHIKLMNPQRSTVWY |_-.=", max_size=200))
def test_ordinary_headers_pass_unchanged(text):
    assert terminal.printable(text) == text


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\r\nb\tc", "a\\r\\nb\\tc"),
        ("abc\u202edcba", "abc\\u202edcba"),
        (b"sp|P1|\xff", "sp|P1|\\xff"),
        ("\ud800", "\\ud800"),
        ("no\u00a0break", "no\\xa0break"),
        ("prot\u00e9ine", "prot\u00e9ine"),
    ],
)
def test_control_and_bidirectional_characters_are_escaped(text, safe):
    assert terminal.printable(text) == safe


def test_several_lines_stay_lines_and_none_passes_for_a_message_of_its_own():
    assert terminal.printable_lines("two faults:\nerror: \x1b[31mred\n") == "two faults:\n  error: \\x1b[31mred"


def test_a_long_text_is_cut_and_says_so():
    assert terminal.printable("x" * 201) == "x" * 197 + "..."
    assert terminal.printable("x" * 200) == "x" * 200


@pytest.mark.parametrize(("level", "shown"), [(terminal.QUIET, ["warn"]), (terminal.NORMAL, ["warn", "note"]), (terminal.VERBOSE, ["warn", "note", "detail"])])
def test_levels_hide_notes_but_never_warnings(capsys, level, shown):
    terminal.set_verbosity(level)
    for function in (terminal.warn, terminal.note, terminal.detail):
        function(f"<{function.__name__}>")
    streams = capsys.readouterr()
    assert streams.out == ""
    assert [name for name in ("warn", "note", "detail") if f"<{name}>" in streams.err] == shown


@pytest.mark.parametrize("total", [100, None])
def test_progress_elsewhere_than_on_a_terminal_is_plain_lines(capsys, total):
    with terminal.progress("reading", total=total, unit="proteins") as advance:
        for _ in range(10):
            advance(10)
    err = capsys.readouterr().err
    assert "reading: 100 proteins in" in err
    assert "\x1b" not in err


def test_progress_shows_where_it_is_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "_PLAIN_LINE_EVERY_S", 0.0)
    with terminal.progress("reading", total=3000, unit="proteins") as advance:
        advance(1500)
    assert "reading: 1,500 of 3,000 proteins" in capsys.readouterr().err


def test_quiet_progress_prints_nothing(capsys):
    terminal.set_verbosity(terminal.QUIET)
    with terminal.progress("reading", total=3, unit="proteins") as advance:
        advance(3)
    assert capsys.readouterr().err == ""


def test_an_error_travels_through_progress():
    with pytest.raises(ZeroDivisionError), terminal.progress("reading", total=3, unit="proteins"):
        raise ZeroDivisionError


@pytest.mark.parametrize("total", ["100", "None"])
def test_on_a_terminal_there_is_a_bar_and_a_label_is_never_markup(repository, total):
    program = (
        "from prottrans_hpc import terminal\n"
        f"with terminal.progress('[red]file[/wrong]', total={total}, unit='proteins') as advance:\n"
        "    [advance(10) for _ in range(10)]\n"
    )
    master, slave = pty.openpty()
    try:
        environment = os.environ | {"PYTHONPATH": str(repository), "TERM": "xterm-256color", "COLUMNS": "120"}
        subprocess.run([sys.executable, "-c", program], stderr=slave, env=environment, check=True, timeout=60)
        shown = os.read(master, 65536).decode()
    finally:
        os.close(slave)
        os.close(master)
    assert "[red]file[/wrong]" in shown
    assert "100" in shown
    assert "proteins" in shown
    assert "\x1b[" in shown
