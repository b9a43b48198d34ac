"""A strict stand-in for IBM's `jsrun`: refuses resource sets that no node of the job has, then starts real local processes as ranks.

Where the documentation leaves something open, it does the worst: it passes no signal on and dies of one unless it was
started with that signal ignored; when a rank fails it waits for the others and ends with 1.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lsf_daemon import die_with_parent
from lsf_state import here, refuse

NUMBERS = {"-n": "num_sets", "-r": "sets_per_host", "-a": "tasks", "-c": "cores", "-g": "gpus"}
WORDS = {"-b": "bind", "-l": "latency", "-d": "distribution"}


@dataclass(frozen=True)
class Request:
    """What is asked for; every option has to be given, for the defaults are a site's."""

    num_sets: int
    sets_per_host: int
    tasks: int
    cores: int
    gpus: int
    bind: str
    latency: str
    distribution: str
    command: tuple[str, ...]


def parse(arguments: Sequence[str]) -> Request:
    rest, numbers, words = list(arguments), dict[str, int](), dict[str, str]()
    while rest and rest[0].startswith("-"):
        name = rest.pop(0)
        if name.startswith("--smpiargs="):
            continue
        if name not in NUMBERS and name not in WORDS:
            refuse(f"jsrun: unrecognized option '{name}'")
        if not rest:
            refuse(f"jsrun: option '{name}' requires an argument")
        value = rest.pop(0)
        if name in WORDS:
            words[WORDS[name]] = value
        elif value.isdigit():
            numbers[NUMBERS[name]] = int(value)
        else:
            refuse(f"jsrun: {name} {value}: not a number")
    missing = [name for name, field in (NUMBERS | WORDS).items() if field not in numbers and field not in words]
    if missing:
        refuse(f"jsrun: {', '.join(missing)} not given: this stand-in has no defaults")
    if not rest:
        refuse("jsrun: no command")
    return Request(**numbers, **words, command=tuple(rest))


def check(request: Request, num_hosts: int, cores: int, gpus: int) -> None:
    """Refuse what does not fit on the nodes of the job."""
    if min(request.num_sets, request.sets_per_host, request.tasks, request.cores) < 1:
        refuse("jsrun: -n, -r, -a and -c must be at least 1")
    if request.num_sets != request.sets_per_host * num_hosts:
        refuse(f"jsrun: {request.num_sets} resource sets, {request.sets_per_host} a host, do not fill the {num_hosts} hosts of the job")
    if request.sets_per_host * request.cores > cores:
        refuse(f"jsrun: {request.sets_per_host} resource sets x {request.cores} cores exceed the {cores} cores of a host")
    if request.sets_per_host * request.gpus > gpus:
        refuse(f"jsrun: {request.sets_per_host} resource sets x {request.gpus} GPUs exceed the {gpus} GPUs of a host")
    kind, _, number = request.bind.partition(":")
    if request.bind not in ("none", "rs") and (kind != "packed" or not number.isdigit() or int(number) * request.tasks > request.cores):
        refuse(f"jsrun: -b {request.bind} does not fit {request.tasks} tasks into {request.cores} cores")
    if request.latency not in ("gpu-cpu", "cpu-cpu"):
        refuse(f"jsrun: -l {request.latency}: unknown latency priority")
    if request.distribution != "packed":
        refuse(f"jsrun: -d {request.distribution}: this stand-in knows packed only")


def environments(request: Request, num_hosts: int, namespace: str) -> list[dict[str, str]]:
    """The variables of each rank: resource set after resource set, host after host."""
    per_host = request.sets_per_host * request.tasks
    size = num_hosts * per_host
    ranks = []
    for rank in range(size):
        local = rank % per_host
        place = {"RANK": rank, "SIZE": size, "LOCAL_RANK": local, "LOCAL_SIZE": per_host}
        resource_set = local // request.tasks
        devices = ",".join(str(resource_set * request.gpus + gpu) for gpu in range(request.gpus))
        ranks.append(
            {f"{prefix}_{name}": str(value) for prefix in ("JSM_NAMESPACE", "OMPI_COMM_WORLD") for name, value in place.items()}
            | {"PMIX_RANK": str(rank), "PMIX_NAMESPACE": namespace, "CUDA_VISIBLE_DEVICES": devices}
        )
    return ranks


def main(arguments: Sequence[str]) -> int:
    if "LSB_DJOB_HOSTFILE" not in os.environ:
        refuse("jsrun: not in a job")
    die_with_parent()
    slots = Path(os.environ["LSB_DJOB_HOSTFILE"]).read_text().split()
    hosts = [host for host in dict.fromkeys(slots) if not host.startswith(("batch", "login"))]
    request, cluster = parse(arguments), here().cluster
    check(request, len(hosts), cluster["cores"], cluster["gpus"])
    # As on another node: in a session of their own, with every signal as it is by default.
    ranks = [
        subprocess.Popen(request.command, env=os.environ | variables, start_new_session=True, preexec_fn=_as_on_another_node)
        for variables in environments(request, len(hosts), f"{os.environ['LSB_JOBID']}.{os.getpid()}")
    ]
    codes = [rank.wait() for rank in ranks]
    return 1 if any(codes) else 0


def _as_on_another_node() -> None:
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
