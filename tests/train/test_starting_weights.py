"""Starting weights drawn one parameter at a time are those of a whole model, whatever way an architecture draws them, or it is told that it cannot be cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prottrans_hpc import architecture
from prottrans_hpc.comm import parameter_digest
from prottrans_hpc.errors import ConfigError
from prottrans_hpc.stage import find
from prottrans_hpc.train import starting_weights

HERE = Path(__file__).parent
TINY = {"prot_bert", "prot_albert", "prot_electra", "prot_t5", "prot_txl", "prot_xlnet", "protein_lm"}


def drawn(record: Any, shape: Any, seed: int) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    starting_weights.draw(record, shape, seed, found.__setitem__)
    return found


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_architecture_draws_the_same_bits(name: str) -> None:
    record = architecture.get(name)
    shape = record.size("tiny").shape
    whole = find(record.build)(shape)
    whole.initialise(11)
    found = drawn(record, shape, 11)
    assert list(found) == [name for name, _ in whole.named_parameters()]
    assert all(torch.equal(found[name], parameter) for name, parameter in whole.named_parameters())
    module = find(record.build)(shape)
    assert starting_weights.put_starting_weights(module, {}, record, shape, 11) == parameter_digest(whole) == parameter_digest(module)


class Odd(nn.Module):
    """Drawn in every way that torch knows, and with a buffer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.second = nn.Linear(24, 20), nn.Embedding(30, 6)
        self.register_buffer("counts", torch.zeros(5))

    def initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        nn.init.xavier_uniform_(self.first.weight, generator=generator)
        if self.how == "forgets one":
            return
        self.first.bias.data.uniform_(-1.0, 1.0, generator=generator)
        self.second.weight.data.normal_(0.0, 0.02, generator=generator)
        with torch.no_grad():
            self.second.weight[0].zero_()
            self.second.weight[1:3] *= 2.0
            if self.how == "comes back":
                self.first.weight.mul_(2.0)
            if self.how == "reads another":
                self.counts.copy_(self.first.bias[:5])
            self.counts += torch.arange(5.0) if self.how == "reads another" else self.counts.fill_(2.0)


def odd(how: str) -> Any:
    return replace(architecture.get("prot_bert"), name="odd", build=f"{__name__}:Odd")


def test_whatever_way_it_draws_the_bits_are_the_same() -> None:
    whole = Odd("well")
    whole.initialise(3)
    found = drawn(odd("well"), "well", 3)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {name: tensor.tolist() for name, tensor in whole.state_dict().items()}


@pytest.mark.parametrize(
    ("how", "said"),
    [("forgets one", "no value to counts, first.bias"), ("comes back", "comes back to first.weight"), ("reads another", "comes back to first.bias")],
)
def test_what_cannot_be_drawn_in_pieces_is_told(how: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"architecture odd cannot be cut over ranks: .*{said}"):
        drawn(odd(how), how, 3)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no Linux kernel that tells the peak of a process")
def test_a_rank_has_memory_for_its_pieces_only(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "start_memory.py"), "memory", str(tmp_path), "fsdp2xtp2"]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads((tmp_path / f"fsdp2xtp2-{rank}.json").read_text()) for rank in range(4)]
    assert reports[0]["whole"] > 0.9 * reports[0]["parameters"], "a whole model can be seen"
    for report in reports:
        assert report["pieces"] < 0.3 * report["parameters"]
        assert report["start"] < 0.7 * report["parameters"], "from whole weights it is 1.0"
        assert report["read"] < 0.5 * report["parameters"], "of a file of whole tensors"
