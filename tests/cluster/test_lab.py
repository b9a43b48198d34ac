"""The test cluster itself: what the other tests rely on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from prottrans_hpc.launch.job_state import State

if TYPE_CHECKING:
    from .conftest import Cluster


def test_a_job_runs_on_nodes_of_their_own(cluster: Cluster) -> None:
    told = cluster.run("srun", "--nodes=8", "bash", "-c", 'echo "$(hostname) $SLURM_TOPOLOGY_ADDR $(ls /proc/[0-9]*/comm | wc -l)"').stdout.split("\n")
    places = sorted(line.split()[:2] for line in told if line)
    assert places == [[name, f"core.{rack}.{name}"] for rack, names in cluster.racks.items() for name in names]


def test_a_node_without_power_takes_its_job_along_and_comes_back(cluster: Cluster) -> None:
    # Not srun: it would see n4 go, and fail, before Slurm does.
    job_id = cluster.submit("#!/bin/bash\nsleep 100\n", "--nodes=2", "--nodelist=n3,n4", "--no-requeue")
    cluster.wait_running(job_id)
    cluster.off("n4")
    cluster.run("scontrol", "update", "nodename=n4", "state=down", "reason=test")  # Slurm would see it after half a minute
    assert cluster.wait_ended(job_id) == State.NODE_LOST
    cluster.on("n4")
    assert cluster.run("srun", "--nodelist=n4", "hostname").stdout == "n4\n"


def test_a_cut_link_leaves_the_processes_alone(cluster: Cluster) -> None:
    cluster.cut("n5")
    assert cluster.run("bash", "-c", "exec 3<>/dev/tcp/n5/6818", timeout_s=1, code=None).returncode != 0
    assert "slurmd" in cluster.run("bash", "-c", "cat /proc/[0-9]*/comm", node="n5").stdout
    cluster.join("n5")
    assert cluster.run("srun", "--nodelist=n5", "hostname").stdout == "n5\n"


SEND = """
import socket, sys, time
if sys.argv[1] == "listen":
    server = socket.create_server(("", 7999))
    print("ready", flush=True)
    peer = server.accept()[0]
    while peer.recv(1 << 16):
        pass
else:
    began = time.monotonic()
    with socket.create_connection((sys.argv[1], 7999)) as peer:
        peer.sendall(bytes(4 << 20))
        peer.shutdown(socket.SHUT_WR)
        peer.recv(1)
    print(time.monotonic() - began)
"""


def send_4_mib(cluster: Cluster, sender: str, receiver: str) -> float:
    """Seconds that it takes."""
    listener = cluster.popen(sys.executable, "-c", SEND, "listen", node=receiver)
    assert listener.stdout
    assert listener.stdout.readline() == "ready\n"
    took = float(cluster.run(sys.executable, "-c", SEND, receiver, node=sender).stdout)
    listener.communicate(timeout=60)
    return took


def test_a_shaped_link_is_slow_both_ways_and_only_it(cluster: Cluster) -> None:
    cluster.shape("n3", 32)
    before = cluster.link_bytes("n3")
    least_s = 4 * 8 / 32 / 2  # half of the rate's, for what the bucket lets through at once
    assert send_4_mib(cluster, "n3", "n4") > least_s
    assert send_4_mib(cluster, "n4", "n3") > least_s
    came, went = (after - old for after, old in zip(cluster.link_bytes("n3"), before, strict=True))
    assert 4 << 20 <= came < 5 << 20
    assert 4 << 20 <= went < 5 << 20
    assert "tbf" not in cluster.run("tc", "qdisc", "show", "dev", "eth0", node="n4").stdout
    cluster.unshape("n3")
    assert "tbf" not in cluster.run("tc", "qdisc", "show", "dev", "eth0", node="n3").stdout
    assert "tbf" not in cluster.run("tc", "qdisc", "show", "dev", "to-n3").stdout


HOLDER = """
import importlib.util, json, os, pathlib, sys, time
spec = importlib.util.spec_from_file_location("cluster_conftest", sys.argv[1])
conftest = sys.modules["cluster_conftest"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(conftest)
with conftest.running(pathlib.Path(sys.argv[2]), {"rack0": ["n1", "n2"]}, daemons=True) as cluster:
    cluster.submit("#!/bin/bash\\nsrun sleep 1000\\n", "--nodes=2")
    print(json.dumps(os.stat(f"/proc/{cluster.unshare.pid}/ns/pid_for_children").st_ino), flush=True)
    time.sleep(600)
"""


def test_nothing_outlives_a_pytest_that_is_killed(cluster: Cluster, tmp_path: Path) -> None:
    conftest = Path(__file__).with_name("conftest.py")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(conftest), str(tmp_path)], stdout=subprocess.PIPE, env=cluster.environment())
    assert holder.stdout
    space = json.loads(holder.stdout.readline())
    assert spaces().count(space) > 3, "munged, slurmctld and what waits for the nodes"
    holder.kill()
    holder.communicate()
    cluster.wait(lambda: space not in spaces(), "the other cluster's processes to be gone", 20)


def spaces() -> list[int]:
    """The process space of every process of this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/ns/pid"):
        try:
            found.append(os.stat(path).st_ino)
        except OSError:  # it has ended
            continue
    return found
