"""scaling.json: what a scaling study measured. The noun and its file; how it is measured, judged and shown lies beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from .. import config, durable
from ..config import STRICT, Count, Natural, NonNegative, Positive
from ..errors import CheckpointError, ConfigError, DataError

FORMAT = 1


@dataclass(frozen=True, config=STRICT)
class NodeShare:
    """What one node took of a point."""

    node: Natural
    """Its number in the gang, from 0."""
    host: str
    compute_s: NonNegative
    """Median over the measured steps of forward, backward and update, mean over the node's ranks, seconds."""


@dataclass(frozen=True, config=STRICT)
class Ledger:
    """Where the time of each measured step went: seconds, mean over the ranks, one number a step. The parts sum to the step."""

    data_wait_s: tuple[float, ...]
    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    exposed_comm_s: tuple[float, ...]
    """Waiting for gradients and for the status of the step, so far as no backward pass hides it. Waiting for a slower rank is in here, too."""
    optimizer_s: tuple[float, ...]
    checkpoint_s: tuple[float, ...]
    other_s: tuple[float, ...]


PARTS = tuple(Ledger.__annotations__)


@dataclass(frozen=True, config=STRICT)
class Point:
    """One run of the study: so many nodes, once."""

    nodes: Count
    ranks: Count
    repetition: Count
    """From 1."""
    order: Count
    """As which of all points it ran; the order is drawn."""
    steps: Count
    """That were measured; the warm-up is left out of all lists."""
    step_s: tuple[Positive, ...]
    residues: tuple[Natural, ...]
    """Of the whole step, over all ranks."""
    tokens: tuple[Natural, ...]
    """Special tokens included."""
    flops: tuple[Positive, ...] | None
    """None where the hardware's peak is unknown: nobody counts them then."""
    ledger: Ledger
    skew_s: tuple[float, ...]
    """The slowest node's compute time less the median node's."""
    per_node: tuple[NodeShare, ...]
    run_dir: str
    reduction_s: tuple[NonNegative, ...] | None = None
    """The least exposed communication of any rank: that of the rank that came last, which waits for nobody, so for the reduction
    alone. None in older studies."""

    def __post_init__(self) -> None:
        lists = [self.step_s, self.residues, self.tokens, self.skew_s, *vars(self.ledger).values()]
        lists += [values for values in (self.flops, self.reduction_s) if values is not None]
        if any(len(values) != self.steps for values in lists):
            raise ValueError(f"every list of a point of {self.steps} steps must have so many numbers")


@dataclass(frozen=True, config=STRICT)
class Sharing:
    """What ranks send one another, as far as it is not gradients in buckets."""

    reduction: str = "flat"
    """As in the recipe, and so are the next two."""
    compression: str = "none"
    sharding: str = "none"
    shard_ranks: Count | None = None
    """Tensor groups that a copy is cut over; None: all, or none is cut."""
    tensor_ranks: Count = 1
    units: Count | None = None
    """Parts that a cut model brings together by themselves; None in older studies, in which none was cut."""
    sent_bytes: Count | None = None
    """That a rank sends for its gradients; None: as many as they have."""

    @property
    def is_cut(self) -> bool:
        """Whether ranks hold parts of the model."""
        return self.sharding != "none" or self.tensor_ranks > 1


@dataclass(frozen=True, config=STRICT)
class Scaling:
    """A scaling study."""

    recipe: str
    machine: str
    mode: Literal["weak", "strong"]
    """Whether the global batch grows with the nodes, or stays."""
    comm: str
    precision: str
    parameters: Count
    gradient_bytes: Count
    """That a rank's gradients have."""
    bucket_mib: Count
    ranks_per_node: Count
    residues_per_node_step: Positive | None
    """Mean over the points; None in a strong study, where it shrinks with the nodes."""
    peak_tflops_rank: Positive | None
    """Of the hardware that a rank computes on, in the study's precision; None where the machine profile does not say."""
    hardware: dict[str, Any]
    versions: dict[str, str]
    points: tuple[Point, ...]
    sharing: Sharing = Sharing()

    @property
    def node_counts(self) -> tuple[int, ...]:
        """The measured sizes, ascending."""
        return tuple(sorted({point.nodes for point in self.points}))

    def turns(self, nodes: int) -> float:
        """Ranks of so many nodes for each core that they share, where all nodes are one computer; 1 where every rank has cores of its own."""
        cores = self.hardware.get("shared_cores")
        return max(1.0, nodes * self.ranks_per_node / cores) if cores else 1.0

    def at(self, nodes: int) -> tuple[Point, ...]:
        """The repetitions at one size."""
        return tuple(point for point in self.points if point.nodes == nodes)


def write_scaling(path: Path, scaling: Scaling) -> None:
    """Write scaling.json durably; of an older study, which did not say what was sent, as it was."""
    values = config.to_json(scaling)
    if scaling.sharing == Sharing():
        del values["sharing"]
    durable.write_json(path, {"format": FORMAT, **values})


def read_scaling(path: Path) -> Scaling:
    """Read scaling.json, or that of a folder. Raises CheckpointError when there is none, DataError when it is no study."""
    file = path / "scaling.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{file} is not there: make it with prottrans scale RECIPE --corpus C --nodes 1,2,4 --out {path}")
    values = durable.read_json(file)
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        raise DataError(f"{file} is no scaling study of format {FORMAT}")
    try:
        return config.parse(Scaling, {key: value for key, value in values.items() if key != "format"}, source=str(file))
    except ConfigError as error:
        raise DataError(f"{error}. The file is damaged, or another version wrote it") from error
