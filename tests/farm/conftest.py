"""A computer whose nodes can be told to misbehave: its interpreter is a script that does as told, then what was asked."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard

_INTERPRETER = """#!/bin/bash
# Calls of stage_process, by item, one line each; an item's next misdeed is the first line of a file of its name.
for word in "$@"; do
  case $word in
    *.request.json)
      item=${word##*/} item=${item%%.request.json}
      echo "$item" >> FOLDER/calls
      if [ -s "FOLDER/misdeeds/$item" ]; then
        misdeed=$(head -n 1 "FOLDER/misdeeds/$item")
        sed -i 1d "FOLDER/misdeeds/$item"
        eval "$misdeed"
      fi ;;
  esac
done
exec PYTHON "$@"
"""


@dataclass(frozen=True)
class Machine:
    """A profile for --machine, and what its nodes did."""

    folder: Path

    @property
    def profile(self) -> str:
        return str(self.folder / "unruly.toml")

    def misbehave(self, item: str, *misdeeds: str) -> None:
        """What happens at the next starts of an item ("00001.0") before it begins, in shell."""
        (self.folder / "misdeeds" / item).write_text("".join(f"{misdeed}\n" for misdeed in misdeeds))

    def take_calls(self) -> list[str]:
        """The items that were started since the last call, sorted."""
        path = self.folder / "calls"
        calls = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return sorted(calls)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    folder = tmp_path / "machine"
    (folder / "misdeeds").mkdir(parents=True)
    python = folder / "python"
    python.write_text(_INTERPRETER.replace("FOLDER", str(folder)).replace("PYTHON", sys.executable))
    python.chmod(0o755)
    profile = ['name = "unruly"', 'description = "misbehaves"', 'scheduler = "local"', 'starter = "processes"', "ranks_per_node = 1", "max_nodes = 8"]
    (folder / "unruly.toml").write_text("\n".join([*profile, f'python = "{python}"', "[node]", "num_cpu_cores = 2\n"]))
    return Machine(folder)


@pytest.fixture(scope="session")
def megabytes_fasta(tmp_path_factory: pytest.TempPathFactory, proteins_fasta: Path) -> Path:
    """All 10,000 proteins, plain: enough to be cut into ranges."""
    path = tmp_path_factory.mktemp("fasta") / "all.fasta"
    with zstandard.open(proteins_fasta, "rb") as file:
        path.write_bytes(file.read())
    return path


@pytest.fixture(scope="session")
def few_fasta(tmp_path_factory: pytest.TempPathFactory, megabytes_fasta: Path) -> Path:
    """Proteins for three windows of an extraction, some of which cannot be embedded."""
    records = megabytes_fasta.read_bytes().split(b">")[1:]
    short = [record for record in records if len(record) < 110][:420]
    path = tmp_path_factory.mktemp("fasta") / "few.fasta"
    # A window closes after 2^18 residues, problems counted: each of these, which the model cannot read, fills one.
    longest = b">long%d\n" + b"MKVLAAGI" * 33_000 + b"\n"
    parts = [b"".join(b">" + record for record in short[i::3]) for i in range(3)]
    path.write_bytes(parts[0] + longest % 1 + b">bad one\nMKJL1\n>empty\n" + parts[1] + longest % 2 + parts[2])
    return path
