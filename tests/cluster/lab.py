"""Process 1 of a test cluster: a real Slurm in namespaces of its own. `conftest.py` starts it; it is of no use alone.

    unshare --net --uts --mount --pid --fork --mount-proc --kill-child python lab.py '{"folder": ..., "racks": {...}, "daemons": true}'

It makes a bridge, and for every node a network, host name, process space and /dev/shm of its own, and starts munged,
slurmctld and one slurmd a node. Then it obeys lines on standard input (`off n3`, `on n3`, `cut n3`, `join n3`,
`shape n3 RATE_MBIT`, `unshape n3`) and answers each with a line of JSON. When standard input ends, because pytest ended in whatever way, this process ends, and
the kernel ends everything in its process space: no daemon, mount or network outlives it. Standard library only.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HOME = Path("/run/slurm-lab")
"""On a tmpfs that this cluster alone sees: sockets, spool, state."""
NETWORK = "10.77"
CONTROLLER = f"{NETWORK}.255.1"
NODE_INIT = """
hostname "$1"
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
until ip link set eth0 up 2>/dev/null; do sleep 0.02; done
slurmd -D -N "$1" </dev/null >/dev/null 2>&1 &
# A node stays up when its slurmd dies, and takes in what its jobs leave behind.
while :; do wait -n 2>/dev/null || sleep 1; done
"""

SLURM_CONF = """
ClusterName=lab
SlurmctldHost=login({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# Without cred_expire a requeued job waits for 121 s instead of 11.
AuthInfo=socket={home}/munge.sock,cred_expire=10
CredType=cred/munge
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool/%n
# PMIx fails without a folder of its own on each node.
TmpFS={home}/tmp/%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
LogTimeFormat=iso8601_ms
# What works without systemd and cgroups.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE
# A node may claim more than this machine has.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1,max_switch_wait=3600
PriorityType=priority/basic
GresTypes=gpu
TopologyPlugin=topology/tree
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
# Long enough to save in on a busy machine (Slurm's default is 30).
KillWait=15
MinJobAge=600
InactiveLimit=0
# Failures are seen in seconds here, in minutes on a real machine.
SlurmctldTimeout=30
SlurmdTimeout=10
ReturnToService=2
TCPTimeout=2
MessageTimeout=10
BatchStartTimeout=60
CompleteWait=0
EpilogMsgTime=0
TreeWidth=65533
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.txt
{cloud}
# Summit's nodes.
NodeName=DEFAULT CPUs=42 Boards=1 SocketsPerBoard=2 CoresPerSocket=21 ThreadsPerCore=1 RealMemory=500000 Gres=gpu:v100:6 State={state}
{nodes}
PartitionName=DEFAULT Nodes=ALL MaxTime=24:00:00 DefaultTime=10 PreemptMode=REQUEUE
PartitionName=batch Default=YES PriorityTier=10
PartitionName=killable PriorityTier=1 GraceTime=20
PartitionName=killable_at_once PriorityTier=1 GraceTime=0
"""
CLOUD = (
    "ResumeProgram=/bin/true\nSuspendProgram=/bin/true\nSuspendTime=600\nSuspendTimeout=1\nResumeTimeout=600\nSuspendRate=0\nResumeRate=0\nPrivateData=cloud"
)
"""Nodes behind which nothing runs are schedulable all the same; sinfo shows them with PrivateData=cloud only."""


class Lab:
    """The daemons and the networks of a cluster."""

    def __init__(self, folder: Path, racks: dict[str, list[str]], daemons: bool) -> None:
        self.folder = folder
        self.racks = racks
        self.daemons = daemons
        self.names = [name for names in racks.values() for name in names]
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}

    def up(self) -> None:
        """Bring everything up; raises when a daemon does not come."""
        shell("mount --make-rprivate /", "mount -t tmpfs -o mode=755 tmpfs /run")
        # A file system that is mounted below /run/shared later is seen by all nodes.
        for name in ("etc", "state", "spool", "tmp", "dev"):
            (HOME / name).mkdir(parents=True)
        shell("mkdir /run/shared && mount -t tmpfs tmpfs /run/shared && mount --make-shared /run/shared")
        self.write_configuration()
        shell(f"mount --bind {HOME}/etc /etc/slurm", f"mount --bind {HOME}/hosts /etc/hosts", "hostname login", "ip link set lo up")
        shell("ip link add cluster type bridge", f"ip addr add {CONTROLLER}/16 dev cluster", "ip link set cluster up")
        self.start_munge()
        with (self.folder / "slurmctld.out").open("wb") as output:
            subprocess.Popen(["slurmctld", "-D"], stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        if self.daemons:
            for name in self.names:
                self.start(name)
        self.wait_idle(self.names)

    def write_configuration(self) -> None:
        """slurm.conf and what belongs to it; for nodes that do not exist no addresses."""
        address = {name: f"{NETWORK}.0.{number}" for number, name in enumerate(self.names, 1)} if self.daemons else {}
        lines = [f"NodeName={name} NodeAddr={address[name]} Feature={rack}" for rack, names in self.racks.items() for name in names if self.daemons]
        if not self.daemons:
            lines = [f"NodeName={','.join(names)} Feature={rack}" for rack, names in self.racks.items()]
        files = {
            "etc/slurm.conf": SLURM_CONF.format(
                controller=CONTROLLER,
                home=HOME,
                folder=self.folder,
                nodes="\n".join(lines),
                state="UNKNOWN" if self.daemons else "CLOUD",
                cloud="" if self.daemons else CLOUD,
            ),
            "etc/cgroup.conf": "CgroupPlugin=cgroup/v1\n",
            "etc/gres.conf": f"Name=gpu Type=v100 File={HOME}/dev/nvidia[0-5]\n",
            "etc/topology.conf": "".join(f"SwitchName={rack} Nodes={','.join(names)}\n" for rack, names in self.racks.items())
            + f"SwitchName=core Switches={','.join(self.racks)}\n",
            "hosts": "".join(f"{number} {name}\n" for name, number in {"localhost": "127.0.0.1", "login": CONTROLLER, **address}.items()),
        }
        for name, text in files.items():
            (HOME / name).write_text(text)
        for number in range(6):
            (HOME / "dev" / f"nvidia{number}").symlink_to("/dev/null")  # regular files would be complained about
        for name in self.names:
            (HOME / "tmp" / name).mkdir()

    def start_munge(self) -> None:
        """The authentication daemon, with a key of this cluster's own."""
        (HOME / "munge.key").write_bytes(os.urandom(128))
        (HOME / "munge.key").chmod(0o600)
        files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid", "seed-file": "munge.seed"}
        options = [f"--{option}={HOME}/{name}" for option, name in files.items()]
        subprocess.Popen(["munged", "--foreground", "--force", *options, f"--log-file={HOME}/munged.log", "--num-threads=2"], stderr=subprocess.DEVNULL)
        wait((HOME / "munge.sock").exists, "munged does not start")

    def start(self, name: str) -> None:
        """Power a node on."""
        space = ["--net", "--uts", "--mount", "--propagation", "unchanged", "--pid", "--fork", "--mount-proc", "--kill-child"]
        # In front of the node's own /proc: with propagation unchanged it is mounted into private mounts only.
        node = subprocess.Popen(["unshare", *space, "bash", "-c", NODE_INIT, "node", name], stdin=subprocess.DEVNULL)
        self.nodes[name] = node
        here = os.readlink("/proc/self/ns/net")
        wait(lambda: os.readlink(f"/proc/{node.pid}/ns/net") != here, f"{name} gets no network of its own")
        number = self.names.index(name) + 1
        shell(
            f"ip link add to-{name} type veth peer name eth0 netns {node.pid}",
            f"ip link set to-{name} master cluster up",
            f"nsenter --target {node.pid} --net ip addr add {NETWORK}.0.{number}/16 dev eth0",
        )

    def off(self, name: str) -> None:
        """Cut a node's power: all of its processes get SIGKILL."""
        node = self.nodes.pop(name)
        node.kill()  # --kill-child: process 1 of the node goes with it, and the rest with that
        node.wait()
        subprocess.run(["ip", "link", "del", f"to-{name}"], check=False, stderr=subprocess.DEVNULL)  # it may be gone with its peer

    def wait_idle(self, names: list[str]) -> None:
        """Wait until Slurm can use all of these nodes."""

        def idle() -> bool:
            # A node that does not exist is idle and powered down: Slurm calls it idle~.
            done = subprocess.run(["sinfo", "-h", "-N", "-p", "batch", "-o", "%N %t"], capture_output=True, text=True, timeout=30, check=False)
            return set(names) <= {name for name, state in map(str.split, done.stdout.splitlines()) if state in ("idle", "idle~")}

        wait(idle, f"not all of {names[:8]} ... become idle")

    def shape(self, name: str, rate_mbit: float) -> None:
        """Limit what goes into a node and what comes out of it, each on its own: a token bucket, which tells nothing of latency."""
        # The bucket must hold what a timer tick lets through and a whole offloaded packet of 64 KiB; who waits longer than the queue is dropped.
        bucket = f"tbf rate {rate_mbit}mbit burst {max(65536 + 1514, int(rate_mbit * 1e6 / 8 / 250))} limit {1 << 20}"
        shell(
            f"tc qdisc replace dev to-{name} root {bucket}",
            f"nsenter --target {self.nodes[name].pid} --net tc qdisc replace dev eth0 root {bucket}",
        )

    def unshape(self, name: str) -> None:
        """Full speed again; a link that has no limit stays as it is."""
        for line in (f"tc qdisc del dev to-{name} root", f"nsenter --target {self.nodes[name].pid} --net tc qdisc del dev eth0 root"):
            subprocess.run(["bash", "-c", line], check=False, capture_output=True, stdin=subprocess.DEVNULL)

    def obey(self, order: str, name: str, *values: str) -> None:
        """One order of the tests."""
        if order == "off":
            self.off(name)
        elif order == "on":
            self.start(name)
            self.wait_idle([name])
        elif order == "cut":
            shell(f"ip link set to-{name} down")
        elif order == "join":
            shell(f"ip link set to-{name} up")
            wait(lambda: answers(name), f"{name} is not reached over its link")  # the bridge forwards to it a moment later only
        elif order == "shape":
            self.shape(name, float(values[0]))
        elif order == "unshape":
            self.unshape(name)
        else:
            raise RuntimeError(f"no order {order!r}")

    def reap(self) -> None:
        """Collect what was orphaned in this process space; the nodes are waited for by themselves."""
        while True:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is None or found.si_pid in (node.pid for node in self.nodes.values()):
                return
            os.waitpid(found.si_pid, 0)


def shell(*lines: str) -> None:
    """Run commands; raises with what one of them said when it fails."""
    for line in lines:
        done = subprocess.run(["bash", "-c", line], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{line}: {done.stderr.strip()}")


def answers(name: str) -> bool:
    """Whether a node says anything to who knocks where its slurmd listens, be it a refusal."""
    try:
        socket.create_connection((name, 6818), timeout=1).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True


def wait(condition: Any, what: str, timeout_s: float = 150) -> None:
    """Wait for something; raises with `what` when it does not come."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(what)
        time.sleep(0.05)


def main() -> None:
    """Bring the cluster up, then obey until standard input ends."""
    values = json.loads(sys.argv[1])
    lab = Lab(Path(values["folder"]), values["racks"], values["daemons"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then closes our standard input
    try:
        lab.up()
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    answer(told(lab))
    while True:
        readable, _, _ = select.select([0], [], [], 1.0)
        lab.reap()
        if not readable:
            continue
        line = os.read(0, 4096).decode()  # one order at a time, each answered before the next
        if not line:
            return
        try:
            lab.obey(*line.split())
            answer(told(lab))
        except Exception as error:
            answer({"error": f"{line.strip()}: {type(error).__name__}: {error}"})


def told(lab: Lab) -> dict[str, Any]:
    """Where the nodes are: the process, as numbered in this process space, that holds each one's namespaces."""
    return {"nodes": {name: node.pid for name, node in lab.nodes.items()}}


def answer(values: dict[str, Any]) -> None:
    """Say something to the tests."""
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
