"""A projection fitted to a scaling study, checked by leaving out its largest size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..recipe_parallel import HALVED
from . import fitting, measured_steps, what_if
from .cost_model import MIB, Manner, Work, predict
from .fitting import Fitted
from .known_links import AllReduce
from .measured_steps import Size
from .scaling import Scaling
from .sharded_cost import Cut

_NUM_SAMPLES = 200
"""Of the bootstrap."""
_BAND = (2.5, 97.5)
_DRIFT = 0.10
"""A node's own work that changes by more than this share from one node to many is warned of."""


@dataclass(frozen=True)
class Model:
    """A study, understood."""

    study: Scaling
    sizes: Sequence[Size]
    """That it was fitted to, ascending; the first is one node."""
    manner: Manner
    fitted: Fitted

    def work_at(self, nodes: int) -> Work:
        """A node's own work: that of the largest size; in a strong study its passes shrink with what a node has to do.

        On a computer whose cores all "nodes" share, ranks take turns, and all of it grows with them.
        """
        largest = self.sizes[-1]
        turns = self.study.turns(nodes) / self.study.turns(largest.nodes)
        share = turns * (largest.nodes / nodes if self.study.mode == "strong" else 1.0)
        own = largest.work
        return replace(own, forward_s=share * own.forward_s, backward_s=share * own.backward_s, other_s=turns * own.other_s)

    def step_s(self, nodes: int) -> float:
        """Predicted; one node as it was measured."""
        if nodes == 1:
            return self.sizes[0].step_s
        return predict(self.work_at(nodes), self.manner, self.fitted.fabric(self.study.ranks_per_node), nodes, self.fitted.spread).step_s

    def overhead(self, nodes: int) -> float:
        """Step time over what perfect scaling would have, less 1."""
        ideal = self.sizes[0].step_s / (nodes if self.study.mode == "strong" else 1)
        return self.step_s(nodes) / ideal - 1.0


def project(study: Scaling, nodes: Sequence[int], *, with_changes: bool, known: AllReduce | None = None) -> dict[str, Any]:
    """The content of projection.json; `known` is a communication study of the same links. Raises ConfigError for a study of too few sizes."""
    check_enough(study, known)
    sizes = measured_steps.sizes_of(study, measured_steps.all_steps(study))
    model, held_out = _model(study, sizes, known), sizes[-1]
    predicted_s = _model(study, sizes[:-1], known).step_s(held_out.nodes)
    error = predicted_s / held_out.step_s - 1.0
    samples = _bootstrap(study, known)
    fabric = model.fitted.fabric(study.ranks_per_node)
    return {
        "basis": "measured",
        "recipe": study.recipe,
        "machine": study.machine,
        "algorithm": model.fitted.algorithm,
        "fit": _fit_facts(model),
        "hold_out": {"nodes": held_out.nodes, "predicted_s": predicted_s, "measured_s": held_out.step_s, "error": error},
        "assumptions": _assumptions(study, sizes, known),
        "warnings": _warnings(model),
        "points": [_point(model, samples, error, number) for number in nodes],
        "what_if": what_if.rows(model.work_at(nodes[-1]), model.manner, fabric, nodes[-1], model.fitted.spread, cuts=_cuts(study)) if with_changes else [],
    }


def check_enough(study: Scaling, known: AllReduce | None) -> None:
    """Raises ConfigError that says which sizes are missing, or what of the study is not modelled."""
    if study.sharing.tensor_ranks > study.ranks_per_node:
        raise ConfigError(
            f"the study's tensor groups of {study.sharing.tensor_ranks} ranks reach over nodes of {study.ranks_per_node}, so that no size of it tells a "
            "node's own work from what it waits for: project from a study with parallel.tensor_ranks within a node, or from a machine's numbers, with --machine"
        )
    counts, to_fit = study.node_counts, 1 if known else fitting.FEWEST_SIZES
    what = "one to find how loaded the links are" if known else f"{to_fit} to fit latency and bandwidth of the links"
    lacks = ["1 node, which overhead is relative to"] if counts[0] != 1 else []
    if len(counts) < 1 + to_fit + 1:
        lacks.append(f"at least {1 + to_fit + 1} sizes: 1 node, {what}, and the largest, which checks the fit")
    if lacks:
        fewer = "" if known else " (a communication study of the same machine, --comm DIR, makes it one size fewer)"
        raise ConfigError(
            f"the study has {len(counts)} {'size' if len(counts) == 1 else 'sizes'} ({', '.join(map(str, counts))} nodes), too few to project from: it needs "
            f"{' and '.join(lacks)}{fewer}. For example: prottrans scale {study.recipe} --machine {study.machine} --nodes 1,2,4,8 --out DIR"
        )


def back_end(study: Scaling) -> str:
    """What reduced the gradients: Horovod, or torch's, which is NCCL where ranks have GPUs, whose peak a profile must state."""
    return "horovod" if study.comm == "horovod" else "nccl" if study.peak_tflops_rank else "gloo"


def manner_of(study: Scaling) -> tuple[Manner, Sequence[str]]:
    """What the study's ranks sent, and what their reductions may have been."""
    sharing = study.sharing
    candidates = fitting.CANDIDATES[back_end(study)]
    if (sharing.reduction == "hierarchical" or sharing.compression in HALVED) and study.ranks_per_node > 1:
        candidates = ("hierarchical",)
    elif sharing.compression in HALVED:
        candidates = ("ring",)  # an exchange and a gather: its messages, and its bytes
    fraction = (sharing.sent_bytes or study.gradient_bytes) / study.gradient_bytes
    sums = 2 if sharing.compression == "powersgd" else 1
    return Manner(float(study.bucket_mib * MIB), candidates[0], fraction, sums=sums, cut=_cut(study)), candidates


def _cut(study: Scaling) -> Cut | None:
    """Within a node nothing is counted, so activations of tensor groups are not: on one node, where work is taken from, they are in the passes."""
    return _cut_over(study, study.sharing.shard_ranks) if study.sharing.is_cut else None


def _cut_over(study: Scaling, shards: int | None) -> Cut:
    sharing, is_gloo = study.sharing, back_end(study) == "gloo"
    rounds = 2 if is_gloo else 1
    return Cut(shards, sharing.units or 1, float(study.gradient_bytes), sharing.tensor_ranks, overlaps=not is_gloo, scatter_rounds=rounds)


def _cuts(study: Scaling) -> dict[str, Cut]:
    """Other ways to cut the model, which Horovod has not, and of which older studies do not say enough."""
    known = study.sharing.units is not None and study.comm == "torch"
    return what_if.other_cuts(_cut_over(study, None), study.ranks_per_node) if known else {}


def _model(study: Scaling, sizes: Sequence[Size], known: AllReduce | None) -> Model:
    manner, candidates = manner_of(study)
    fitted = fitting.fit(sizes, manner, study.ranks_per_node, candidates, known)
    return Model(study, sizes, replace(manner, algorithm=fitted.algorithm), fitted)


def _bootstrap(study: Scaling, known: AllReduce | None) -> list[Model]:
    """Models of samples of the study's points and steps; the algorithm is chosen anew in each."""
    generator = np.random.default_rng(0)
    return [_model(study, measured_steps.sizes_of(study, measured_steps.drawn_steps(study, generator)), known) for _ in range(_NUM_SAMPLES)]


def _point(model: Model, samples: Sequence[Model], error: float, nodes: int) -> dict[str, Any]:
    ranks, overhead = nodes * model.study.ranks_per_node, model.overhead(nodes)
    step = predict(model.work_at(nodes), model.manner, model.fitted.fabric(model.study.ranks_per_node), nodes, model.fitted.spread)
    # One node is measured, not predicted: the error of predictions is none of its own.
    share = abs(error) if nodes > 1 else 0.0
    step_low, step_high = _band(model.step_s(nodes), [sample.step_s(nodes) for sample in samples], share * model.step_s(nodes))
    low, high = _band(overhead, [sample.overhead(nodes) for sample in samples], share * (1.0 + overhead))
    return {
        "nodes": nodes,
        "ranks": ranks,
        "step_s": model.step_s(nodes),
        "step_s_low": step_low,
        "step_s_high": step_high,
        "overhead": overhead,
        "overhead_low": low,
        "overhead_high": high,
        "efficiency": 1.0 / (1.0 + overhead),
        "efficiency_low": 1.0 / (1.0 + high),
        "efficiency_high": 1.0 / (1.0 + max(low, -0.5)),
        "local_s": step.local_s,
        "straggler_s": step.straggler_s,
        "communication_s": step.communication_s,
        "exposed_comm_s": model.sizes[0].exposed_comm_s if nodes == 1 else step.exposed_comm_s,
    }


def _band(value: float, samples: Sequence[float], error: float) -> tuple[float, float]:
    """The bootstrap's percentiles, widened by the error of the held-out size: independent, so in squares."""
    below, above = (float(np.percentile(samples, percent)) - value for percent in _BAND)
    return value - math.hypot(min(0.0, below), error), value + math.hypot(max(0.0, above), error)


def _fit_facts(model: Model) -> dict[str, Any]:
    fitted = model.fitted
    text = (
        f"{fitted.algorithm} with {1e6 * fitted.link.latency_s:.3g} us and {fitted.link.bytes_per_s / 1e9:.3g} GB/s between nodes, off by "
        f"{100 * fitted.residual:.2g} % of a step; stragglers {fitted.spread.family}, scale {1e3 * fitted.spread.scale_s:.3g} ms"
    )
    return {
        "text": text,
        "latency_s": fitted.link.latency_s,
        "bytes_per_s": fitted.link.bytes_per_s,
        "residual": fitted.residual,
        "straggler_family": fitted.spread.family,
        "straggler_scale_s": fitted.spread.scale_s,
        "nodes": [size.nodes for size in model.sizes],
    }


def _assumptions(study: Scaling, sizes: Sequence[Size], known: AllReduce | None) -> list[str]:
    work = "shrinks as the nodes' share of the batch" if study.mode == "strong" else f"stays that of {sizes[-1].nodes} nodes"
    if study.hardware.get("shared_cores"):
        work += ", times the ranks for each of the cores that all nodes share"
    return [
        f"a node's own work {work}; node times vary independently, none is always slow",
        _sending_text(study),
        "links, their load and the reduction's algorithm stay as they were; within a node nothing is counted",
        *([f"latency and bandwidth are in the ratio that {known.backend}'s all-reduce showed on {known.nodes} nodes"] if known else []),
        f"the range: 95 % of {_NUM_SAMPLES} bootstrap samples over points and steps, widened by the error of the size left out",
    ]


def _sending_text(study: Scaling) -> str:
    sharing = study.sharing
    if sharing.is_cut:
        return (
            f"a cut model ({sharing.sharding}, tensor groups of {sharing.tensor_ranks}) brings {sharing.units} equal parts together and cuts their "
            "gradients again, in one micro batch a step; its own passes are those of one node, and what they take longer on more is communication"
        )
    sent = {"none": "", "powersgd": ", as two factors"}.get(sharing.compression, f", in {sharing.compression}")
    return f"gradients become ready evenly over the backward pass of one micro batch a step, and sending them{sent} does not slow it"


def _warnings(model: Model) -> list[str]:
    first, last = model.sizes[0].work, model.sizes[-1].work
    found = []
    drift = last.local_s / first.local_s - 1.0
    if cores := model.study.hardware.get("shared_cores"):
        found.append(
            f"all nodes shared the {cores} cores of one computer: projected are more nodes on the same cores, where ranks take turns, not a machine "
            "whose nodes have their own"
        )
    elif model.study.mode == "weak" and not model.study.sharing.is_cut and abs(drift) > _DRIFT:
        why = "they share something (cores, memory, disk)" if drift > 0 else "something else used the machine, or the sizes had other batches"
        found.append(
            f"a node's own work took {100 * abs(drift):.0f} % {'longer' if drift > 0 else 'less'} on {model.sizes[-1].nodes} nodes than on one: {why}, "
            "and the projection takes it to stay so"
        )
    unseen = fitting.unseen(model.fitted, model.sizes, model.manner, model.study.ranks_per_node)
    if unseen:
        found.append(
            f"the {' and the '.join(unseen)} of the links left no trace in the steps: reductions are hidden or tiny here, and may not be on more nodes"
        )
    return found
