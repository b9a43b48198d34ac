"""Every command in the documentation is run, in the order in which a reader meets it.

The convention, for README.md, docs/*.md and hpc/README.md:
- A ```console block is run: lines that start with `$ ` are commands (`> ` goes on), the others what they print. Stated
  lines must be printed, in that order; `...` stands for anything. A command must end with 0 unless `$ echo $?` follows.
- All pages share one working folder, in the order of the table in docs/index.md; there `data/` is the shipped data, and
  `pip install` goes to a folder of the reader's own.
- `<!-- file: NAME -->` before a block: the block is written to that file. `<!-- not run: REASON -->`: it is not run.
- A ```toml block must be TOML, a ```python block Python.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from prottrans_hpc import errors

REPOSITORY = Path(__file__).resolve().parents[1]
_FENCE = re.compile(r"```(\w*)\s*")
_DIRECTIVE = re.compile(r"<!-- (file|not run): (.+?) -->")
_LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")
_STATUS = re.compile(r"\x1e(\d+)\n")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    content: str
    directive: tuple[str, str] | None


@dataclass(frozen=True)
class Command:
    """A command of a console block and what the page says that it prints."""

    text: str
    stated: tuple[str, ...]


def blocks_of(path: Path) -> list[Block]:
    found: list[Block] = []
    directive = None
    inside: tuple[int, str, list[str]] | None = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if inside and line == "```":
            found.append(Block(path.name, inside[0], inside[1], "\n".join(inside[2]) + "\n", directive))
            inside = directive = None
        elif inside:
            inside[2].append(line)
        elif match := _FENCE.fullmatch(line):
            inside = (number, match[1], [])
        elif line.strip():
            match = _DIRECTIVE.fullmatch(line.strip())
            directive = (match[1], match[2]) if match else None
    assert inside is None, f"{path}: the block of line {inside and inside[0]} has no end"
    return found


def commands_of(block: Block) -> list[Command]:
    found: list[Command] = []
    for line in block.content.splitlines():
        if line.startswith("$ "):
            found.append(Command(line[2:], ()))
        elif line.startswith("> "):
            found[-1] = Command(f"{found[-1].text}\n{line[2:]}", ())
        elif line.strip():
            found[-1] = Command(found[-1].text, (*found[-1].stated, line))
    return found


def run_block(block: Block, cwd: Path, environment: dict[str, str]) -> None:
    """Run a console block in one shell; fails with page and line when it does not do what the page says."""
    commands = commands_of(block)
    # A status line behind each command; the status itself is kept for `echo $?`.
    script = "".join(f'{command.text}\n_code=$?; printf "\\036%d\\n" "$_code"; (exit "$_code")\n' for command in commands)
    done = subprocess.run(["bash", "-c", script], cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1500)
    pieces = _STATUS.split(done.stdout)
    outputs, codes = pieces[0::2], [int(code) for code in pieces[1::2]]
    if len(codes) != len(commands):
        raise AssertionError(f"{block.page}:{block.line}: the shell ended early\n{done.stdout}")
    for number, (command, output, code) in enumerate(zip(commands, outputs, codes, strict=False)):
        asked = number + 1 < len(commands) and commands[number + 1].text.startswith("echo $?")
        missing = first_missing(command.stated, output)
        if code != 0 and not asked:
            raise AssertionError(f"{block.page}:{block.line}: `{command.text}` ended with {code}\n{output}")
        if missing is not None:
            raise AssertionError(f"{block.page}:{block.line}: `{command.text}` did not print\n{missing}\nbut\n{output}")


def first_missing(stated: tuple[str, ...], output: str) -> str | None:
    """The first stated line that does not follow in the output, if any."""
    lines = iter([line.rstrip() for line in output.splitlines()])
    for wanted in stated:
        pattern = re.compile(".*".join(re.escape(part) for part in wanted.rstrip().split("...")))
        if wanted.strip() != "..." and not any(pattern.fullmatch(line) for line in lines):
            return wanted
    return None


def pages() -> list[Path]:
    """README.md, then the pages in the order of the index."""
    index = REPOSITORY / "docs" / "index.md"
    linked = [index.parent / target for target, _ in _LINK.findall(index.read_text(encoding="utf-8")) if target.endswith(".md") and "/" not in target]
    return [REPOSITORY / "README.md", index, *dict.fromkeys(linked), REPOSITORY / "hpc" / "README.md"]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A reader's working folder and environment: the shipped data, and `prottrans` on PATH."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "data").symlink_to(REPOSITORY / "data")
    commands = tmp_path_factory.mktemp("bin")
    site = tmp_path_factory.mktemp("site")
    shims = {
        "prottrans": f'exec {sys.executable} -m prottrans_hpc.launch.cli "$@"',
        "pip": f'exec {sys.executable} -m pip "$@" --target {site} --no-deps --no-build-isolation --no-index --quiet',
    }
    for name, body in shims.items():
        (commands / name).write_text(f"#!/bin/sh\n{body}\n")
        (commands / name).chmod(0o755)
    path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return folder, os.environ | {"PATH": path, "PYTHONPATH": f"{REPOSITORY}:{site}", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("page", pages(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_the_commands_of_a_page_do_what_it_says(page, reader):
    folder, environment = reader
    for block in blocks_of(page):
        if block.directive and block.directive[0] == "not run":
            continue
        if block.directive:
            target = folder / block.directive[1]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.content)
        elif block.language == "console":
            run_block(block, folder, environment)
        if block.language == "toml":
            tomllib.loads(block.content)
        elif block.language == "python":
            ast.parse(block.content)


def test_every_page_is_in_the_index():
    assert {path.name for path in (REPOSITORY / "docs").glob("*.md")} == {path.name for path in pages() if path.parent.name == "docs"}


@pytest.mark.parametrize(
    "page", [*pages(), REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "data" / "README.md"], ids=lambda path: str(path.relative_to(REPOSITORY))
)
def test_every_link_of_a_page_leads_somewhere(page):
    targets = [target for target, _ in _LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_console_command_is_run_or_says_why_not():
    """A command in a block of another language would slip through."""
    slipped = [
        f"{block.page}:{block.line}" for page in pages() for block in blocks_of(page) if block.language != "console" and re.search(r"^\$ ", block.content, re.M)
    ]
    assert slipped == []
    assert sum(len(commands_of(block)) for page in pages() for block in blocks_of(page) if block.language == "console" and not block.directive) >= 15


def test_the_table_of_exit_codes_is_the_programs():
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", (REPOSITORY / "docs" / "exit-codes.md").read_text(encoding="utf-8"), re.M)
    assert {int(code): text for code, text in rows} == errors.MEANING


def a_block(content: str) -> Block:
    return Block("page.md", 1, "console", content, None)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("$ echo one\ntwo\n", "did not print\ntwo"),
        ("$ printf 'one\\ntwo\\n'\ntwo\none\n", "did not print\none"),
        ("$ false\n", "`false` ended with 1"),
        ("$ exit 0\n$ echo never\n", "the shell ended early"),
        ("$ (exit 75)\n$ echo $?\n76\n", "did not print\n76"),
    ],
)
def test_a_page_that_is_wrong_is_found(tmp_path, content, said):
    with pytest.raises(AssertionError) as caught:
        run_block(a_block(content), tmp_path, {"PATH": "/usr/bin:/bin"})
    assert said in str(caught.value)
    assert "page.md:1" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "$ printf 'one\\ntwo\\nthree\\n'\none\n...\nth...e\n",
        "$ (exit 75)\n$ echo $?\n75\n",
        "$ x=1\n$ printf 'no newline'\nno newline\n$ echo $x\n1\n",
        "$ for i in 1 2\n> do echo $i; done\n2\n",
        "$ echo error >&2\nerror\n",
    ],
)
def test_a_page_that_is_right_passes(tmp_path, content):
    run_block(a_block(content), tmp_path, {"PATH": "/usr/bin:/bin"})
