"""A rank whose forward pass stands still on purpose: stands in for `python -m prottrans_hpc pretrain`.

stuck_rank.py RUN_DIR, with STUCK='{"rank": 1, "step": 4, "seconds": 600}' in the environment. With "in" = "validation" the
rank stands still in validation after that step instead; with "holding" true it keeps the interpreter's lock meanwhile.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from typing import Any

from prottrans_hpc import __main__, whereabouts
from prottrans_hpc.models.prot_bert import ProtBert
from prottrans_hpc.train import preemption

STUCK = json.loads(os.environ["STUCK"])
once: list[int] = []
real_forward = ProtBert.forward


def forward(self: Any, batch: Any) -> Any:
    here = whereabouts.HERE
    if int(os.environ["PROTTRANS_RANK"]) == STUCK["rank"] and here.step == STUCK["step"] and here.phase == STUCK.get("in", "training"):
        stand_still()
    return real_forward(self, batch)


def stand_still() -> None:
    if not once:
        once.append(1)
        if STUCK.get("holding"):
            ctypes.PyDLL(None).sleep(STUCK["seconds"])  # PyDLL keeps the lock
        else:
            time.sleep(STUCK["seconds"])


preemption.install()
ProtBert.forward = forward
sys.exit(__main__.main(["pretrain", sys.argv[1]]))
