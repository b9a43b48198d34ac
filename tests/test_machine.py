"""Machine profiles and allocations."""

from __future__ import annotations

import os
import re
import tomllib

import pytest

from prottrans_hpc import config, machine
from prottrans_hpc.errors import ConfigError

LAPTOP = {
    "name": "m",
    "description": "d",
    "scheduler": "local",
    "starter": "processes",
    "ranks_per_node": 1,
    "max_nodes": 4,
    "node": {"num_cpu_cores": 8},
}


@pytest.mark.parametrize("name", config.shipped_names("hpc"))
def test_every_shipped_profile_reads_and_is_named_as_its_file(name):
    profile = machine.read_machine(name)
    assert profile.name == name
    assert profile.description


def test_a_profile_is_read_by_path(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(config.find_file("hpc", "laptop").read_text().replace('"laptop"', '"mine"'))
    assert machine.read_machine(str(path)).name == "mine"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ranks_per_node": 0}, "ranks_per_node = 0"),
        ({"max_nodes": 0}, "max_nodes = 0"),
        ({"scheduler": "cron"}, "scheduler = 'cron'"),
        ({"starter": "ssh"}, "starter = 'ssh'"),
        ({"node": {"num_cpu_cores": -1}}, "node.num_cpu_cores = -1"),
        ({"node": {"num_cpu_cores": 8, "num_gpus": 2}}, "[node.gpu] section belong together"),
        ({"node": {"num_cpu_cores": 8, "gpu": {"name": "g", "memory_gib": 1.0, "peak_tflops": {}}}}, "belong together"),
        ({"node": {"num_cpu_cores": 8, "num_gpus": 1, "gpu": {"name": "g", "memory_gib": 0.0, "peak_tflops": {}}}}, "memory_gib = 0.0"),
        ({"node": {"num_cpu_cores": 8, "num_gpus": 1, "gpu": {"name": "g", "memory_gib": 1.0, "peak_tflops": {"fp32": -1.0}}}}, "fp32 = -1.0"),
        ({"network": {"between_nodes": {"latency_s": 0.0, "bytes_per_s": 1e9}}}, "network.between_nodes.latency_s = 0.0"),
        ({"network": {"within_node": {"latency_s": 1e-6, "bytes_per_s": 1e9}}}, "missing key network.between_nodes"),
        ({"nodes": 3}, "unknown key nodes (did you mean 'node'?)"),
    ],
)
def test_a_profile_that_cannot_be_is_refused(change, said):
    with pytest.raises(ConfigError) as caught:
        config.parse(machine.Machine, LAPTOP | change, source="m.toml")
    assert said in str(caught.value)


def test_an_allocation_counts_its_ranks():
    assert machine.Allocation(num_nodes=3, ranks_per_node=4, cpu_cores_per_rank=1, gpus_per_rank=0).num_ranks == 12


def test_zero_cores_means_what_this_process_may_use():
    assert machine.usable_cpu_cores(machine.Node(num_cpu_cores=0)) == len(os.sched_getaffinity(0))
    assert machine.usable_cpu_cores(machine.Node(num_cpu_cores=42)) == 42


@pytest.mark.parametrize("noun", [machine.Machine, machine.Node, machine.Gpu, machine.Queue, machine.Bin, machine.Licence, machine.Network, machine.Link])
def test_every_key_of_a_profile_is_documented(repository, noun):
    readme = (repository / "hpc" / "README.md").read_text(encoding="utf-8")
    keys = {"node": "[node]", "network": "[network]", "gpu": "[node.gpu]", "queues": "[[queues]]", "licences": "[[licences]]"}
    assert [name for name in noun.__dataclass_fields__ if f"| `{keys.get(name, name)}` |" not in readme] == []


def test_the_example_profile_of_the_documentation_reads(repository):
    example = re.search(r"```toml\n(.*?)```", (repository / "hpc" / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert example
    assert config.parse(machine.Machine, tomllib.loads(example[1]), source="hpc/README.md").node.num_gpus == 2
