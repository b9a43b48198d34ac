"""A strict stand-in for `bsub` of LSF 10.1 as Summit had it: it refuses what Summit's refused, and what its users' guide forbids.

The job script comes on standard input; options stand on the command line, which wins, and in its #BSUB lines.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Sequence

from lsf_state import FINISHED, State, dependency_terms, element_id, here, refuse

WITH_VALUE = ("-P", "-J", "-q", "-W", "-n", "-nnodes", "-o", "-e", "-w", "-alloc_flags", "-wa", "-wt", "-R", "-csm")
FLAGS = ("-r", "-rn")
ALLOC_FLAGS = ("smt1", "smt2", "smt4", "gpumps", "gpudefault", "nvme", "spectral", "maximizegpfs")
RACKS = re.compile(
    r"1\*\{select\[\(\(LN\)&&\(type==any\)\)\]order\[r15s:pg\]span\[hosts=1\]cu\[type=rack:pref=config\]\}"
    r"\+(?P<slots>\d+)\*\{select\[\(\(CN\)&&\(type==any\)\)\]order\[r15s:pg\]span\[ptile=(?P<ptile>\d+)\]cu\[type=rack:maxcus=(?P<racks>\d+)\]\}"
)
NAME = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?:\[1-(?P<last>[1-9]\d{0,3})\](?:%(?P<limit>[1-9]\d*))?)?")
"""A name, or an array whose elements begin with 1, at most `limit` of them at a time."""
Options = dict[str, str]


def directives(script: str) -> list[str]:
    """The words of the #BSUB lines."""
    words: list[str] = []
    num_alloc_flags = 0
    for line in script.splitlines():
        if line.startswith("#BSUB"):
            try:
                words += shlex.split(line.removeprefix("#BSUB"), comments=False)
            except ValueError:
                refuse(f"{line}: unbalanced quotes. Job not submitted.")
            num_alloc_flags += "-alloc_flags" in line.split()
    if num_alloc_flags > 1:
        refuse("Only one -alloc_flags directive is recognised; put all flags into one pair of quotes. Job not submitted.")
    return words


def parse(words: Sequence[str]) -> Options:
    """Option -> value; a flag has the value "". The last one counts."""
    options: Options = {}
    rest = list(words)
    while rest:
        name = rest.pop(0)
        if name in FLAGS:
            options[name] = ""
        elif name in WITH_VALUE:
            if not rest or rest[0] in (*WITH_VALUE, *FLAGS):
                refuse(f"{name}: an argument is missing. Job not submitted.")
            options[name] = rest.pop(0)
        else:
            refuse(f"{name}: Illegal option. Job not submitted." if name.startswith("-") else f"{name}: give the script on standard input. Job not submitted.")
    return options


def minutes(text: str, name: str) -> int:
    """[hours:]minutes, without seconds."""
    match = re.fullmatch(r"(?:(\d+):)?(\d+)", text)
    if not match or (match[1] and int(match[2]) > 59):
        refuse(f"{name} {text}: Bad time specification; it is [hours:]minutes. Job not submitted.")
    value = 60 * int(match[1] or 0) + int(match[2])
    if value == 0:
        refuse(f"{name} {text}: must be above zero. Job not submitted.")
    return value


def count(text: str, name: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        refuse(f"{name} {text}: Bad argument. Job not submitted.")
    return int(text)


def place(options: Options, cluster: dict[str, object]) -> tuple[int, int | None]:
    """(nodes, racks at most or None): easy mode, or expert mode."""
    cores, per_rack = int(str(cluster["cores"])), int(str(cluster["nodes_per_rack"]))
    if options.get("-csm", "n") not in ("y", "n"):
        refuse(f"-csm {options['-csm']}: is y or n. Job not submitted.")
    if "-n" in options and "-nnodes" in options:
        refuse("-n and -nnodes cannot be used together. Job not submitted.")
    if options.get("-csm") != "y":
        if "-R" in options or "-n" in options:
            refuse("-R and -n need expert mode (-csm y); in easy mode ask for -nnodes. Job not submitted.")
        if "-nnodes" not in options:
            refuse("The number of nodes is missing (-nnodes). Job not submitted.")
        return count(options["-nnodes"], "-nnodes"), None
    if "-nnodes" in options:
        refuse("-nnodes cannot be used in expert mode. Job not submitted.")
    if "-n" not in options or "-R" not in options:
        refuse("Expert mode needs -n and -R. Job not submitted.")
    match = RACKS.fullmatch(options["-R"])
    if not match:
        refuse(f"-R {options['-R']}: Bad resource requirement syntax. Job not submitted.")
    slots, racks = int(match["slots"]), int(match["racks"])
    if count(options["-n"], "-n") != 1 + slots:
        refuse(f"-n {options['-n']} does not match the {slots} + 1 slots of the resource requirement. Job not submitted.")
    if int(match["ptile"]) != cores or slots % cores:
        refuse(f"{slots} slots, {match['ptile']} a host, do not fill hosts of {cores} slots. Job not submitted.")
    if slots // cores > racks * per_rack:
        refuse(f"{slots // cores} hosts do not fit into {racks} racks of {per_rack}. Job not submitted.")
    return slots // cores, racks


def check_limits(queue: str, nodes: int, walltime: int, cluster: dict[str, object]) -> None:
    queues: dict[str, list[list[int]]] = cluster["queues"]  # type: ignore[assignment] # JSON
    if queue not in queues:
        refuse(f"{queue}: No such queue. Job not submitted.")
    for least, most, longest in queues[queue]:
        if least <= nodes <= most:
            if walltime > longest:
                refuse(f"RUNLIMIT: {nodes} nodes may run for {longest} minutes in {queue}, not {walltime}. Job not submitted.")
            return
    refuse(f"{queue} takes no jobs of {nodes} nodes. Job not submitted.")


def check_words(options: Options, state: State) -> None:
    """What can be wrong whatever the size."""
    for name in ("-P", "-W"):
        if name not in options:
            refuse(f"{name} is missing: this site requires it. Job not submitted.")
    if not NAME.fullmatch(options.get("-J", "job")):
        refuse(f"-J {options['-J']}: Bad job name or array. Job not submitted.")
    if ("-wa" in options) != ("-wt" in options):
        refuse("-wa and -wt must be given together. Job not submitted.")
    if "-wa" in options and f"SIG{options['-wa']}" not in signal.Signals.__members__:
        refuse(f"-wa {options['-wa']}: Bad signal value. Job not submitted.")
    unknown = [flag for flag in options.get("-alloc_flags", "").split() if flag.lower() not in ALLOC_FLAGS]
    if unknown:
        refuse(f"-alloc_flags {unknown[0]}: no such flag. Job not submitted.")
    if "-w" in options:
        try:
            terms = dependency_terms(options["-w"])
        except ValueError:
            refuse(f"-w {options['-w']}: Dependency condition syntax error. Job not submitted.")
        for term in terms:
            if not isinstance(term, str) and state.read(term[1]) is None:
                refuse(f"-w {options['-w']}: No matching job found. Job not submitted.")


def main(arguments: Sequence[str]) -> None:
    state = here()
    cluster = state.cluster
    script = sys.stdin.read()
    if not script.strip():
        refuse("Empty job. Job not submitted.")
    options = {**parse(directives(script)), **parse(arguments)}
    check_words(options, state)
    nodes, racks = place(options, cluster)
    walltime, queue = minutes(options["-W"], "-W"), options.get("-q", "batch")
    warning = [options["-wa"], minutes(options["-wt"], "-wt")] if "-wa" in options else None
    check_limits(queue, nodes, walltime, cluster)
    with state.locked():
        array = NAME.fullmatch(options.get("-J", "job"))
        assert array
        indices = range(1, int(array["last"]) + 1) if array["last"] else [0]
        if sum(job["stat"] not in FINISHED for job in state.jobs()) + len(indices) > cluster["max_queued"]:
            refuse("User has reached the limit of queued jobs. Job not submitted.")
        job_id = state.next_id()
        for index in indices:
            element = element_id(job_id, index)
            folder = state.job_folder(element)
            folder.mkdir(parents=True)
            (folder / "script").write_text(script)
            state.write(
                {
                    "id": element,
                    "number": job_id,
                    "index": index,
                    "limit": int(array["limit"]) if array["limit"] else None,
                    "name": array["name"],
                    "project": options["-P"],
                    "queue": queue,
                    "nodes": nodes,
                    "racks": racks,
                    "walltime_min": walltime,
                    "out": options.get("-o"),
                    "err": options.get("-e", options.get("-o")),
                    "after": options.get("-w"),
                    "warning": warning,
                    "rerunnable": "-r" in options,
                    "requeue_forbidden": "-rn" in options,
                    "alloc_flags": options.get("-alloc_flags", ""),
                    "environment": dict(os.environ),
                    "cwd": os.getcwd(),
                    "stat": "PEND",
                    "starts": 0,
                    "submitted": time.time(),
                }
            )
    print(f"Job <{job_id}> is submitted to {'queue' if '-q' in options else 'default queue'} <{queue}>.")


if __name__ == "__main__":
    main(sys.argv[1:])
