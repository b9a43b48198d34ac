"""What the tests of reductions run as ranks: `reduction_work.py SCENARIO,... SETTINGS OUT [RANKS_A_NODE]`. Each rank leaves OUT/<rank>.json.

RANKS_A_NODE is for starters that put all ranks on one host: so many neighbours pass for a node.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import torch
from rank_work import gradients, net, samples, take_step

from prottrans_hpc import comm, errors, rank
from prottrans_hpc.recipe_parallel import Parallel


def whole(step, factor=1.0):
    """The exact gradients of a step, from all of its samples."""
    module = net(seed=0, dtype=torch.float64)
    (module(samples(step, torch.float64)) * factor).backward()
    return gradients(module)


def relative_error(found, exact):
    """Of the gradient that is furthest off."""
    return max(float((found[name].double().cpu() - exact[name]).norm() / exact[name].norm()) for name in exact)


def digest(found):
    return hashlib.sha256(b"".join(found[name].cpu().numpy().tobytes() for name in sorted(found))).hexdigest()


def third_step(ranks, first):
    """Digest of the gradients of step 3 in a start that begins with step `first`, and the module."""
    module = net(seed=0).to(ranks.device)
    model = ranks.parallel(module, 1)
    for step in range(first, 4):
        take_step(model, ranks, step)
    return digest(gradients(module)), gradients(module)


def sums(ranks):
    """Step 3 as the third of a start, as the first of another, and once more; how far from the exact one it is."""
    straight, found = third_step(ranks, 1)
    resumed, again = third_step(ranks, 3)[0], third_step(ranks, 3)[0]
    return {"straight": straight, "resumed": resumed, "again": again, "error": relative_error(found, whole(3))}


def scales(ranks):
    """Gradients far beyond the range of fp16, and far below it."""
    if ranks.settings.compression != "fp16":
        return None
    found = {}
    for factor in (2.0**40, 2.0**-60):
        module = net(seed=0)
        model = ranks.parallel(module, 1)
        model.zero_gradients()
        model.backward(model.module(samples(1)[ranks.rank :: ranks.world_size].to(ranks.device)) * factor)
        model.finish_gradients()
        found[str(factor)] = relative_error(gradients(module), whole(1, factor))
    return found


def poisoned(ranks):
    """An undefined number on one rank reaches all ranks, and no later step."""
    module = net(seed=0).to(ranks.device)
    model = ranks.parallel(module, 1)
    states = []
    for step in (1, 2, 3):
        model.zero_gradients()
        own = samples(step)[ranks.rank :: ranks.world_size].to(ranks.device)
        model.backward(model.module(own * float("nan") if step == 2 and ranks.rank == 1 else own))
        model.finish_gradients()
        states.append(all(bool(gradient.isfinite().all()) for gradient in gradients(module).values()))
    return {"finite": states, "digest": digest(gradients(module))}


def feedback(ranks):
    """The same gradients step after step: what was left out of one comes with the next ones, so their mean comes nearer."""
    if ranks.settings.compression != "powersgd":
        return None
    module = net(seed=0).to(ranks.device)
    model = ranks.parallel(module, 1)
    exact, errors_of_mean = whole(1), []
    total = {name: torch.zeros_like(value) for name, value in exact.items()}
    for count in range(1, 25):
        take_step(model, ranks, 1)
        for name, gradient in gradients(module).items():
            total[name] += gradient.cpu()
        errors_of_mean.append(relative_error({name: value / count for name, value in total.items()}, exact))
    return {"errors": errors_of_mean}


def killed(ranks, fate=signal.SIGKILL):
    """Steps for ever; the last rank meets its fate half a second into them."""
    model = ranks.parallel(net(seed=0).to(ranks.device), 1)
    for step in range(10**9):
        take_step(model, ranks, step)
        if step == 2 and ranks.rank == ranks.world_size - 1:
            threading.Timer(0.5, os.kill, (os.getpid(), fate)).start()


def stopped(ranks):
    """The same with a rank that hangs."""
    killed(ranks, signal.SIGSTOP)


def forgotten(ranks):
    """Step 3 after two others and `forget`, which is what a return to a checkpoint within the process does."""
    module = net(seed=0).to(ranks.device)
    model = ranks.parallel(module, 1)
    for step in (1, 2):
        take_step(model, ranks, step)
    model.forget()
    take_step(model, ranks, 3)
    return digest(gradients(module))


def late(ranks):
    """The last rank's gradients of the first bucket come last: its buckets are full in another order than the others'."""
    module = net(seed=0).to(ranks.device)
    model = ranks.parallel(module, 1)
    model.zero_gradients()
    own = samples(3)[ranks.rank :: ranks.world_size].to(ranks.device)
    if ranks.rank == ranks.world_size - 1:
        with model.no_sync():
            model.backward(model.module(own))
        model.backward(sum(parameter.flatten()[0] * 0.0 for parameter in module.hidden.parameters()))
    else:
        model.backward(model.module(own))
    model.finish_gradients()
    return {"error": relative_error(gradients(module), whole(3)), "digest": digest(gradients(module))}


SCENARIOS = {function.__name__: function for function in (sums, scales, poisoned, feedback, killed, stopped, forgotten, late)}


def gangs(settings, context, out):
    """A gang with each setting; Horovod can be started once only."""
    ranks = None
    for name, setting in settings.items():
        meeting = out / f"meeting-{name}"
        meeting.mkdir(exist_ok=True)
        parallel = Parallel(**({"timeout_s": 60} | setting))
        if ranks is not None and ranks.name == "horovod":
            ranks.settings = parallel
        else:
            ranks = comm.open_comm(parallel, context, run_dir=meeting)
        yield name, ranks
        if ranks.name != "horovod":
            ranks.close()
    if ranks.name == "horovod":
        ranks.close()


def detect():
    context = rank.detect(os.environ)
    if len(sys.argv) < 5:
        return context
    mates = int(sys.argv[4])
    nodes = context.world_size // mates
    return replace(context, local_rank=context.rank % mates, local_world_size=mates, node_rank=context.rank // mates, num_nodes=nodes)


def main():
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    scenarios, settings, out = sys.argv[1].split(","), json.loads(sys.argv[2]), Path(sys.argv[3])
    context = detect()
    report = {"rank": context.rank}
    try:
        for name, ranks in gangs(settings, context, out):
            report[name] = {scenario: SCENARIOS[scenario](ranks) for scenario in scenarios}
    except errors.ProttransError as error:
        report |= {"error": type(error).__name__, "message": str(error)}
        (out / f"{context.rank}.json").write_text(json.dumps(report))
        os._exit(error.exit_code)  # as prottrans_hpc.__main__ does
    (out / f"{context.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
