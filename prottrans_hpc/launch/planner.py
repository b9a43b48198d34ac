"""Recipe + machine + number of nodes -> Allocation. Pure; what cannot work is refused before anything is started."""

from __future__ import annotations

from ..errors import ConfigError
from ..machine import Allocation, Machine, usable_cpu_cores
from ..recipe import Recipe


def plan(recipe: Recipe, machine: Machine, *, num_nodes: int) -> Allocation:
    """What a job asks for. Raises ConfigError that says what is possible instead."""
    if not 1 <= num_nodes <= machine.max_nodes:
        raise ConfigError(f"a job on {machine.name} has 1 to {machine.max_nodes} nodes; {num_nodes} were asked for")
    num_ranks = num_nodes * machine.ranks_per_node
    if machine.starter == "none" and num_ranks > 1:
        raise ConfigError(
            f"{machine.name} has the starter 'none', which starts one rank; {num_nodes} nodes x {machine.ranks_per_node} are {num_ranks}. "
            "Set starter to processes, mpirun or torchrun in the machine profile, or ask for one node with one rank"
        )
    if recipe.parallel.comm == "horovod" and num_ranks > 1 and machine.starter != "mpirun":
        raise ConfigError(
            f"Horovod's ranks are MPI programs, which {machine.starter!r} of {machine.name} does not start: "
            "take a machine with starter = 'mpirun' (--machine laptop_mpi on one computer), or --set parallel.comm=torch"
        )
    _check_gpus(recipe, machine)
    # Local "nodes" are groups of processes on one computer: they share its cores.
    ranks_sharing_cores = num_ranks if machine.scheduler == "local" else machine.ranks_per_node
    cores = max(1, usable_cpu_cores(machine.node) // ranks_sharing_cores)
    return Allocation(num_nodes, machine.ranks_per_node, cpu_cores_per_rank=cores, gpus_per_rank=1 if machine.node.num_gpus else 0)


def remarks(recipe: Recipe, machine: Machine, allocation: Allocation) -> list[str]:
    """What works but may surprise, one line each."""
    lines = []
    if machine.scheduler == "local" and allocation.num_ranks > usable_cpu_cores(machine.node) and not machine.node.num_gpus:
        lines.append(f"{allocation.num_ranks} ranks share {usable_cpu_cores(machine.node)} CPU cores: fine for a test, slower than fewer ranks")
    smallest = min((phase.global_batch_size for phase in recipe.phases if phase.global_batch_size), default=None)
    if smallest is not None and smallest < allocation.num_ranks:
        lines.append(f"{allocation.num_ranks} ranks share steps of {smallest} sequences: some ranks have nothing to do")
    return lines


def _check_gpus(recipe: Recipe, machine: Machine) -> None:
    node = machine.node
    if node.gpu is None:
        return
    if machine.ranks_per_node != node.num_gpus:
        raise ConfigError(
            f"{machine.name} has {node.num_gpus} GPUs and {machine.ranks_per_node} ranks a node; a rank computes on one GPU, so the numbers must be equal"
        )
    if recipe.precision not in node.gpu.peak_tflops:
        raise ConfigError(
            f"{node.gpu.name} of {machine.name} does not support {recipe.precision}, only {', '.join(node.gpu.peak_tflops)}: change precision, or the machine"
        )
