"""The walls of the house, held by walking every import statement of the package.

Two towers stand on the base and never see each other: `launch` (login node) and the ranks' side. What one part may
import is one line of the table below.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "prottrans_hpc"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

BASE_MODULES = {"__init__", "errors", "durable", "stage", "config", "machine", "run_dir"} | {
    "recipe",
    "parallel_layout",
    "scaling_study",
    "recipe_health",
    "recipe_memory",
    "recipe_objectives",
    "recipe_optimizers",
    "recipe_parallel",
    "precision_levels",
    "architecture",
    "architectures",
    "terminal",
    "json_lines",
    "file_lock",
    "timestamp",
}
COMM_MODULES = {
    "comm",
    "comm_torch",
    "comm_horovod",
    "comm_rendezvous",
    "whereabouts",
    "comm_sharded",
    "comm_reduction",
    "comm_buckets",
    "comm_compression",
    "comm_lost",
    "comm_torch_groups",
    "comm_horovod_groups",
}

BELOW_CORPUS = {"base", "rank", "log", "comm"}
MAY_IMPORT = {
    "base": set(),
    "launch": {"base"},
    "rank": {"base"},
    "log": {"base", "rank"},
    "comm": {"base", "rank", "log", "memory"},
    "corpus": BELOW_CORPUS,
    "objectives": BELOW_CORPUS | {"corpus"},
    # Plug-ins for any torch module.
    "memory": {"base"},
    "models": BELOW_CORPUS | {"memory"},
    "train": BELOW_CORPUS | {"corpus", "objectives", "memory", "models"},
    "embed": BELOW_CORPUS | {"corpus", "objectives", "memory", "models", "train"},
    "profile": BELOW_CORPUS | {"corpus", "objectives", "memory", "models", "train", "embed"},
    # `python -m prottrans_hpc STAGE RUN_DIR`: the gate of the ranks' side; it goes on through the table of stages.
    "__main__": BELOW_CORPUS | {"train"},
}
LIBRARIES = {
    "base": {"pydantic", "pydantic_core", "rich"},
    "launch": {"click", "rich", "submitit", "pydantic"},
    "rank": set(),
    "log": set(),
    "memory": {"torch"},
    # Residues, not models: a corpus is built and a batch is drawn where torch is not installed.
    "corpus": {"numpy", "h5py", "mpi4py", "isal", "zstandard", "matplotlib", "rich"},
    "objectives": {"numpy"},
}
"""Third-party packages that a part may import; a part that is not listed may import any."""

HEAVY = ("torch", "numpy", "h5py", "safetensors", "matplotlib", "scipy", "transformers", "mpi4py", "horovod", "pandas")


def part_of(module: str) -> str:
    """The part of the house that a dotted module name belongs to."""
    name = [*module.split("."), "__init__"][1]
    if name in BASE_MODULES:
        return "base"
    return "comm" if name in COMM_MODULES else name


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def dotted(path: Path) -> str:
    parts = [PACKAGE, *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, also inside functions."""
    package = dotted(path).split(".") if path.name == "__init__.py" else dotted(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])]) if node.level else str(node.module)
            for alias in node.names:
                # `from . import config` names a module; `from .config import STRICT` a thing within one.
                is_module = origin == PACKAGE or (ROOT.parent / origin.replace(".", "/") / f"{alias.name}.py").exists()
                yield node.lineno, f"{origin}.{alias.name}" if is_module and origin.startswith(PACKAGE) else origin


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_a_module_imports_only_from_the_layers_below(path):
    part = part_of(dotted(path))
    assert part in MAY_IMPORT, f"{path} belongs to no part of the house: add it to the table, with what it may import"
    wrong = [
        f"{path.relative_to(ROOT.parent)}:{line} imports {name}; {part} may import only {', '.join(sorted(MAY_IMPORT[part] | {part}))}"
        for line, name in imports_of(path)
        if name.split(".")[0] == PACKAGE and name != f"{PACKAGE}.__version__" and part_of(name) not in MAY_IMPORT[part] | {part}
    ]
    assert wrong == []


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_a_module_uses_only_the_libraries_of_its_part(path):
    part = part_of(dotted(path))
    allowed = LIBRARIES.get(part)
    if allowed is None:
        return
    wrong = [
        f"{path.relative_to(ROOT.parent)}:{line} imports {name}; {part} may use only {', '.join(sorted(allowed)) or 'the standard library'}"
        for line, name in imports_of(path)
        if name.split(".")[0] not in sys.stdlib_module_names | {PACKAGE} | allowed
    ]
    assert wrong == []


def test_the_walk_sees_every_kind_of_import(tmp_path, monkeypatch):
    module = tmp_path / PACKAGE / "launch" / "bad.py"
    module.parent.mkdir(parents=True)
    (tmp_path / PACKAGE / "config.py").touch()
    module.write_text("import torch.nn\nfrom .. import config\nfrom ..train.loop import run\nfrom . import cli\ndef f():\n    from numpy import array\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path / PACKAGE)
    assert sorted(imports_of(module)) == [
        (1, "torch.nn"),
        (2, f"{PACKAGE}.config"),
        (3, f"{PACKAGE}.train.loop"),
        (4, f"{PACKAGE}.launch"),
        (6, "numpy"),
    ]


def loaded_after(statement: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after a statement."""
    program = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    return set(subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=60).stdout.split())


def test_the_login_nodes_side_loads_nothing_heavy():
    names = [dotted(path) for path in modules() if part_of(dotted(path)) in ("base", "launch")]
    assert f"{PACKAGE}.launch.cli" in names
    assert loaded_after(f"import {', '.join(names)}").isdisjoint(HEAVY)


def test_help_loads_next_to_nothing():
    loaded = loaded_after("from prottrans_hpc.launch.cli import main\nimport contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()): main(['--help'])")
    assert loaded.isdisjoint({*HEAVY, "pydantic", "submitit"})


def test_every_part_of_the_table_exists():
    parts = {part_of(dotted(path)) for path in modules()}
    assert set(MAY_IMPORT) - parts == set()
