"""A rank whose model meets non-finite numbers on purpose: stands in for `python -m prottrans_hpc pretrain`.

poisoned_rank.py RUN_DIR, with POISON='{"steps": [9], "ranks": [1], "how": "loss" | "gradient" | "memory" | "spike", "passes": 1}' in
the environment: the steps (from 1) at which those ranks' models go wrong, in so many passes over the step. A spike is a
loss four times as high; it comes whenever the learning rate is at least "from_factor" of the recipe's. With "memory" what a
model with lanes remembers of them is no number, either. With "parameter" it is the gradient of the parameter "parameter" alone
that is infinite. "forwards" limits how many forward passes of the step go wrong: when it is computed again, it is fine.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from prottrans_hpc import __main__, architecture
from prottrans_hpc.models.prot_bert import ProtBert
from prottrans_hpc.models.prot_txl import ProtTxl
from prottrans_hpc.train import loop, preemption

POISON = json.loads(os.environ["POISON"])
passes: Counter[int] = Counter()
now = {"bad": False, "left": 0}
real_step = loop.take_step


class _BadGradient(torch.autograd.Function):
    """The number itself, with an infinite gradient."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * float("inf")


def take_step(session: Any, loaded: Any) -> Any:
    step = loaded.step + 1
    passes[step] += 1
    goes_wrong = session.divergence.rate_factor >= POISON["from_factor"] if POISON["how"] == "spike" else passes[step] <= POISON["passes"]
    now["bad"] = step in POISON["steps"] and session.comm.rank in POISON["ranks"] and goes_wrong
    now["left"] = POISON.get("forwards", 1 << 30)
    return real_step(session, loaded)


def poisoned(real: Callable[..., architecture.LossSum]) -> Callable[..., architecture.LossSum]:
    """The forward pass of a model that goes wrong where it is told to."""

    def forward(self: Any, batch: architecture.Batch) -> architecture.LossSum:
        if now["bad"] and now["left"] and POISON["how"] == "parameter":
            poison_parameter(self)
        result = real(self, batch)
        if not now["bad"] or not now["left"]:
            return result
        now["left"] -= 1
        if POISON["how"] == "parameter":
            return result
        factors = {"loss": float("nan"), "memory": float("nan"), "spike": 4.0}
        loss = result.loss * factors[POISON["how"]] if POISON["how"] in factors else _BadGradient.apply(result.loss)
        return replace(result, loss=loss, memory=result.memory * float("nan") if POISON["how"] == "memory" else result.memory)

    return forward


def poison_parameter(model: torch.nn.Module) -> None:
    """The next gradient of one parameter is infinite. A cut model has whole ones only while their module works."""
    owner, _, leaf = POISON["parameter"].rpartition(".")
    module = model.get_submodule(owner)

    def poison(*_: Any) -> None:
        hooked.remove()
        handle = getattr(module, leaf).register_hook(lambda gradient: (handle.remove(), gradient * float("inf"))[1])

    hooked = module.register_forward_pre_hook(poison)


preemption.install()
loop.take_step = take_step
for model in (ProtBert, ProtTxl):
    model.forward = poisoned(model.forward)
sys.exit(__main__.main(["pretrain", sys.argv[1]]))
