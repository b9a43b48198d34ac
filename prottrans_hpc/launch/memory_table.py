"""The policies side by side: what each needs on a rank, whether that fits, what it costs in time; as text and as JSON. Pure, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .. import architecture
from ..errors import ConfigError
from ..machine import Machine
from ..parallel_layout import ParallelLayout
from ..precision_levels import LEVELS
from ..recipe import Recipe
from .batch_arithmetic import PhaseBatch, plan_batches
from .memory_cut import smallest_cut
from .memory_fit import memory_need as need_on
from .memory_fit import planned_tokens, sequence_lengths
from .memory_need import MemoryNeed, Rank, need_of
from .memory_policies import POLICIES, Policy
from .memory_room import GIB, MARGIN, host_memory_gib, memory_gib, room_on
from .memory_time import MicroBatch, speed_of, time_factor
from .recomputation import Tokens
from .sharding_fit import check_sharding

OWN = "as in the recipe"
"""The name of the recipe's own section of memory, where it is none of the policies."""


@dataclass(frozen=True)
class Row:
    """One policy."""

    name: str
    policy: Policy
    need: MemoryNeed
    factor: float
    """Its step's time over that of the step with nothing given up."""
    fits: bool | None
    """None: nobody knows how much memory there is."""
    measured: Mapping[str, Any] | None = None
    """What `profile.memory_stage` found; the need is then that of the same micro batch."""

    @property
    def measured_peak(self) -> int | None:
        """Bytes."""
        return None if self.measured is None else int(self.measured["peak"])


def policies_of(recipe: Recipe) -> dict[str, Policy]:
    """Those that are compared, and the recipe's own."""
    found = dict(POLICIES)
    if all(policy.memory != recipe.memory for policy in found.values()):
        found[OWN] = Policy(recipe.memory, "the recipe's own section")
    return found


def planned_rows(recipe: Recipe, machine: Machine, *, num_ranks: int) -> list[Row]:
    """Every policy for the fullest micro batch of a rank."""
    record = architecture.get(recipe.architecture.name)
    shape = record.size(recipe.architecture.size).shape
    layout = check_sharding(recipe, machine, record, shape, num_ranks=num_ranks)
    batches = plan_batches(recipe, num_ranks=layout.num_data_ranks)
    longest = max(batches, key=lambda batch: batch.fullest_micro_batch(recipe.phases[batch.phase].max_residues))
    micro = MicroBatch(_tokens(recipe, longest), longest.num_micro_batches)
    rows = []
    for name, policy in policies_of(recipe).items():
        own = policy.of(recipe)
        need = need_on(own, record, shape, batches, on_gpu=machine.node.gpu is not None, layout=layout)
        speed = speed_of(machine.node.gpu, own.precision)
        rows.append(Row(name, policy, need, time_factor(own, record, shape, micro, need, speed), _fits(need, machine, num_ranks)))
    return rows


def _tokens(recipe: Recipe, batch: PhaseBatch) -> Tokens:
    limit = recipe.phases[batch.phase].max_residues
    record = architecture.get(recipe.architecture.name)
    return planned_tokens(recipe, sequence_lengths(record, batch.fullest_micro_batch(limit), limit))


def measured_rows(recipe: Recipe, machine: Machine, found: Mapping[str, Mapping[str, Any] | None]) -> list[Row]:
    """Every policy for the micro batch that was measured, on the one rank that did it."""
    record = architecture.get(recipe.architecture.name)
    shape = record.size(recipe.architecture.size).shape
    rows = []
    for name, policy in policies_of(recipe).items():
        measured = found.get(name)
        if measured is None:
            continue
        own, tokens = policy.of(recipe), Tokens(measured["lengths"], measured["num_decoder"])
        on_gpu = measured["device"] == "cuda"
        need = need_of(own, record, shape, [tokens], Rank(on_gpu, ParallelLayout(1)))
        # One step saves no checkpoint; lanes are those of this micro batch.
        values = asdict(need) | {"checkpoint": 0, "lanes": int(measured["lanes"])}
        speed = speed_of(machine.node.gpu if on_gpu else None, own.precision)
        factor = time_factor(own, record, shape, MicroBatch(tokens), need, speed)
        rows.append(Row(name, policy, MemoryNeed(**values), factor, _fits(MemoryNeed(**values), machine, 1), measured))
    return rows


def _fits(need: MemoryNeed, machine: Machine, num_ranks: int) -> bool | None:
    room = room_on(machine, num_ranks)
    return None if room is None else room.holds(need)


def chosen(rows: list[Row]) -> Row | None:
    """The one that fits at the least predicted time, and of those the one that keeps most as it is; None where none does, or nobody knows."""
    return min((row for row in rows if row.fits), key=lambda row: row.factor, default=None)


def describe(rows: list[Row]) -> Iterator[str]:
    """A header and a line a policy."""
    unit, name = _unit(max(row.need.peak for row in rows))
    has_measured = any(row.measured for row in rows)
    width = max(len(row.name) for row in rows)
    measured = f" {'measured':>9} {'error':>6} {'time':>6}" if has_measured else ""
    yield f"{name + ' a rank':<{width}} {'weights':>8} {'grads':>8} {'optim.':>8} {'layers':>8} {'host':>8} {'peak':>8} {'fits':>5} {'time':>6}{measured}"
    plain_s = next((row.measured["step_s"] for row in rows if row.measured and row.name == "none"), None)
    for row in rows:
        need = row.need
        parts = (need.parameters + need.masters + need.cast_weights + need.gathered, need.gradients, need.optimizer, need.activations)
        numbers = " ".join(f"{part / unit:>8.2f}" for part in (*parts, need.on_host + need.moved, need.peak))
        fits = {None: "?", True: "yes", False: "no"}[row.fits]
        yield f"{row.name:<{width}} {numbers} {fits:>5} {row.factor:>5.2f}x{_measured_text(row, unit, plain_s) if has_measured else ''}"


def _measured_text(row: Row, unit: int, plain_s: float | None) -> str:
    if row.measured is None or row.measured_peak is None:
        return ""
    error = row.need.peak / row.measured_peak - 1.0
    took = f"{row.measured['step_s'] / plain_s:>5.2f}x" if plain_s else ""
    return f" {row.measured_peak / unit:>9.2f} {100 * error:>+5.1f}% {took}"


def _unit(most: int) -> tuple[int, str]:
    return (GIB, "GiB") if most >= GIB else (2**20, "MiB")


def verdict(rows: list[Row], recipe: Recipe, machine: Machine, num_ranks: int) -> str:
    """Which policy to take, in words."""
    room, there = room_on(machine, num_ranks), memory_gib(machine, num_ranks)
    if room is None:
        return f"the profile {machine.name} does not say how much memory there is: give --machine to see what fits"
    best = chosen(rows)
    place = f"{there:g} GiB of {machine.name}, of which {100 * MARGIN:.0f} % are kept free"
    if best is None:
        least = min(rows, key=lambda row: row.need.peak)
        on_host = "" if room.holds_on_host(least.need) else f", and {least.need.in_host / GIB:.2f} GiB of the host's memory"
        return (
            f"nothing fits the {place}{_host_place(machine, num_ranks)}: {least.name!r} needs {least.need.peak / GIB:.2f} GiB{on_host}. "
            f"{_cut_text(recipe, machine, num_ranks)} smaller micro batches (--set loading.bin_residues=N), or a smaller model"
        )
    if best.need.in_host:
        place += _host_place(machine, num_ranks)
    if best.policy.memory == recipe.memory:
        return f"fits the {place}, as the recipe has it"
    asked = " ".join(f"--set {setting}" for setting in best.policy.settings) or "leave [memory] out"
    return f"fits the {place}, at the least predicted time: {best.name!r} ({asked})"


def _host_place(machine: Machine, num_ranks: int) -> str:
    """The other memory that has to have room."""
    there = host_memory_gib(machine, num_ranks)
    if machine.node.gpu is None:
        return ""
    return (
        f", and {there:,.1f} GiB a rank of the host's, of which as much" if there else ", and the host's, of which the profile does not say how much there is"
    )


def _cut_text(recipe: Recipe, machine: Machine, num_ranks: int) -> str:
    """The smallest cut that fits, for people, and how other advice goes on from there."""
    found = smallest_cut(recipe, machine, num_ranks)
    if found is None:
        return "Take"
    asked = " ".join(f"--set {setting}" for setting in found.settings)
    return f"Cut over {found.num_ranks:,} ranks a copy it fits, with {found.peak / GIB:.2f} GiB a rank ({asked}); no smaller cut does. Or take"


def to_json(rows: list[Row], recipe: Recipe, machine: Machine, num_ranks: int) -> dict[str, Any]:
    """Everything, bytes as they are."""
    if not rows:
        raise ConfigError("no policy was measured")
    best, record = chosen(rows), architecture.get(recipe.architecture.name)
    return {
        "machine": machine.name,
        "memory_gib": memory_gib(machine, num_ranks),
        "host_memory_gib": host_memory_gib(machine, num_ranks),
        "speed": speed_of(machine.node.gpu, recipe.precision).source,
        "num_ranks": num_ranks,
        "parameters": record.num_parameters(record.size(recipe.architecture.size).shape),
        "precision": recipe.precision,
        "half_weights": LEVELS[recipe.precision].weight_bytes == 2,
        "chosen": best.name if best else None,
        "cut": _cut_json(recipe, machine, num_ranks) if best is None else None,
        "policies": [
            {
                "name": row.name,
                "says": row.policy.says,
                "settings": list(row.policy.settings),
                "need": asdict(row.need) | {"peak": row.need.peak},
                "time_factor": row.factor,
                "fits": row.fits,
                "measured": dict(row.measured) if row.measured else None,
            }
            for row in rows
        ],
    }


def _cut_json(recipe: Recipe, machine: Machine, num_ranks: int) -> dict[str, Any] | None:
    found = smallest_cut(recipe, machine, num_ranks)
    return {"settings": list(found.settings), "num_ranks": found.num_ranks, "peak": found.peak} if found else None
