"""Submits a small training from the login node as `prottrans pretrain` does, with every size given. One argument: JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from prottrans_hpc.errors import ProttransError
from prottrans_hpc.launch import checks, gang
from prottrans_hpc.machine import Allocation, read_machine
from prottrans_hpc.recipe import read_recipe
from prottrans_hpc.run_dir import RunDir

order = json.loads(sys.argv[1])
allocation = Allocation(order["nodes"], order["ranks_per_node"], 1, 0, walltime_min=order["walltime_min"], queue=order["queue"])
plan = gang.Plan(
    read_recipe("tiny_prot_bert", tuple(order["settings"])),
    "micro",
    checks.read_corpus_facts(Path(order["corpus"])),
    read_machine(order["machine"]),
    allocation,
    order["steps"],
    RunDir(Path(order["run_dir"])),
    num_jobs=order["num_jobs"],
)
try:
    gang.carry_out(plan, detach=True)
except ProttransError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
