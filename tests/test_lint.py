"""The linters, and the limits of shape that no linter knows, as part of the tests."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
LINTED = ("prottrans_hpc", "tests", "benchmarks", "setup.py")
MODULES = sorted((REPOSITORY / "prottrans_hpc").rglob("*.py"))

MOST_LINES_OF_A_MODULE = 300
MOST_LINES_OF_A_FUNCTION = 60


@pytest.mark.parametrize(
    "argv",
    [
        ("-m", "ruff", "check", "--quiet", *LINTED),
        ("-m", "ruff", "format", "--check", *LINTED),
        ("-m", "mypy", "--strict", "prottrans_hpc"),
        ("-m", "codespell_lib", "prottrans_hpc", "tests", "docs", "hpc", "jobs", "scripts", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
    ],
    ids=lambda argv: " ".join(argv[1:3]),
)
def test_the_linters_find_nothing(argv):
    done = subprocess.run([sys.executable, *argv], cwd=REPOSITORY, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_modules_and_functions_stay_readable(path):
    source = path.read_text(encoding="utf-8")
    assert source.isascii(), "ASCII only in code"
    assert source.count("\n") <= MOST_LINES_OF_A_MODULE, "split it by noun"
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = [
        f"{node.name}, line {node.lineno}: {node.end_lineno - node.lineno + 1} lines"
        for node in functions
        if node.end_lineno - node.lineno >= MOST_LINES_OF_A_FUNCTION
    ]
    assert long == []


@pytest.mark.parametrize("script", sorted([*(REPOSITORY / "scripts").glob("*.sh"), REPOSITORY / ".ci" / "run"]), ids=lambda path: path.name)
def test_shell_scripts_parse_and_are_strict(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert "\nset -euo pipefail\n" in script.read_text(encoding="utf-8")
    assert script.stat().st_mode & 0o111
