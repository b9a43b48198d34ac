"""Where non-finite numbers come from: the rank, the samples and the parameter, or a machine that computed wrongly.

The gradients of a step are summed as they arise, so when the sum is not finite every rank has lost its own share. Only
then is the step computed once more, on each rank by itself: a batch is a function of seed and position, and so are the
random numbers of a model, so the same numbers must come out. What is not finite again is a matter of the numbers, and its
rank, samples and first parameter are known. What comes out otherwise on the same rank is a matter of its hardware.
A step that goes well pays nothing.

Ranks that hold a model together compute again together. With FSDP each has its own batches and, layer by layer, whole gradients
of its own, which are looked at before they are added up: again the rank is known. The ranks of a tensor group work on the same
samples and hand one another what they compute, so what one of them meets may show in the losses of all; of gradients, each looks
at those of its own parts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .. import whereabouts
from ..architecture import Batch
from .loader import LoadedStep
from .session import Session
from .step import on_device, step_seed, with_token_counts

if TYPE_CHECKING:
    from ..comm_sharded import ShardedModel

_log = logging.getLogger(__name__)

_MAX_SAMPLES, _MAX_RANKS = 32, 8
_TOLERANCE = 1e-3
"""Relative; sums may come out in another order the second time. The loss of a CPU must have the same bits."""


@dataclass(frozen=True)
class Finding:
    """What one rank found out about one of its micro batches, or about itself (micro batch -1)."""

    rank: int
    micro_batch: int
    what: str
    """"loss" or "gradient" is not finite again; "differs": computed once more it came out otherwise."""
    samples: tuple[int, ...] = ()
    num_samples: int = 0
    parameter: str | None = None
    """The first, in the order of the backward pass, whose gradient is not finite."""
    num_parameters: int = 0
    """That have such gradients."""


@dataclass
class Replay:
    """A micro batch computed once more on this rank alone."""

    loss: float
    bad: list[str] = field(default_factory=list)
    """Parameters with non-finite gradients, in the order of the backward pass."""
    square: float = 0.0
    """Sum of the squares of its gradients."""
    peak: float = 0.0
    """Largest gradient, as a fraction of what its type can hold."""


def explain(session: Session, loaded: LoadedStep, losses: Sequence[float]) -> None:
    """Find out why a step was skipped, and tell it in the log and the history. `losses` are those of this rank's micro batches. Collective."""
    with whereabouts.patiently("looking for the cause of non-finite numbers"):
        replays = [_replay(session, loaded) for _ in range(2)]
        session.model.zero_gradients()
        found = findings(session.comm.rank, loaded.micro_batches, losses, replays, exact=_is_exact(loaded), bitwise=session.comm.device.type == "cpu")
        told = session.comm.all_gather_object([[asdict(one) for one in found], max((replay.peak for replay in replays[0]), default=0.0)])
    group = session.layout.num_tensor  # whose ranks have gradients of the same samples
    everywhere = origins([Finding(**one) for rank_found, _ in told for one in rank_found], group)
    peaks = sum(max(peak for _, peak in told[first : first + group]) for first in range(0, len(told), group))
    _tell(session, loaded, everywhere, verdict(everywhere, peaks, exact=_is_exact(loaded)))


def _is_exact(loaded: LoadedStep) -> bool:
    """Whether the step can be computed again as it was: what a model remembered before it is gone."""
    return loaded.lane_sums is None or loaded.begins_lanes


def _replay(session: Session, loaded: LoadedStep) -> list[Replay]:
    """Every micro batch of this rank by itself, without other ranks."""
    torch.manual_seed(step_seed(session.run.recipe.seed, step=loaded.step, rank=session.data_rank))
    scaling = session.loss_scale
    multiplier = scaling.multiplier(session.run.recipe.phases[loaded.phase]) if scaling else 1.0
    batches = on_device(with_token_counts(session, loaded.micro_batches), session.comm.device)
    return [_one(session, batch if loaded.begins_lanes else session.memory.put_into(batch, index), multiplier) for index, batch in enumerate(batches)]


def _one(session: Session, batch: Batch, multiplier: float) -> Replay:
    session.model.zero_gradients()
    replay = Replay(math.nan)
    with _noting_gradients(session)(partial(_note, session, replay)):
        with session.forward():
            result = session.model.module(batch)
        session.model.backward(result.loss if multiplier == 1.0 else result.loss * multiplier)
    whereabouts.moved()
    replay.loss = float(result.loss.detach().double())
    return replay


def _note(session: Session, replay: Replay, name: str, gradient: Tensor) -> None:
    """Put down what is to be known of one complete gradient."""
    if not bool(gradient.isfinite().all()):
        replay.bad.append(name)
    replay.square += float(gradient.double().square().sum())
    if gradient.numel():
        replay.peak = max(replay.peak, float(gradient.abs().max()) / _largest(session, gradient))


def _largest(session: Session, gradient: Tensor) -> float:
    """The largest number that this gradient may become on its way to the sum."""
    sent_as = torch.float16 if session.run.recipe.parallel.compression == "fp16" else gradient.dtype
    return torch.finfo(sent_as).max


Noting = Callable[[Callable[[str, Tensor], None]], AbstractContextManager[None]]
"""Makes a context in which a function is called with the name of every parameter and this rank's gradient of it, as soon as that is complete."""


def _noting_gradients(session: Session) -> Noting:
    # A cut model's gradients are added up as in a step: what copies hold back in its `no_sync` would enter the next sum.
    return partial(_noting_whole, session) if session.layout.is_plain else cast("ShardedModel", session.model).noting_gradients


@contextmanager
def _noting_whole(session: Session, note: Callable[[str, Tensor], None]) -> Iterator[None]:
    def noted(name: str, parameter: Tensor) -> None:
        if parameter.grad is not None:
            note(name, parameter.grad)

    handles = [
        parameter.register_post_accumulate_grad_hook(partial(noted, name))  # type: ignore[no-untyped-call]
        for name, parameter in session.module.named_parameters()
        if parameter.requires_grad
    ]
    try:
        with session.model.no_sync():
            yield
    finally:
        for handle in handles:
            handle.remove()


def findings(rank: int, batches: Sequence[Batch], losses: Sequence[float], replays: Sequence[Sequence[Replay]], *, exact: bool, bitwise: bool) -> list[Finding]:
    """What one rank has to tell, from its losses in the step and from computing it again twice.

    `exact`: the same must come out; `bitwise`: of the loss to the last bit.
    """
    found = []
    for index, (batch, loss, first, second) in enumerate(zip(batches, losses, replays[0], replays[1], strict=True)):
        where = Finding(rank, index, "", tuple(batch.sample_ids.tolist()[:_MAX_SAMPLES]), len(batch.sample_ids))
        same = _agree(loss, first.loss, bitwise) and _agree(first.loss, second.loss, bitwise) and _agree(first.square, second.square, False)
        if exact and not same:
            found.append(replace(where, what="differs"))
        elif not math.isfinite(first.loss) or first.bad:
            what = "gradient" if math.isfinite(first.loss) else "loss"
            found.append(replace(where, what=what, parameter=next(iter(first.bad), None), num_parameters=len(first.bad)))
    return found


def origins(found: Sequence[Finding], num_tensor: int) -> list[Finding]:
    """Without the gradients that are not finite because another rank of the tensor group has such a loss of the same samples."""
    losses = {(one.rank // num_tensor, one.micro_batch) for one in found if one.what == "loss"}
    return [one for one in found if one.what != "gradient" or (one.rank // num_tensor, one.micro_batch) not in losses]


def _agree(one: float, other: float, bitwise: bool) -> bool:
    if not math.isfinite(one) or not math.isfinite(other):
        return math.isfinite(one) == math.isfinite(other)
    return one == other if bitwise else math.isclose(one, other, rel_tol=_TOLERANCE)


def verdict(found: Sequence[Finding], peaks: float, *, exact: bool) -> str:
    """What the findings of all ranks come to; `peaks` is the sum over ranks of their largest gradient, as a fraction of what its type holds."""
    if any(one.what == "differs" for one in found):
        return "hardware"
    if found:
        return "numbers"
    if peaks >= 1.0:
        return "overflow"
    return "lost" if exact else "unknown"


_SENTENCES = {
    "hardware": "the same step came out otherwise when it was computed again: suspect the hardware of {hosts}",
    "numbers": "computed again it is not finite again",
    "overflow": "the gradients of every rank are finite, and their sum is too large for its type: fp32, or a smaller loss scale, has room for it",
    "lost": "computed again it is finite on every rank: suspect the hardware of a node, or what joins the nodes; the step does not tell which",
    "unknown": "computed again it is finite on every rank, though with what the model remembers now",
}


def _tell(session: Session, loaded: LoadedStep, found: Sequence[Finding], cause: str) -> None:
    """Rank 0, for all."""
    if session.records is None:
        return
    culprits = [one for one in found if cause != "hardware" or one.what == "differs"]
    hosts = [_host(session, one.rank) for one in culprits]
    said = _SENTENCES[cause].format(hosts=", ".join(dict.fromkeys(hosts)))
    _log.warning("step %d: %s%s", loaded.step + 1, said, "".join(f"; {_sentence(one, host)}" for one, host in zip(culprits[:_MAX_RANKS], hosts, strict=False)))
    where = [{**asdict(one), "host": host} for one, host in zip(culprits, hosts, strict=True)]
    session.records.event("non-finite numbers", step=loaded.step + 1, verdict=cause, what=said, where=where[:_MAX_RANKS], num_found=len(culprits))


def _host(session: Session, rank: int) -> str:
    places = session.stragglers.places
    return places[rank].host if places else f"rank {rank}"


def _sentence(one: Finding, host: str) -> str:
    parameter = f", first {one.parameter}, in all {one.num_parameters} parameters" if one.parameter else ""
    samples = " ".join(map(str, one.samples[:8])) + (f" and {one.num_samples - 8} more" if one.num_samples > 8 else "")
    kind: dict[str, Any] = {"loss": "the loss", "gradient": "the gradient", "differs": "what differs is that"}
    return f"{kind[one.what]} of rank {one.rank} on {host}, micro batch {one.micro_batch}{parameter}, samples {samples}"
