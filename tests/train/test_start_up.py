"""What a rank loads before its first step: at thousands of ranks every file of it is asked of one file system thousands of times."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAIN = """
import json, os, sys
from prottrans_hpc import __main__
from prottrans_hpc.train import preemption
preemption.install()
code = __main__.main(["pretrain", sys.argv[1]])
with open(os.path.join(sys.argv[1], "modules-" + os.environ["PROTTRANS_RANK"] + ".json"), "w") as file:
    json.dump(sorted(sys.modules), file)
sys.exit(code)
"""
NOT_FOR_RANKS = (
    # torch's compiler and what comes with it: half of the processor time of a start.
    *("torch._dynamo", "torch._inductor", "torch.onnx", "torch.distributed.fsdp", "torch.distributed.tensor", "sympy"),
    # The login node's, the corpus builder's, and pictures.
    *("click", "rich", "submitit", "mpi4py", "matplotlib", "pandas", "scipy", "transformers"),
)


def test_ranks_that_train_together_load_no_compiler(tmp_path: Path, make_run: Callable[..., Path], start_ranks: Callable[..., Any]) -> None:
    main = tmp_path / "main.py"
    main.write_text(MAIN)
    folder = make_run(tmp_path / "run", num_ranks=2, stop_after_step=2)
    start_ranks(folder, 2, main=main).end(0)
    for rank in range(2):
        loaded = set(json.loads((folder / f"modules-{rank}.json").read_text()))
        assert "torch.distributed" in loaded
        assert loaded.isdisjoint(NOT_FOR_RANKS), sorted(loaded.intersection(NOT_FOR_RANKS))
