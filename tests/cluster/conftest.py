"""A real Slurm cluster for the tests: slurmctld and eight slurmd, each node with its own network, host name, processes and /dev/shm.

    def test_something(cluster: Cluster, tmp_path: Path) -> None:
        done = cluster.prottrans("pretrain", "tiny_prot_bert", "--corpus", str(corpus), "--machine", str(profile), "--nodes", "2")
        job_id = cluster.job_ids(run_dir)[0]
        assert cluster.wait_ended(job_id) == State.DONE

`cluster` is one cluster a session (and pytest-xdist worker), handed to each test without jobs and with all nodes up.
Nodes n1..n4 are in rack0, n5..n8 in rack1; each claims what one of Summit's has: 42 cores, 6 GPUs (which are not there).
Partitions: batch (the default), and below it killable (20 s of grace when it is preempted) and killable_at_once (none).
The file system is that of this machine and plays the parallel one; /run and /dev/shm are not shared with it.

    cluster.run("sinfo", timeout_s=20, node=None, code=0, env={}, cwd=None, stdin=None)   a command on the login node, or on `node`
    cluster.popen("prottrans", ...)              the same, not waited for
    cluster.python("-c", "...")                  this interpreter there;  cluster.prottrans(...)  the command line
    cluster.submit(script, *options) -> job_id   sbatch of a script's text;  cluster.state(job_id) -> State
    cluster.wait_ended(job_id) -> State          also wait_running(job_id), wait(condition, what, timeout_s)
    cluster.job_ids(run_dir) -> list[str]        what job.json says
    cluster.profile(folder, starter="srun", ranks_per_node=1, racks=None | "switches" ..., gpus=False, **toml) -> Path    a machine profile
    cluster.off("n3") / on("n3")                 power: all processes of a node get SIGKILL; `on` waits until Slurm can use it
    cluster.cut("n3") / join("n3")               its network link, while its processes go on
    cluster.shape("n3", 100) / unshape("n3")     at most 100 Mbit/s into the node and 100 out of it (there is no option for latency)
    cluster.link_bytes("n3") -> (in, out)        bytes that have crossed the node's link so far
    cluster.run("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", "/run/shared/X")   (after mkdir) all nodes see what is mounted there
    cluster.states(job_ids) -> dict              `submission.states` in a process on the login node, as the launch side calls it

Everything runs inside one `unshare` whose process 1 (lab.py) ends when pytest does, even by SIGKILL: nothing is left
behind, and no other cluster, network or daemon of this machine is touched. `summit` is a second one: slurmctld alone,
with 4,608 nodes in 256 racks of 18 that do not exist but can be scheduled. Slurm's logs are in `cluster.folder`.
"""

from __future__ import annotations

import functools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from prottrans_hpc.launch import children
from prottrans_hpc.launch.job_state import State

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "tc", "unshare", "nsenter")
ANSWER_S = 180
"""Bringing all up takes 2 s on two idle cores."""
PATIENCE = 3
"""A machine on which others compute as well is so much slower; only a test that fails waits so long."""
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# Root needs no user namespace, and slurmd's setgroups fails in one.
USER_SPACE = () if os.geteuid() == 0 else ("--user", "--map-current-user", "--keep-caps")
SPACES = ("--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")


@dataclass
class Cluster:
    """A running cluster; the module's docstring says how to use it."""

    folder: Path
    """Slurm's logs, on the file system that all nodes share."""
    racks: dict[str, list[str]]
    unshare: subprocess.Popen[bytes]
    nodes: dict[str, int] = field(default_factory=dict)
    """Node -> the process that holds its namespaces, as numbered in the cluster's process space."""
    down: set[str] = field(default_factory=set)
    cut_off: set[str] = field(default_factory=set)
    shaped: set[str] = field(default_factory=set)

    # --- commands

    def command(self, argv: Sequence[str], node: str | None = None, cwd: Path | None = None) -> list[str]:
        """The command, entered into the namespaces of the login node or of a node; who enters starts in the root folder."""
        return [*_enter(self.unshare.pid), *(_enter(self.nodes[node]) if node else ()), "env", f"--chdir={cwd or self.folder}", *argv]

    def run(
        self,
        *argv: str,
        node: str | None = None,
        code: int | None = 0,
        timeout_s: float = 120,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdin: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; fails unless its exit code is `code` (None: any). `timeout_s` is for a calm machine."""
        # `timeout` ends it in there; ours would end only the program that entered.
        limited = self.command(["timeout", "--kill-after=5", str(PATIENCE * timeout_s), *argv], node, cwd)
        done = subprocess.run(limited, input=stdin or "", capture_output=True, text=True, env=_environment(env), timeout=PATIENCE * timeout_s + 20, check=False)
        if code is not None and done.returncode != code:
            pytest.fail(f"{' '.join(argv)} ended with {done.returncode}, not {code}\n--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}")
        return done

    def popen(self, *argv: str, node: str | None = None, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> subprocess.Popen[str]:
        """Start a command and go on; it dies with the cluster. Its standard error goes with its standard output."""
        return subprocess.Popen(
            self.command(argv, node, cwd),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=_environment(env),
        )

    @staticmethod
    def environment() -> dict[str, str]:
        """What commands get."""
        return _environment({})

    def python(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run this interpreter on the login node."""
        return self.run(sys.executable, *arguments, **options)

    @property
    def prottrans_argv(self) -> list[str]:
        """The command line; it works from a bare checkout as well as installed."""
        return [sys.executable, "-c", "import sys; sys.argv[0] = 'prottrans'; from prottrans_hpc.launch.cli import main; sys.exit(main())"]

    def prottrans(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run the real command line on the login node."""
        return self.run(*self.prottrans_argv, *arguments, **options)

    # --- jobs

    def submit(self, script: str, *options: str, cwd: Path | None = None) -> str:
        """Submit a script's text; its job id."""
        return self.run("sbatch", "--parsable", "--output=/dev/null", *options, stdin=script, cwd=cwd).stdout.strip()

    def job_ids(self, run_dir: Path) -> list[str]:
        """The jobs of a run directory's latest submission."""
        return [str(job_id) for job_id in json.loads((run_dir / "job.json").read_text())["job_ids"]]

    def states(self, job_ids: Sequence[str]) -> dict[str, State]:
        """What the launch side makes of these jobs."""
        program = "import json, sys; from prottrans_hpc.launch import submission; print(json.dumps(submission.states('slurm', sys.argv[1:])))"
        told = json.loads(self.python("-c", program, *job_ids).stdout)
        return {job_id: State(state) for job_id, state in told.items()}

    def state(self, job_id: str) -> State | None:
        """The state of one job, asked for cheaply; None when Slurm has forgotten it, UNKNOWN when it does not answer."""
        from prottrans_hpc.launch import slurm

        try:
            return slurm.parse_states(self.run(*slurm.state_argv([job_id]), code=None).stdout).get(job_id)
        except subprocess.TimeoutExpired:
            return State.UNKNOWN

    def wait(self, condition: Callable[[], object], what: str, timeout_s: float = 60) -> None:
        """Wait for something; fails with `what` when it does not come. `timeout_s` is for a calm machine."""
        end = time.monotonic() + PATIENCE * timeout_s
        while not condition():
            if time.monotonic() > end:
                pytest.fail(f"waited {PATIENCE * timeout_s} s in vain for {what}\n{self.run('squeue', '--states=all', code=None).stdout}")
            time.sleep(0.1)

    def wait_running(self, job_id: str, timeout_s: float = 60) -> None:
        """Wait until a job runs."""
        self.wait(lambda: self.state(job_id) == State.RUNNING, f"job {job_id} to run", timeout_s)

    def wait_ended(self, job_id: str, timeout_s: float = 120) -> State:
        """Wait until a job has ended; how it did."""
        last: list[State] = []

        def ended() -> bool:
            last[:] = [self.state(job_id) or State.UNKNOWN]
            return not last[0].is_alive

        self.wait(ended, f"job {job_id} to end", timeout_s)
        return last[0]

    # --- machines

    def profile(self, folder: Path, *, starter: str = "srun", ranks_per_node: int = 1, racks: str | None = None, gpus: bool = False, **keys: str) -> Path:
        """Write a machine profile of this cluster; `racks` is a rack_placement; `keys` are TOML values that are added or replace ours."""
        values = {
            "name": '"testbed"',
            "description": '"eight nodes in two racks, for the tests"',
            "scheduler": '"slurm"',
            "starter": f'"{starter}"',
            "ranks_per_node": str(ranks_per_node),
            "max_nodes": "8",
            "warning_min": "1",
            # Nothing is inherited from the shell that submits; a bare checkout is no installed package.
            "setup_lines": json.dumps([f"export PYTHONPATH={REPOSITORY}"]),
        } | keys
        if racks:
            values |= {"nodes_per_rack": "4", "num_racks": "2", "rack_placement": f'"{racks}"'}
        gpu = 'num_gpus = 6\n[node.gpu]\nname = "V100"\nmemory_gib = 16\npeak_tflops = { fp32 = 15.7 }\n' if gpus else ""
        queues = "".join(
            f'[[queues]]\nname = "{name}"\npreemptable = {"true" if name != "batch" else "false"}\n'
            "[[queues.bins]]\nmin_nodes = 1\nmax_nodes = 8\nmax_walltime_min = 60\n"
            for name in ("batch", "killable", "killable_at_once")
        )
        # Claimed cores are not there: two a rank would already be too many threads.
        cores = 42 if gpus else ranks_per_node
        path = folder / "testbed.toml"
        path.write_text("".join(f"{key} = {value}\n" for key, value in values.items()) + f"\n[node]\nnum_cpu_cores = {cores}\n{gpu}\n{queues}")
        return path

    # --- accidents

    def off(self, node: str) -> None:
        """Cut a node's power."""
        self._order("off", node)
        self.down.add(node)

    def on(self, node: str) -> None:
        """Power it on again and wait until Slurm can use it."""
        self._order("on", node)
        self.down.discard(node)

    def cut(self, node: str) -> None:
        """Cut a node's link; its processes go on alone."""
        self._order("cut", node)
        self.cut_off.add(node)

    def join(self, node: str) -> None:
        """Put the link back."""
        self._order("join", node)
        self.cut_off.discard(node)

    def shape(self, node: str, rate_mbit: float) -> None:
        """Make a node's link slow, in either direction."""
        self._order("shape", node, str(rate_mbit))
        self.shaped.add(node)

    def unshape(self, node: str) -> None:
        """Make it fast again."""
        self._order("unshape", node)
        self.shaped.discard(node)

    def link_bytes(self, node: str) -> tuple[int, int]:
        """Into the node and out of it since it was powered on; what goes through loopback does not count."""
        told = self.run("cat", "/proc/net/dev", node=node).stdout
        numbers = next(line.split(":")[1].split() for line in told.splitlines() if line.strip().startswith("eth0:"))
        return int(numbers[0]), int(numbers[8])

    def clear(self) -> None:
        """No jobs, all nodes up, all links fast."""
        for node in sorted(self.shaped - self.down):
            self.unshape(node)
        self.shaped.clear()
        for node in sorted(self.cut_off - self.down):
            self.join(node)
        self.cut_off.clear()
        if jobs := self._jobs():
            self.run("scancel", "--signal=KILL", "--full", *jobs, code=None)
            self.run("scancel", *jobs, code=None)
        for node in sorted(self.down):
            self.on(node)
        self.wait(lambda: not self._jobs(), "the jobs of a test to be gone", 60)
        # Where nothing runs behind a node, "resume" would count it as powered on, and soon as down.
        for states, remedy in (("drain", "undrain"), ("down", "resume")):
            if names := set(self.run("sinfo", "--noheader", "--Node", f"--states={states}", "--format=%N").stdout.split()):
                self.run("scontrol", "update", f"nodename={','.join(sorted(names))}", f"state={remedy}")
        self.wait(lambda: not self.run("sinfo", "--noheader", "--states=down,drain", "--format=%N").stdout.split(), "the nodes to be usable", 60)

    def _jobs(self) -> list[str]:
        return self.run("squeue", "--noheader", "--format=%i").stdout.split()

    def _order(self, *words: str) -> None:
        assert self.unshare.stdin
        self.unshare.stdin.write(" ".join(words).encode() + b"\n")
        self.unshare.stdin.flush()
        self._listen()

    def _listen(self) -> None:
        """What the cluster's process 1 answers: where the nodes are, or what went wrong."""
        assert self.unshare.stdout
        if not select.select([self.unshare.stdout], [], [], ANSWER_S)[0]:
            pytest.fail(f"the cluster did not answer within {ANSWER_S} s; its logs are in {self.folder}")
        line = self.unshare.stdout.readline()
        told = json.loads(line) if line else {"error": f"the cluster ended with {self.unshare.wait()}"}
        if "error" in told:
            pytest.fail(f"the cluster says: {told['error']}; its logs are in {self.folder}")
        self.nodes = told["nodes"]


@contextmanager
def running(folder: Path, racks: dict[str, list[str]], *, daemons: bool) -> Iterator[Cluster]:
    """A cluster that lives as long as the context, or as this process if that is shorter."""
    order = json.dumps({"folder": str(folder), "racks": racks, "daemons": daemons})
    argv = ["unshare", *USER_SPACE, *SPACES, sys.executable, str(Path(__file__).with_name("lab.py")), order]
    with (folder / "lab.err").open("wb") as errors:
        # Killed with this process, and the end of its standard input says so too: a change of user may lose the first.
        process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=_environment({}), preexec_fn=_die_with_us(os.getpid())
        )
    cluster = Cluster(folder, racks, process)
    try:
        cluster._listen()
        yield cluster
    finally:
        process.kill()
        process.communicate()


def _die_with_us(parent: int) -> Callable[[], None]:
    return lambda: children.die_with_parent(parent)


def _enter(pid: int) -> list[str]:
    """The command that goes into the namespaces of a process and of its children."""
    spaces = [f"--{name}=/proc/{pid}/ns/{kind}" for name, kind in (("net", "net"), ("uts", "uts"), ("mount", "mnt"), ("pid", "pid_for_children"))]
    user = ["--user=/proc/{pid}/ns/user", "--preserve-credentials"] if USER_SPACE else []
    return ["nsenter", *(word.format(pid=pid) for word in user), *spaces, "--"]


def _environment(changes: Mapping[str, str] | None) -> dict[str, str]:
    """That of a login shell: daemons' programs, this interpreter's, and the checkout."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""), SYSTEM_PATH))
    return os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | dict(changes or {})


@functools.cache
def obstacle() -> str | None:
    """Why no cluster can be brought up here; None where it can."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=_environment({})["PATH"])]
    if missing:
        return f"NO TEST CLUSTER, so nothing is tried on a real Slurm: {', '.join(missing)} missing. `scripts/cluster.sh` installs what is needed"
    tried = subprocess.run(["unshare", *USER_SPACE, *SPACES, "true"], capture_output=True, text=True, env=_environment({}), check=False)
    if tried.returncode:
        return f"NO TEST CLUSTER, so nothing is tried on a real Slurm: namespaces are forbidden here ({tried.stderr.strip()})"
    return None


@pytest.fixture(scope="session")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := obstacle():
        pytest.skip(reason)
    racks = {"rack0": ["n1", "n2", "n3", "n4"], "rack1": ["n5", "n6", "n7", "n8"]}
    with running(tmp_path_factory.mktemp("cluster"), racks, daemons=True) as cluster:
        yield cluster


@pytest.fixture
def cluster(_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster of eight nodes, idle; whatever a test leaves on it is removed."""
    yield _cluster
    _cluster.clear()


@pytest.fixture(scope="session")
def _summit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := obstacle():
        pytest.skip(reason)
    racks = {f"rack{rack:03d}": [f"s{18 * rack + node:04d}" for node in range(1, 19)] for rack in range(256)}
    with running(tmp_path_factory.mktemp("summit"), racks, daemons=False) as cluster:
        yield cluster


@pytest.fixture
def summit(_summit: Cluster) -> Iterator[Cluster]:
    """The scheduler of 4,608 nodes in 256 racks, idle."""
    yield _summit
    _summit.clear()
