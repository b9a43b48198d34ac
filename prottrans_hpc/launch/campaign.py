"""A preprocessing campaign: what a recipe `jobs/preprocess_*.toml` says about a corpus, and what making it comes to.

Which bytes a corpus has follows from its format; how long it takes follows from a measured rate. Nothing is read here
but the recipe.
"""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from .. import config
from ..config import STRICT, Count, Natural, Positive
from ..errors import ConfigError
from ..machine import Machine, usable_cpu_cores

MB_PER_CPU_S = 193.0
"""Megabytes of FASTA that a worker turns into shards in a CPU-second, SHA-256 of input and output included: benchmarks/results/preprocess.md."""
ASSUMED_GB_PER_S = 1.0
"""What a file system is taken to read and write in all, where the disk is what limits."""
_OFFSET = 8
_LINE = 60
"""Residues of a line of FASTA, as UniProt writes it."""


@dataclass(frozen=True, config=STRICT)
class Expected:
    """The data that the campaign is for."""

    source: str
    """Where it comes from and which release; kept in the index of the corpus."""
    sequences: Count
    residues: Count
    header_bytes: Count
    """Mean length of a record's first line, with ">" and line break; assumed, for the size of the input alone."""
    name_bytes: Natural
    """Mean length of a name: the first word of that line."""
    residues_are_assumed: bool = False
    """Nobody published how many there are."""


@dataclass(frozen=True, config=STRICT)
class Rules:
    """What `prottrans preprocess` is told; its options overrule these."""

    shards: Count
    """Training shards; 128 MiB are good to stream and to deal out."""
    validation: float
    """Share of the sequences that is held out."""
    dedup: bool = False
    invalid: Literal["error", "x", "skip"] = "error"
    keep_rare: bool = False
    """Keep B, O, U and Z instead of writing X, as the papers did."""
    names: bool = True
    """Store the names of the records."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.validation <= 0.5:
            raise ValueError(f"validation must be from 0 to 0.5, not {self.validation}")


@dataclass(frozen=True, config=STRICT)
class Published:
    """What the papers say about the same data, for comparison."""

    text_gb: tuple[Positive, ...] = ()
    """Size of the text; more than one where they are not of one mind."""
    records_tb: Positive | None = None
    """Size of the tokenised records."""
    record_files: Count | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, config=STRICT)
class Campaign:
    """A recipe for a corpus."""

    description: str
    expected: Expected
    rules: Rules
    published: Published = field(default_factory=Published)

    @property
    def input_bytes(self) -> int:
        """Of the FASTA, uncompressed."""
        data = self.expected
        return data.residues + math.ceil(data.residues / _LINE) + data.sequences * data.header_bytes

    @property
    def corpus_bytes(self) -> int:
        """Of all shards: a byte a residue, an offset a sequence, and with names their bytes and an offset each."""
        data = self.expected
        return data.residues + data.sequences * (_OFFSET + (data.name_bytes + _OFFSET if self.rules.names else 0))

    @property
    def cpu_hours(self) -> float:
        """Of all workers together."""
        return self.input_bytes / (MB_PER_CPU_S * 1e6) / 3600.0

    @property
    def disk_hours(self) -> float:
        """For reading the input, and writing and reading again what is first written in pieces."""
        return (self.input_bytes + 3 * self.corpus_bytes) / (ASSUMED_GB_PER_S * 1e9) / 3600.0


def is_campaign(name_or_path: str) -> bool:
    """Whether a recipe is one for a corpus, not for a training. Raises ConfigError when there is none of this name."""
    values = config.read_toml(config.find_file("jobs", name_or_path))
    return "expected" in values and "phases" not in values


def read_campaign(name_or_path: str, settings: tuple[str, ...] = ()) -> Campaign:
    """Read a campaign by name or path with ``--set`` applied. Raises ConfigError."""
    path = config.find_file("jobs", name_or_path)
    values = config.read_toml(path)
    if "phases" in values:
        raise ConfigError(f"{name_or_path} is a recipe for training, not for a corpus: use it with prottrans pretrain")
    return config.parse(Campaign, config.with_settings(values, settings), source=str(path))


@dataclass(frozen=True)
class Outlook:
    """A campaign on so many nodes of a machine."""

    campaign: Campaign
    machine: str
    num_nodes: int
    cores_per_node: int

    @property
    def work_hours(self) -> float:
        """Until the workers are done, if the file system keeps up."""
        return self.campaign.cpu_hours / (self.num_nodes * self.cores_per_node)

    @property
    def hours(self) -> float:
        """Until workers and file system are done, whichever is later."""
        return max(self.work_hours, self.campaign.disk_hours)

    @property
    def node_hours(self) -> float:
        """Nodes times hours."""
        return self.num_nodes * self.hours


def look_ahead(campaign: Campaign, machine: Machine, num_nodes: int) -> Outlook:
    """What a campaign comes to. Raises ConfigError when the machine has not so many nodes."""
    if num_nodes > machine.max_nodes:
        raise ConfigError(f"{machine.name} gives a job at most {machine.max_nodes} nodes, not {num_nodes}")
    return Outlook(campaign, machine.name, num_nodes, usable_cpu_cores(machine.node))


def to_json(outlook: Outlook, *, recipe_name: str) -> dict[str, Any]:
    """The outlook as plain values."""
    campaign = outlook.campaign
    return {
        "recipe": recipe_name,
        "machine": outlook.machine,
        "num_nodes": outlook.num_nodes,
        "campaign": config.to_json(campaign),
        "input_bytes": campaign.input_bytes,
        "corpus_bytes": campaign.corpus_bytes,
        "bytes_per_residue": campaign.corpus_bytes / campaign.expected.residues,
        "shards": campaign.rules.shards,
        "cpu_hours": campaign.cpu_hours,
        "work_hours": outlook.work_hours,
        "disk_hours": campaign.disk_hours,
        "node_hours": outlook.node_hours,
        "assumptions": {"mb_per_cpu_s": MB_PER_CPU_S, "file_system_gb_per_s": ASSUMED_GB_PER_S},
    }
