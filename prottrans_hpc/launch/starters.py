"""What starts the ranks of a job, as shell words; independent of the scheduler, and pure.

`STARTERS` says how each program is called, and as which signal it must be told to stop so that the ranks hear of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .job import Job
from .tether import CODE_FILE_PREFIX


@dataclass(frozen=True)
class Starter:
    """A program that starts the ranks of a job."""

    argv: Callable[[Job], list[str]]
    signals: Mapping[str, str]
    """Signal that the script gets -> signal that the starter is sent, so that all ranks are asked to stop."""
    setup: tuple[str, ...] = ()
    """Shell lines that the starter needs."""
    is_ours: bool = False
    """Ours ends with the script; others are tethered to it where no batch system does it."""
    hides_codes: bool = False
    """It ends, or may end, with a code of its own when a rank fails; the rank leaves its own in the run directory."""
    asks_by_file: bool = False
    """What it does with signals is not known: none reaches it, and a file that rank 0 looks for asks the ranks to stop."""


def _processes(job: Job) -> list[str]:
    places = ["--nodes", str(job.allocation.num_nodes), "--ranks-per-node", str(job.allocation.ranks_per_node), "--run-dir", str(job.run_dir.path)]
    # The ranks take signals as soon as Python runs in them; what comes earlier waits.
    return [*job.module("local_ranks"), *places, "--hold-stop-signals", "--", *job.command]


def _mpirun(job: Job) -> list[str]:
    # A batch system tells mpirun the nodes; on one computer "nodes" are groups of processes there. Without --bind-to none all threads of
    # a rank would be on one core.
    places = ":OVERSUBSCRIBE" if job.machine.scheduler == "local" else f"ppr:{job.allocation.ranks_per_node}:node:OVERSUBSCRIBE"
    return ["mpirun", "-np", str(job.allocation.num_ranks), "--map-by", places, "--bind-to", "none", *tethered(job, job.command)]


def _torchrun(job: Job) -> list[str]:
    gang = ["--standalone", "--nnodes", "1", "--nproc-per-node", str(job.allocation.num_ranks)]
    watched = [*job.module("tether"), "--codes", str(job.run_dir.path), *job.command]
    return [job.python, "-P", "-m", "torch.distributed.run", *gang, "--no-python", *watched]


def _srun(job: Job) -> list[str]:
    allocation = job.allocation
    gang = [f"--nodes={allocation.num_nodes}", f"--ntasks={allocation.num_ranks}", f"--ntasks-per-node={allocation.ranks_per_node}"]
    # The environment of the script, whatever SBATCH_EXPORT says at this site: with NONE the ranks would not even have a PATH.
    # Slurm 22.05 and later do not take --cpus-per-task over from the job. A task that fails ends the others.
    return ["srun", "--export=ALL", *gang, f"--cpus-per-task={allocation.cpu_cores_per_rank}", "--cpu-bind=cores", "--kill-on-bad-exit=1", *job.command]


def _jsrun(job: Job) -> list[str]:
    # Every option is given: jsrun's defaults differ between sites. It has no need of an explicit resource file: all resource sets are alike.
    allocation, node = job.allocation, job.machine.node
    cores, gpus = allocation.cpu_cores_per_rank, allocation.gpus_per_rank
    if job.machine.resource_set == "rank":
        sets = ["-n", allocation.num_ranks, "-r", allocation.ranks_per_node, "-a", 1, "-c", cores, "-g", gpus]
    else:
        sets = ["-n", allocation.num_nodes, "-r", 1, "-a", allocation.ranks_per_node, "-c", node.num_cpu_cores, "-g", node.num_gpus]
    # IBM's DDL hands MPI memory of the GPUs, which MPI must know before it starts.
    mpi = ["--smpiargs=-gpu"] if job.machine.resource_set == "node" and gpus else []
    return ["jsrun", *map(str, sets), "-b", f"packed:{cores}", "-l", "gpu-cpu" if gpus else "cpu-cpu", "-d", "packed", *mpi, *job.command]


def _none(job: Job) -> list[str]:
    return job.command


def tethered(job: Job, argv: list[str]) -> list[str]:
    """The command, tied to the life of the script where no batch system cleans up."""
    return [*job.module("tether"), *argv] if job.machine.scheduler == "local" else argv


_SAME = {"TERM": "TERM", "INT": "TERM", "USR1": "USR1", "USR2": "USR2"}
"""A shell starts background processes with SIGINT ignored; TERM asks for the same and cannot be missed."""

_EXPORT_CODE_FILE = f'export PROTTRANS_EXIT_CODE_FILE="$run_dir/{CODE_FILE_PREFIX}$PROTTRANS_NONCE"'

STARTERS: dict[str, Starter] = {
    "processes": Starter(_processes, _SAME, is_ours=True),
    # mpirun passes on USR1 and USR2; TERM and INT would end the ranks before they have saved.
    "mpirun": Starter(
        _mpirun,
        {"TERM": "USR1", "INT": "USR1", "USR1": "USR1", "USR2": "USR2"},
        setup=(
            "# Open MPI refuses to run as root, as one is in many containers, unless told twice.",
            'if [ "$(id -u)" = 0 ]; then',
            "  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1",
            "fi",
        ),
    ),
    # torchrun passes on TERM and dies of USR1 and USR2.
    "torchrun": Starter(_torchrun, {"TERM": "TERM", "INT": "TERM", "USR1": "TERM", "USR2": "TERM"}, hides_codes=True),
    "none": Starter(_none, _SAME),
    # srun hands USR1 and USR2 on; at TERM it kills the ranks with SIGKILL, at INT it tells what they do. It ends with the highest code of all:
    # 143 of a rank that was ended because another had failed with 65, which no retry cures.
    "srun": Starter(
        _srun,
        {"TERM": "USR1", "INT": "USR1", "USR1": "USR1", "USR2": "USR2"},
        setup=("# srun ends with the highest code of all ranks: the first that fails writes its own here.", _EXPORT_CODE_FILE),
        hides_codes=True,
    ),
    "jsrun": Starter(
        _jsrun,
        {"TERM": "TERM", "INT": "INT", "USR1": "USR1", "USR2": "USR2"},
        setup=(
            "# Whether jsrun ends with the exit code of a rank is not documented: the first that fails writes its own here.",
            _EXPORT_CODE_FILE,
        ),
        hides_codes=True,
        asks_by_file=True,
    ),
}
