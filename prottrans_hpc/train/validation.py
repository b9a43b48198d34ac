"""The loss on the held-out split: always the same sequences under the same masks, shared out over the ranks."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from .. import whereabouts
from ..architecture import Batch
from .loader import validation_batches
from .session import Session
from .step import counted, means_of_parts, on_device, with_token_counts


class Validator:
    """Owns this rank's validation batches, which are made at the first use."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._batches: tuple[Batch, ...] | None = None

    def is_due(self, step: int) -> bool:
        """Whether the recipe wants a measurement after this step."""
        return self._session.validation is not None and step > 0 and step % self._session.run.recipe.validation.every_steps == 0

    def catch_up(self) -> None:
        """Make the measurement that a stop just after its step prevented, so that stopping leaves no gap. Collective."""
        session = self._session
        due = self.is_due(session.progress.step)
        if due and session.comm.broadcast_object(session.records is not None and session.records.last_validated < session.progress.step):
            self.measure()

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """Measure and record. Collective."""
        with whereabouts.patiently("validation"):
            return self._measure()

    def _measure(self) -> dict[str, Any]:
        began, session = time.perf_counter(), self._session
        session.module.eval()
        sums = torch.zeros(3 + len(session.record.loss_parts), dtype=torch.float64, device=session.comm.device)
        for batch in on_device(self._own_batches(), session.comm.device):
            with session.forward():
                result = session.module(batch)
            plain = torch.stack((result.loss.double(), torch.tensor(float(len(batch.targets)), device=sums.device)))
            if session.counts:
                sums += torch.cat((plain, counted(result)))
        session.module.train()
        loss, num_targets, num_correct, *parts = session.comm.all_reduce_sum(sums).tolist()
        mean = loss / max(num_targets, 1.0)
        record = {
            "step": session.progress.step,
            "loss": mean,
            "perplexity": perplexity(mean),
            "accuracy": num_correct / max(num_targets, 1.0),
            **means_of_parts(session, parts, num_targets),
            "num_targets": int(num_targets),
            "seconds": round(time.perf_counter() - began, 4),
        }
        if session.records is not None:
            session.records.validation(record)
        return record

    def _own_batches(self) -> tuple[Batch, ...]:
        session = self._session
        if self._batches is None:
            assert session.validation is not None, "is_due comes first"
            vocabulary, num_shares = session.record.vocabulary, session.layout.num_data_ranks
            own = validation_batches(session.validation, session.run.recipe, vocabulary, rank=session.data_rank, world_size=num_shares)
            self._batches = with_token_counts(session, tuple(own))
        return self._batches


def perplexity(mean_loss: float) -> float:
    """exp of the mean loss; infinite where that overflows."""
    return math.exp(mean_loss) if mean_loss < 700.0 else math.inf
