"""A machine profile from what Slurm says of the cluster at hand: TOML with comments, to be looked over by a person. Pure.

What Slurm does not know (how much memory a GPU has, how fast it is, which modules to load) is written as well as can be, and marked CHECK.
"""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .. import config
from ..errors import ConfigError
from ..machine import Machine
from .slurm_facts import NodeShape, Partition, SlurmFacts

_YEAR_MIN = 365 * 24 * 60


@dataclass(frozen=True)
class GpuFacts:
    """A kind of GPU that clusters have."""

    name: str
    memory_gib: int
    peak_tflops: str


# By a word in the type that the site gives its GPUs; the dense peaks of the makers' data sheets. Longer words first.
_GPUS = {
    "gh200": GpuFacts("NVIDIA GH200", 96, "{ fp32 = 67, tf32 = 494, bf16 = 989, fp16 = 989 }"),
    "gb200": GpuFacts("NVIDIA GB200", 186, "{ fp32 = 80, tf32 = 1250, bf16 = 2500, fp16 = 2500 }"),
    "b200": GpuFacts("NVIDIA B200", 180, "{ fp32 = 80, tf32 = 1125, bf16 = 2250, fp16 = 2250 }"),
    "h200": GpuFacts("NVIDIA H200", 141, "{ fp32 = 67, tf32 = 494, bf16 = 989, fp16 = 989 }"),
    "h100": GpuFacts("NVIDIA H100", 80, "{ fp32 = 67, tf32 = 494, bf16 = 989, fp16 = 989 }"),
    "a100": GpuFacts("NVIDIA A100", 40, "{ fp32 = 19.5, tf32 = 156, bf16 = 312, fp16 = 312 }"),
    "a40": GpuFacts("NVIDIA A40", 48, "{ fp32 = 37.4, tf32 = 74.8, bf16 = 149.7, fp16 = 149.7 }"),
    "l40": GpuFacts("NVIDIA L40S", 48, "{ fp32 = 91.6, tf32 = 183, bf16 = 362, fp16 = 362 }"),
    "v100": GpuFacts("NVIDIA V100", 16, "{ fp32 = 15.7, fp16 = 125 }"),
    "mi250": GpuFacts("AMD MI250X (one die)", 64, "{ fp32 = 47.9, bf16 = 191.5, fp16 = 191.5 }"),
    "mi300": GpuFacts("AMD MI300X", 192, "{ fp32 = 163.4, tf32 = 653.7, bf16 = 1307, fp16 = 1307 }"),
}
_UNKNOWN_GPU = GpuFacts("", 16, "{ fp32 = 10 }")
_PLACEMENT_OF = {"topology/tree": "switches", "topology/block": "segment"}


def profile(facts: SlurmFacts, *, partition: str | None, when: str) -> tuple[str, Machine]:
    """The text of a profile, and the machine that it describes. Raises ConfigError when no partition fits.

    It is of the nodes that most of the partition has; other partitions that have such nodes become its further queues.
    """
    first = _first_partition(facts, partition)
    shape, num_alike = _commonest_shape(facts, first)
    alike = {node for node, other in facts.shapes.items() if other == shape}
    queues = [first, *(other for other in facts.partitions if other is not first and set(other.nodes) <= alike)]
    name = _usable_name(facts.config.get("ClusterName", "cluster"))
    enforced = facts.config.get("AccountingStorageEnforce", "unknown")
    lines = [
        f"# {name}, as its Slurm {facts.config.get('SLURM_VERSION', '')} told on {when}. Look it over: CHECK marks what Slurm does not know.",
        f"name = {_text(name)}",
        f"description = {_text(_description(name, shape, len(alike)))}",
        'scheduler = "slurm"',
        'starter = "srun"  # or "mpirun", where Horovod\'s MPI is not one that srun starts',
        f"ranks_per_node = {_ranks_per_node(shape)}  # {'one a GPU' if shape.num_gpus else 'one a socket'}",
        f"max_nodes = {max(queue.max_nodes for queue in queues)}",
        *_rack_lines(facts, first),
        f"account_required = false  # CHECK: true where jobs must name a project; AccountingStorageEnforce is {enforced}",
        f"warning_min = 10  # minutes before the walltime; the site's KillWait of {facts.config.get('KillWait', 'some seconds')} is too short to save in",
        *_header_lines(shape),
        "# CHECK: what a job needs before Python starts; nothing is inherited from the shell that submits.",
        '# setup_lines = ["module load cuda", "source /shared/venv/bin/activate"]',
        f"sources = [{_text(f'sinfo and scontrol of {name}, {when}')}]",
        "",
        *_node_lines(shape, facts, num_alike, len(first.nodes)),
        *(line for queue in queues for line in _queue_lines(queue, facts.partitions)),
    ]
    text = "\n".join(lines) + "\n"
    return text, config.parse(Machine, tomllib.loads(text), source=f"the profile of {name}")


def _first_partition(facts: SlurmFacts, wanted: str | None) -> Partition:
    known = [partition for partition in facts.partitions if any(node in facts.shapes for node in partition.nodes)]
    for partition in known:
        if partition.name == wanted or (wanted is None and partition.is_default):
            return partition
    if wanted is None and known:
        return known[0]
    names = ", ".join(partition.name for partition in known) or "none"
    raise ConfigError(
        f"this cluster has no partition {wanted!r} with nodes that are up; it has {names}" if wanted else "this cluster has no partition with nodes"
    )


def _commonest_shape(facts: SlurmFacts, partition: Partition) -> tuple[NodeShape, int]:
    shapes = Counter(facts.shapes[node] for node in partition.nodes if node in facts.shapes)
    return shapes.most_common(1)[0]


def _ranks_per_node(shape: NodeShape) -> int:
    return shape.num_gpus or min(shape.num_sockets, shape.num_cores)


def _description(name: str, shape: NodeShape, num_nodes: int) -> str:
    gpus = f" and {shape.num_gpus} {shape.gpu or 'GPU'}" if shape.num_gpus else ""
    return f"{name}: {num_nodes:,} nodes of {shape.num_cores} cores{gpus}, Slurm"


def _rack_lines(facts: SlurmFacts, partition: Partition) -> Iterator[str]:
    """Racks, where the topology tells of at least two leaf switches or blocks of equal size."""
    members = set(partition.nodes)
    sizes = Counter(num for nodes in facts.racks.values() if (num := sum(node in members for node in nodes)))
    plugin = facts.config.get("TopologyPlugin", "topology/none")
    if sum(sizes.values()) < 2:
        yield f"# Racks: {plugin} tells of none, so a job takes nodes wherever they are."
        return
    size, num_racks = sizes.most_common(1)[0]
    others = sum(sizes.values()) - num_racks
    yield f"nodes_per_rack = {size}  # leaf switches or blocks of `scontrol show topology`{f'; {others} have another size' if others else ''}"
    yield f"num_racks = {num_racks}"
    yield f"rack_placement = {_text(_PLACEMENT_OF.get(plugin, 'node_list'))}  # {plugin}"


def _header_lines(shape: NodeShape) -> Iterator[str]:
    if shape.threads_per_core > 1:
        yield f"# Slurm counts {shape.threads_per_core} hardware threads a core as CPUs here; with this line it counts cores, as this profile does."
        yield 'header_lines = ["#SBATCH --threads-per-core=1"]'


def _node_lines(shape: NodeShape, facts: SlurmFacts, num_alike: int, num_nodes: int) -> Iterator[str]:
    if num_alike < num_nodes:
        yield f"# {num_alike} of the partition's {num_nodes} nodes are like this."
    yield "[node]"
    yield f"num_cpu_cores = {shape.num_cores}"
    if shape.num_gpus:
        yield f"num_gpus = {shape.num_gpus}"
    if shape.memory_mib >= 1024:
        yield f"host_memory_gib = {shape.memory_mib // 1024}"
    if shape.tmp_disk_mib >= 1024:
        yield f"# CHECK: {shape.tmp_disk_mib // 1024} GiB at {facts.config.get('TmpFS', '/tmp')}; if local: local_disk_path and local_disk_gib"
    yield ""
    if shape.num_gpus:
        yield from _gpu_lines(shape)


def _gpu_lines(shape: NodeShape) -> Iterator[str]:
    known = next((gpu for word, gpu in _GPUS.items() if word in shape.gpu.lower()), None)
    gpu = known or _UNKNOWN_GPU
    told = f"gpu:{shape.gpu}" if shape.gpu else "gpu"
    rest = "neither memory nor speed: these are of the usual model" if known else "no more: put in what is true"
    yield f"# CHECK: Slurm calls them {told}, and knows {rest}."
    yield "[node.gpu]"
    yield f"name = {_text(gpu.name or shape.gpu or 'GPU')}"
    yield f"memory_gib = {gpu.memory_gib}"
    yield f"peak_tflops = {gpu.peak_tflops}  # dense; a precision that is missing is not supported"
    yield ""


def _queue_lines(queue: Partition, partitions: Sequence[Partition]) -> Iterator[str]:
    rivals = [other for other in partitions if other.priority_tier > queue.priority_tier and set(other.nodes) & set(queue.nodes)]
    preemptable = bool(rivals) and queue.preempt_mode not in ("OFF", "GANG")
    limit = queue.max_time_min or _YEAR_MIN
    yield "[[queues]]"
    yield f"name = {_text(queue.name)}"
    if preemptable:
        yield f"preemptable = true  # by {', '.join(other.name for other in rivals)}; {queue.preempt_mode}, {queue.grace_s} s of grace"
    yield "[[queues.bins]]"
    yield f"min_nodes = {min(queue.min_nodes, queue.max_nodes)}"
    yield f"max_nodes = {queue.max_nodes}"
    yield f"max_walltime_min = {max(1, limit)}{'' if queue.max_time_min else '  # UNLIMITED, says Slurm; a year here'}"
    yield ""


def _usable_name(name: str) -> str:
    kept = "".join(letter if letter.isalnum() and letter.isascii() else "_" for letter in name).lstrip("_")[:64]
    return kept or "cluster"


def _text(value: str) -> str:
    """A TOML string."""
    return json.dumps(value)
