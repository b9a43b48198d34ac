"""Ranks that hold parts of tensors, as torch cuts them: shard_gang.py SCENARIO FOLDER [ARGUMENT]. What a test asserts on lies in FOLDER afterwards.

One process imports torch and forks the ranks; they form one gang after another, a gang a layout.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo  # DTensor imports it at its first use, which every forked rank would have to do
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from prottrans_hpc import errors
from prottrans_hpc.comm_torch import TorchComm
from prottrans_hpc.rank import RankContext
from prottrans_hpc.recipe import Checkpointing
from prottrans_hpc.recipe_optimizers import Adafactor, Adam, AdamW, Lamb
from prottrans_hpc.run_dir import RunDir
from prottrans_hpc.train import checkpoint, host_optimizer, optim, pieces, precision, resume, tensor_file
from prottrans_hpc.train.saving import SaveError, Saver

# Odd sizes, fewer rows than ranks, a stack of matrices, and a tensor that LAMB must leave to a ratio of 1.
SHAPES = {"dense.weight": (37, 54), "dense.bias": (37,), "few.weight": (3, 16), "one.bias": (1,), "stack.weight": (5, 6, 8), "zero.weight": (4, 6)}
OPTIMIZERS = {
    "lamb": Lamb(learning_rate=1e-2, weight_decay=0.01),
    "adamw": AdamW(learning_rate=1e-2, weight_decay=0.1),
    "adam": Adam(learning_rate=1e-2, weight_decay=0.1),
    "adafactor": Adafactor(learning_rate=1e-2, weight_decay=0.01),
}
STEPS = 6
DEVICE = torch.device(os.environ.get("SHARD_DEVICE", "cpu"))


class Net(nn.Module):
    """Parameters of all shapes under dotted names, and a buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in SHAPES.items():
            layer, _, kind = name.partition(".")
            if not hasattr(self, layer):
                self.add_module(layer, nn.Module())
            value = torch.zeros(shape) if layer == "zero" else torch.randn(shape, generator=generator) * 0.05
            getattr(self, layer).register_parameter(kind, nn.Parameter(value))
        self.register_buffer("counts", torch.arange(seed, seed + 4))


def plain(net: Net) -> None:
    """Every rank holds everything."""


def sharded(net: Net) -> None:
    fully_shard(net, mesh=init_device_mesh(DEVICE.type, (dist.get_world_size(),)))


def hybrid(net: Net) -> None:
    fully_shard(net, mesh=init_device_mesh(DEVICE.type, (2, dist.get_world_size() // 2), mesh_dim_names=("replicas", "shards")))


def tensor_parallel(net: Net) -> None:
    cut_products(net, init_device_mesh(DEVICE.type, (dist.get_world_size(),)))


def sharded_products(net: Net) -> None:
    mesh = init_device_mesh(DEVICE.type, (2, 2), mesh_dim_names=("shards", "tensor"))
    cut_products(net, mesh["tensor"])
    fully_shard(net, mesh=mesh["shards"])


def cut_products(net: Net, mesh: Any) -> None:
    """By columns, by rows, whole on each rank; what is not named stays a plain tensor."""
    cuts: dict[str, Placement] = {"dense.weight": Shard(0), "dense.bias": Shard(0), "few.weight": Shard(1), "zero.weight": Replicate()}
    for name, placement in cuts.items():
        layer, _, kind = name.partition(".")
        whole = getattr(getattr(net, layer), kind).detach()
        getattr(net, layer).register_parameter(kind, nn.Parameter(distribute_tensor(whole, mesh, [placement])))


LAYOUTS: dict[str, tuple[int, Callable[[Net], None]]] = {
    "one": (1, plain),
    "ddp3": (3, plain),
    "fsdp1": (1, sharded),
    "fsdp2": (2, sharded),
    "fsdp4": (4, sharded),
    "hybrid2x2": (4, hybrid),
    "tp2": (2, tensor_parallel),
    "fsdp2xtp2": (4, sharded_products),
}


def set_gradients(net: Net, step: int) -> None:
    """Sums over ranks, as they are after a backward pass."""
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in net.parameters():
        whole = torch.randn(parameter.shape, generator=generator) * 10.0 ** ((step % 4) - 3)
        parameter.grad = pieces.wrap(pieces.cut_out(whole, parameter).to(DEVICE, copy=True), parameter)


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """By torch's own gathering, not by ours."""
    return {name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone() for name, tensor in tensors.items()}


def build(layout: str, seed: int) -> Net:
    net = Net(seed).to(DEVICE)
    LAYOUTS[layout][1](net)
    return net


def train(folder: Path, layout: str, comm: Any) -> None:
    """Some steps of every optimizer, with clipping; leaves weights and state whole, and the norms with every bit."""
    for name, chosen in OPTIMIZERS.items():
        net, norms = build(layout, 0), []
        optimizer = optim.build_optimizer(net.named_parameters(), chosen, comm.all_reduce_sum)
        for step in range(STEPS):
            set_gradients(net, step)
            scale = optim.measure_gradients(net.parameters(), scale=0.5, max_norm=1.0, sum_over_ranks=comm.all_reduce_sum)
            norms.append(scale.norm.hex())
            optimizer.step(1e-2 / (1 + step), scale.factor)
        found = whole(dict(net.named_parameters())) | whole(dict(optimizer.state_dict()))
        save_file(found, folder / f"{layout}-{name}-{comm.rank}.safetensors")
        (folder / f"{layout}-{name}-{comm.rank}.json").write_text(json.dumps(norms))


def build_on_host(net: Net, chosen: Any, comm: Any) -> host_optimizer.HostOptimizer:
    """The optimizer of `memory.optimizer_on = "host"`, in groups of a few tensors."""
    return host_optimizer.HostOptimizer(
        dict(net.named_parameters()), {}, lambda weights: optim.build_optimizer(weights.items(), chosen, comm.all_reduce_sum), group_parameters=100
    )


def on_host(folder: Path, layout: str, comm: Any) -> None:
    """The same steps with the optimizer on the device, on the host, and on the host after three of them: the same bits. Adafactor's sums over more
    than two ranks may be added in another order, as they travel in other company."""
    for chosen in OPTIMIZERS.values():
        nets = [build(layout, 0) for _ in range(3)]
        usual = optim.build_optimizer(nets[0].named_parameters(), chosen, comm.all_reduce_sum)
        ours, later = (build_on_host(net, chosen, comm) for net in nets[1:])
        assert len(ours._groups) > 2
        for step in range(STEPS):
            if step == 3:
                fill(nets[2], later, 9)
                precision.put_weights(nets[2], {}, dict(nets[0].state_dict()))
                later.load_state_dict({name: tensor.clone() for name, tensor in usual.state_dict().items()})
            for net, optimizer in zip(nets, (usual, ours, later), strict=True):
                set_gradients(net, step)
                optimizer.step(1e-2 / (1 + step), 0.5)
        expected = whole(dict(nets[0].named_parameters())) | whole(dict(usual.state_dict()))
        for net, optimizer in zip(nets[1:], (ours, later), strict=True):
            found = whole(dict(net.named_parameters())) | {name: whole_of_host(tensor) for name, tensor in optimizer.state_dict().items()}
            assert found.keys() == expected.keys()
            tolerance = {"rtol": 3e-6, "atol": 3e-9} if chosen.name == "adafactor" else {"rtol": 0.0, "atol": 0.0}
            for name, tensor in expected.items():
                torch.testing.assert_close(found[name].cpu(), tensor.cpu(), **tolerance, msg=lambda text, what=f"{chosen.name} {name}": f"{what}: {text}")


def whole_of_host(tensor: Tensor) -> Tensor:
    """Of a tensor on the host that is cut like one on the device."""
    back = pieces.elsewhere(pieces.local(tensor).to(DEVICE), tensor)
    return back.full_tensor() if isinstance(back, DTensor) else back


def state_of(net: Net, optimizer: Any) -> dict[str, dict[str, Tensor]]:
    return {"model": dict(net.state_dict()), "optimizer": dict(optimizer.state_dict())}


def value_of(name: str, like: Tensor, seed: int) -> Tensor:
    """The whole tensor of this name that a seed gives."""
    generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
    return torch.randn(like.shape, generator=generator).mul(1000).to(like.dtype)


@torch.no_grad()
def fill(net: Net, optimizer: Any, seed: int) -> None:
    """Other numbers in every tensor."""
    for group in state_of(net, optimizer).values():
        for name, tensor in group.items():
            pieces.local(tensor).copy_(pieces.cut_out(value_of(name, tensor, seed), tensor))


def save(folder: Path, layout: str, comm: Any) -> None:
    """A checkpoint of step 1 in FOLDER/layout, and on top of it one of step 2."""
    run = RunDir(folder / layout)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    net = build(layout, 0)
    optimizer = optim.build_optimizer(net.named_parameters(), OPTIMIZERS["lamb"], comm.all_reduce_sum)
    saver = Saver(run, comm, Checkpointing(every_steps=1, keep_last=2), start_id="start")
    for step in (1, 2):
        fill(net, optimizer, step)
        saver.stage(step, {"format": checkpoint.FORMAT, "run_id": "r", "step": step, "identity": {}}, state_of(net, optimizer))
        saver.start()
        if layout == "one":
            tensors = {f"{kind}/{name}": value_of(name, tensor, step) for kind, group in state_of(net, optimizer).items() for name, tensor in group.items()}
            save_file(tensors, folder / f"expected-{step}.safetensors")
    saver.drain()


def load(folder: Path, layout: str, comm: Any) -> None:
    """What a rank finds in each checkpoint of step 1, or why it cannot take it, and which files it opened."""
    for source in sorted(path.name for path in folder.iterdir() if path.is_dir()):
        net = build(layout, 7)
        optimizer = optim.build_optimizer(net.named_parameters(), OPTIMIZERS["lamb"], comm.all_reduce_sum)
        result: dict[str, Any] = {"opened": []}
        with noting_reads(result["opened"]):
            try:
                found = checkpoint.read_checkpoint(RunDir(folder / source).checkpoint(1), own=state_of(net, optimizer))
                precision.put_weights(net, {}, found.model)
                optimizer.load_state_dict(found.optimizer)
            except (errors.CheckpointError, RuntimeError) as error:
                result["error"] = str(error)
        if comm.all_reduce_sum(torch.tensor([float("error" in result)])).item() == 0.0:
            tensors = {f"{kind}/{name}": tensor for kind, group in state_of(net, optimizer).items() for name, tensor in whole(group).items()}
            save_file(tensors, folder / f"{source}-as-{layout}-{comm.rank}.safetensors")
        (folder / f"{source}-as-{layout}-{comm.rank}.json").write_text(json.dumps(result))


def full_disk(folder: Path, layout: str, comm: Any) -> None:
    """A save, and another whose last rank has no room for its pieces; leaves what each rank is told."""

    def refuse(self: tensor_file.Staging, path: Path, *_: object) -> tensor_file.Written:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    run, net = RunDir(folder / layout), build(layout, 0)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    saver = Saver(run, comm, Checkpointing(every_steps=1, keep_last=2), start_id="start")
    try:
        for step in (1, 2):
            if step == 2 and comm.rank == comm.world_size - 1:
                tensor_file.Staging.write = refuse  # type: ignore[method-assign]
            content = {"model": dict(net.state_dict()), "optimizer": {}}
            saver.stage(step, {"format": checkpoint.FORMAT, "run_id": "r", "step": step, "identity": {}}, content)
            saver.start()
            saver.drain()
    except (OSError, SaveError) as error:
        (folder / f"told-{comm.rank}.json").write_text(json.dumps({"code": errors.exit_code(error), "text": str(error)}))


def begin_again(folder: Path, layout: str, comm: Any) -> None:
    """The state before the first step, put into a model that has been trained: whether all of it is there."""
    net, fresh = build(layout, 0), Net(3)
    for chosen in OPTIMIZERS.values():
        optimizer = optim.build_optimizer(net.named_parameters(), chosen, comm.all_reduce_sum)
        fill(net, optimizer, 5)
        precision.put_weights(net, {}, {name: pieces.cut_out(fresh.state_dict()[name], like) for name, like in net.state_dict().items()})
        resume.forget_moments(SimpleNamespace(optimizer=optimizer))
        assert all(torch.equal(tensor, fresh.state_dict()[name]) for name, tensor in whole(dict(net.state_dict())).items())
        assert not any(tensor.any() for tensor in whole(dict(optimizer.state_dict())).values())


@contextlib.contextmanager
def noting_reads(opened: list[str]) -> Iterator[None]:
    """Put the names of the tensor files that are read in here into `opened`."""
    real = {name: getattr(tensor_file, name) for name in ("read", "read_each")}

    def noting(name: str) -> Callable[..., Any]:
        def read(path: Path, *, sha256: str) -> Any:
            opened.append(path.name)
            return real[name](path, sha256=sha256)

        return read

    for name in real:
        setattr(tensor_file, name, noting(name))
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(tensor_file, name, function)


SCENARIOS: dict[str, Callable[[Path, str, Any], None]] = {
    "train": train,
    "save": save,
    "load": load,
    "on host": on_host,
    "begin again": begin_again,
    "full disk": full_disk,
}


def run_rank(rank: int, scenario: str, folder: Path, layouts: list[str]) -> None:
    """This process as one rank of each gang that is large enough to have it, one after another."""
    for layout in layouts:
        num_ranks = LAYOUTS[layout][0]
        if rank >= num_ranks:
            continue
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo",
            init_method=f"file://{folder}/.meet-{scenario}-{layout}",
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=60),
        )
        context = RankContext(rank, num_ranks, rank, num_ranks, 0, 1, "localhost", "none")
        SCENARIOS[scenario](folder, layout, TorchComm(context, DEVICE, 60))
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    scenario, folder, layouts = sys.argv[1], Path(sys.argv[2]), sys.argv[3].split(",")
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    ranks = {start_rank(rank, scenario, folder, layouts) for rank in range(max(LAYOUTS[layout][0] for layout in layouts))}
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if status:  # the others would wait for it
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)


def start_rank(rank: int, scenario: str, folder: Path, layouts: list[str]) -> int:
    """A forked rank's process id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        run_rank(rank, scenario, folder, layouts)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
