"""From the runs of a study to scaling.json: what their own records say, warm-up and last step left out."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .. import architecture, durable, json_lines
from ..errors import CheckpointError
from ..precision_levels import LEVELS
from ..run_dir import Run, RunDir, read_run
from ..scaling_study import Study, StudyDir, StudyPoint
from .model_facts import model_facts
from .scaling import PARTS, Ledger, NodeShare, Point, Scaling, Sharing

Record = Mapping[str, Any]
_HALF_BYTES = 2
"""Of a gradient that is sent in fp16 or bf16."""


def collect(folder: StudyDir, study: Study) -> Scaling:
    """The study as far as it is measured. Raises CheckpointError when nothing is, or nothing at its smallest size."""
    found = [(point, run) for point in study.points() if (run := folder.measured(study, point)) is not None]
    if not found:
        raise CheckpointError(f"no point of {folder.path} has taken its {study.num_steps} steps yet: prottrans scale runs them")
    runs = {run: read_run(run) for _, run in found}
    found.sort(key=lambda pair: (runs[pair[1]].created, pair[1].path.name))
    points = tuple(_point(study, point, run, runs[run], order=number, folder=folder) for number, (point, run) in enumerate(found, start=1))
    first_dir = found[0][1]
    first = runs[first_dir]
    record = architecture.get(first.recipe.architecture.name)
    parameters = record.num_parameters(record.size(first.recipe.architecture.size).shape)
    largest = max(points, key=lambda point: point.nodes)
    environment = durable.read_json(folder.path / largest.run_dir / first_dir.environment_json.name)
    residues = [total / point.nodes for point in points for total in point.residues]
    return Scaling(
        recipe=study.recipe_name,
        machine=first.machine.name,
        mode=study.mode,
        comm=first.recipe.parallel.comm,
        precision=first.recipe.precision,
        parameters=parameters,
        gradient_bytes=parameters * LEVELS[first.recipe.precision].weight_bytes,
        bucket_mib=first.recipe.parallel.bucket_mib,
        ranks_per_node=first.allocation.ranks_per_node,
        residues_per_node_step=statistics.mean(residues) if study.mode == "weak" else None,
        peak_tflops_rank=_peak_tflops(first),
        hardware=_hardware(environment, largest.ranks, is_local=first.machine.scheduler == "local"),
        versions={str(name): str(version) for name, version in environment["versions"].items()},
        points=points,
        sharing=_sharing(first, gradient_bytes=parameters * LEVELS[first.recipe.precision].weight_bytes),
    )


def _sharing(run: Run, *, gradient_bytes: int) -> Sharing:
    parallel, chosen = run.recipe.parallel, architecture.get(run.recipe.architecture.name)
    facts = model_facts(chosen, chosen.size(run.recipe.architecture.size).shape, parallel)
    level = LEVELS[run.recipe.precision]
    sent = {"none": None, "powersgd": facts.factor_numbers * level.weight_bytes}
    # Local "nodes" are one computer: a copy of a hybrid is then cut over all of them.
    default = None if run.machine.scheduler == "local" else max(1, run.allocation.ranks_per_node // parallel.tensor_ranks)
    return Sharing(
        reduction=parallel.reduction,
        compression=parallel.compression,
        sharding=parallel.sharding,
        shard_ranks={"none": 1, "full": None, "hybrid": parallel.shard_ranks or default}[parallel.sharding],
        tensor_ranks=parallel.tensor_ranks,
        units=facts.units,
        sent_bytes=sent.get(parallel.compression, min(gradient_bytes, _HALF_BYTES * gradient_bytes // level.weight_bytes)),
    )


def _hardware(environment: Record, num_ranks: int, *, is_local: bool) -> dict[str, Any]:
    """What the largest point ran on."""
    hardware = {key: environment[key] for key in ("devices", "cpu", "operating_system", "cuda", "starter") if environment.get(key) is not None}
    cores = environment["cpu"]["usable_cores"]
    shares = is_local and num_ranks > cores and environment.get("cuda") is None
    return hardware | (shared(num_ranks, cores) if shares else {})


def shared(num_ranks: int, cores: int) -> dict[str, Any]:
    """What the hardware of a study says where its "nodes" are one computer with fewer cores than ranks."""
    return {"note": f"{num_ranks} ranks shared {cores} cores of one computer: the overhead holds that", "shared_cores": cores}


def _peak_tflops(run: Run) -> float | None:
    gpu = run.machine.node.gpu
    return None if gpu is None else gpu.peak_tflops.get(LEVELS[run.recipe.precision].products)


def _point(study: Study, point: StudyPoint, directory: RunDir, run: Run, *, order: int, folder: StudyDir) -> Point:
    measured = range(study.warmup + 1, study.warmup + study.steps + 1)
    records = [record for record in json_lines.read(directory.metrics) if record["step"] in measured]
    peak = _peak_tflops(run)
    counted = peak is not None and all(record.get("mfu") for record in records)
    flops_per_s = (peak or 0.0) * 1e12 * run.allocation.num_ranks
    nodes = _nodes(directory, measured)
    return Point(
        nodes=point.nodes,
        ranks=run.allocation.num_ranks,
        repetition=point.repetition,
        order=order,
        steps=study.steps,
        step_s=tuple(float(record["step_s"]) for record in records),
        residues=tuple(int(record["num_residues"]) for record in records),
        tokens=tuple(int(record["num_tokens"]) for record in records),
        flops=tuple(record["mfu"] * record["step_s"] * flops_per_s for record in records) if counted else None,
        ledger=Ledger(**{name: tuple(float(record["ledger"][name]) for record in records) for name in PARTS}),
        skew_s=_skew(list(nodes.values()), study.steps),
        per_node=tuple(_share(node, lines) for node, lines in nodes.items()),
        run_dir=str(directory.path.relative_to(folder.path)),
        reduction_s=_reduction(list(nodes.values())),
    )


def _nodes(directory: RunDir, measured: range) -> dict[int, list[Record]]:
    """The lines of each node that has one for every measured step; a full disk may have ended a file."""
    found: dict[int, list[Record]] = {}
    for path in sorted(directory.timings.glob("node-*.jsonl")):
        lines: list[Record] = [line for line in json_lines.read(path) if line["step"] in measured]
        if len(lines) == len(measured):
            found[int(path.stem.removeprefix("node-"))] = lines
    return found


def _skew(nodes: Sequence[Sequence[Record]], steps: int) -> tuple[float, ...]:
    if not nodes:
        return (0.0,) * steps
    return tuple(max(times) - statistics.median(times) for times in ([line["compute_s"] for line in lines] for lines in zip(*nodes, strict=True)))


def _reduction(nodes: Sequence[Sequence[Record]]) -> tuple[float, ...] | None:
    """None where a node's file lacks it, or there is none."""
    steps = [[line.get("least_exposed_comm_s") for line in lines] for lines in zip(*nodes, strict=True)]
    if not steps or any(wait is None for waits in steps for wait in waits):
        return None
    return tuple(min(waits) for waits in steps)


def _share(node: int, lines: Sequence[Record]) -> NodeShare:
    return NodeShare(node, str(lines[-1]["host"]), statistics.median(line["compute_s"] for line in lines))
