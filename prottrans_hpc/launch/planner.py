"""Recipe + machine + size -> Allocation. Pure; what cannot work is refused before anything is queued.

`allocate` knows the machine alone (farms use it); `plan` adds what the recipe asks of it.
"""

from __future__ import annotations

from typing import Any

from .. import architecture, config
from ..errors import ConfigError
from ..machine import Allocation, Machine, usable_cpu_cores
from ..precision_levels import LEVELS
from ..recipe import Recipe
from . import queues
from .batch_arithmetic import check_lanes, plan_batches
from .demand import Demand
from .memory_fit import check_memory
from .racks import count_nodes
from .sharding_fit import check_sharding

_MPI_STARTERS = ("mpirun", "srun", "jsrun")
"""Starters whose ranks are MPI programs, as Horovod's are."""


def plan(recipe: Recipe, machine: Machine, demand: Demand | None = None, *, num_nodes: int | None = None, mean_residues: float | None = None) -> Allocation:
    """What a training job asks for; `num_nodes` is short for a Demand of so many. Raises ConfigError that says what is possible instead.

    `mean_residues` is the mean length in the corpus, if it is known: the memory of a micro batch depends on it.
    """
    allocation = allocate(machine, demand or Demand(num_nodes=num_nodes))
    _check_starter(recipe, machine, allocation)
    _check_licences(recipe, machine, allocation)
    _check_gpus(recipe, machine)
    chosen = architecture.get(recipe.architecture.name)
    shape: Any = chosen.size(recipe.architecture.size).shape
    check_sharding(recipe, machine, chosen, shape, num_ranks=allocation.num_ranks)
    check_lanes(chosen, recipe, machine, num_nodes=allocation.num_nodes)
    check_memory(recipe, machine, chosen, shape, plan_batches(recipe, num_ranks=allocation.num_ranks, mean_residues=mean_residues))
    return allocation


def allocate(machine: Machine, demand: Demand) -> Allocation:
    """Nodes, racks, queue and walltime of any job. Raises ConfigError that says what is possible instead."""
    if machine.scheduler == "local":
        _check_local(machine, demand)
    num_nodes, num_racks = count_nodes(machine, demand)
    slot = None if machine.scheduler == "local" else queues.choose(machine, num_nodes, demand)
    # Local "nodes" are groups of processes on one computer: they share its cores.
    ranks_sharing_cores = num_nodes * machine.ranks_per_node if machine.scheduler == "local" else machine.ranks_per_node
    return Allocation(
        num_nodes,
        machine.ranks_per_node,
        cpu_cores_per_rank=max(1, usable_cpu_cores(machine.node) // ranks_sharing_cores),
        gpus_per_rank=1 if machine.node.num_gpus else 0,
        walltime_min=slot.walltime_min if slot else None,
        queue=slot.queue.name if slot else None,
        num_racks=num_racks,
    )


def check_account(machine: Machine, account: str | None) -> None:
    """Raises ConfigError when the machine wants a project to charge and none is given, or the other way round, or it is no name."""
    if machine.account_required and not account:
        raise ConfigError(f"{machine.name} charges a project for every job: give it with --account PROJECT")
    if machine.scheduler == "local" and account:
        raise ConfigError(f"--account is for batch systems; {machine.name} has none")
    if account:
        config.check_name(account, what="the account")


def remarks(recipe: Recipe, machine: Machine, allocation: Allocation) -> list[str]:
    """What works but may surprise, one line each."""
    lines = []
    if machine.scheduler == "local" and allocation.num_ranks > usable_cpu_cores(machine.node) and not machine.node.num_gpus:
        lines.append(f"{allocation.num_ranks} ranks share {usable_cpu_cores(machine.node)} CPU cores: fine for a test, slower than fewer ranks")
    smallest = min((phase.global_batch_size for phase in recipe.phases if phase.global_batch_size), default=None)
    if smallest is not None and smallest < allocation.num_ranks // recipe.parallel.tensor_ranks:
        lines.append(f"{allocation.num_ranks} ranks share steps of {smallest} sequences: some ranks have nothing to do")
    if machine.retired:
        lines.append(f"{machine.name} exists no more; its profile is kept to reproduce what ran there")
    if recipe.parallel.comm == "horovod" and machine.starter == "srun":
        lines.append("Horovod under srun needs a Slurm whose MpiDefault fits the MPI (pmix); where it does not, set starter = 'mpirun' in the machine profile")
    queue = machine.queue(allocation.queue) if allocation.queue else None
    if queue is not None and queue.preemptable:
        lines.append(f"jobs of the queue {queue.name} may be stopped and requeued after {queue.preemptable_after_min} minutes; the run resumes by itself")
    return lines


def _check_local(machine: Machine, demand: Demand) -> None:
    given = [name for name, value in (("--walltime", demand.walltime_min), ("--queue", demand.queue)) if value is not None]
    if given:
        raise ConfigError(f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} for batch systems; {machine.name} has none")


def _check_starter(recipe: Recipe, machine: Machine, allocation: Allocation) -> None:
    num_nodes, num_ranks = allocation.num_nodes, allocation.num_ranks
    if machine.starter == "none" and num_ranks > 1:
        raise ConfigError(
            f"{machine.name} has the starter 'none', which starts one rank; {num_nodes} nodes x {machine.ranks_per_node} are {num_ranks}. "
            "Set starter to processes, mpirun or torchrun in the machine profile, or ask for one node with one rank"
        )
    if machine.starter == "torchrun" and machine.scheduler != "local" and num_nodes > 1:
        raise ConfigError(
            f"{machine.name} has the starter 'torchrun', which starts the ranks of one node only; {num_nodes} were asked for. "
            "Set starter to srun or mpirun in the machine profile"
        )
    if recipe.parallel.comm == "horovod" and num_ranks > 1 and machine.starter not in _MPI_STARTERS:
        raise ConfigError(
            f"Horovod's ranks are MPI programs, which {machine.starter!r} of {machine.name} does not start: "
            "take a machine with starter = 'mpirun' (--machine laptop_mpi on one computer), or --set parallel.comm=torch"
        )


def _check_licences(recipe: Recipe, machine: Machine, allocation: Allocation) -> None:
    for licence in machine.licences:
        if licence.comm == recipe.parallel.comm and allocation.num_nodes > licence.max_nodes:
            racks = f" ({licence.max_nodes // machine.nodes_per_rack} racks)" if machine.nodes_per_rack else ""
            raise ConfigError(
                f"parallel.comm = {licence.comm!r} uses {licence.name} on {machine.name}, whose licence ends at {licence.max_nodes} nodes{racks}; "
                f"{allocation.num_nodes} were asked for. Take at most {licence.max_nodes} nodes, or another comm (--set parallel.comm=torch)"
            )


def _check_gpus(recipe: Recipe, machine: Machine) -> None:
    node = machine.node
    if node.gpu is None:
        return
    if machine.ranks_per_node != node.num_gpus:
        raise ConfigError(
            f"{machine.name} has {node.num_gpus} GPUs and {machine.ranks_per_node} ranks a node; a rank computes on one GPU, so the numbers must be equal"
        )
    if LEVELS[recipe.precision].products not in node.gpu.peak_tflops:
        raise ConfigError(
            f"{node.gpu.name} of {machine.name} does not support {recipe.precision}, only {', '.join(node.gpu.peak_tflops)}: change precision, or the machine"
        )
