"""What a person may choose for `prottrans embed`, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..stage import Request

STORED = {"fp32": "float32", "bf16": "float16", "fp16": "float16"}
"""Precision -> type of the numbers in the file. HDF5 has no bf16, and fp16 keeps more digits of values near 1."""
POOLS = ("mean", "none")
INVALID = ("error", "x", "skip")


@dataclass(frozen=True)
class Options:
    """The request of one extraction."""

    source: Path
    """A run directory or a checkpoint."""
    fasta: tuple[Path, ...]
    out: Path
    per_residue: bool
    """Write `residues` and `offsets`."""
    mean: bool
    """Write `mean`."""
    precision: str
    bin_residues: int
    """Residues of one packed batch; a longer protein is a batch of its own."""
    device: str
    """auto, cpu or cuda."""
    invalid: str
    """What happens to a protein with letters that are no residue: error, x or skip."""
    json: bool
    """Print a summary object to standard output."""
    also: Path | None = None
    """A second run directory or checkpoint, whose numbers follow those of the first."""

    def __post_init__(self) -> None:
        if not (self.per_residue or self.mean):
            raise ConfigError("--pool none without --per-residue leaves nothing to write: give --per-residue, or --pool mean")
        if self.precision not in STORED:
            raise ConfigError(f"no precision is called {self.precision!r}; there are {', '.join(STORED)}")
        if self.invalid not in INVALID:
            raise ConfigError(f"--invalid is one of {', '.join(INVALID)}, not {self.invalid!r}")
        if self.bin_residues < 1:
            raise ConfigError(f"--bin-residues must be at least 1, not {self.bin_residues}")
        if not self.fasta:
            raise ConfigError("no FASTA file is given")
        if self.out.is_dir():
            raise ConfigError(f"--out {self.out} is a directory; give the name of the HDF5 file to write")

    @property
    def parts(self) -> Path:
        """The work folder that a later run resumes from."""
        return self.out.with_name(self.out.name + ".parts")

    def as_identity(self) -> dict[str, Any]:
        """The choices that the numbers in the file depend on; the device is added where it is resolved."""
        return {
            "per_residue": self.per_residue,
            "mean": self.mean,
            "precision": self.precision,
            "bin_residues": self.bin_residues,
            "invalid": self.invalid,
        }


def parse_request(request: Request) -> Options:
    """The options in a stage's request. Raises ConfigError with what is possible."""
    if request["pool"] not in POOLS:
        raise ConfigError(f"--pool is one of {', '.join(POOLS)}, not {request['pool']!r}")
    return Options(
        source=Path(request["source"]),
        fasta=tuple(Path(name) for name in request["fasta"]),
        out=Path(request["out"]),
        per_residue=bool(request["per_residue"]),
        mean=request["pool"] == "mean",
        precision=request["precision"],
        bin_residues=int(request["bin_residues"]),
        device=request["device"],
        invalid=request["invalid"],
        json=bool(request["json"]),
        also=Path(request["also"]) if request.get("also") else None,
    )
