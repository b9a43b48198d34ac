"""What all tests share: the shipped proteins, a small corpus, the real command line, real ranks, and honest skips."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Several ranks share a few cores here; threads of their own would only fight. Set before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Two tests at a time share the cores: threads that spin while they wait would take them from the other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# A batch job or an MPI program that runs the tests must not be mistaken for the ranks that a test starts.
for _name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMIX_", "PRTE_", "JSM_", "HOROVOD_", "PROTTRANS_"))]:
    del os.environ[_name]

# A shell that starts the tests with & has them ignore SIGINT, and with them every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is no failure; the whole suite has a time limit of its own.
settings.register_profile("prottrans", deadline=None)
settings.load_profile("prottrans")

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL_CORPUS_PROTEINS = 600


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def proteins_fasta() -> Path:
    """The shipped sample: 10,000 real proteins, zstd-compressed FASTA."""
    return REPOSITORY / "data" / "swissprot201401_sp50_sample10k.fasta.zst"


@pytest.fixture(scope="session")
def small_fasta(tmp_path_factory: pytest.TempPathFactory, proteins_fasta: Path) -> Path:
    """The first 600 proteins of the sample, plain FASTA."""
    import zstandard

    with zstandard.open(proteins_fasta, "rt", encoding="ascii") as file:
        records = file.read().split(">")[1 : SMALL_CORPUS_PROTEINS + 1]
    path = tmp_path_factory.mktemp("fasta") / "proteins.fasta"
    path.write_text("".join(f">{record}" for record in records), encoding="ascii")
    return path


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory, small_fasta: Path, prottrans: Prottrans) -> Path:
    """A corpus of 600 real proteins with a validation split. Tests must not change it."""
    corpus = tmp_path_factory.mktemp("corpus") / "small"
    prottrans("preprocess", str(small_fasta), "--out", str(corpus), "--validation", "0.05", "--shards", "2")
    return corpus


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with fixed random weights, as `prottrans import` writes one. Tests must not change it."""
    from prottrans_hpc import architecture
    from prottrans_hpc.models.prot_bert import build
    from prottrans_hpc.train import checkpoint

    record = architecture.get("prot_bert")
    shape = record.size("tiny").shape
    module = build(shape)
    module.initialise(3)
    path = tmp_path_factory.mktemp("model") / "tiny"
    checkpoint.write_model_checkpoint(path, record=record, shape=shape, weights=module.state_dict(), origin={})
    return path


@dataclass(frozen=True)
class Prottrans:
    """Runs the real command line in a fresh process."""

    cwd: Path

    @property
    def argv(self) -> list[str]:
        """The command; it works from a bare checkout as well as installed."""
        return [sys.executable, "-c", "import sys; sys.argv[0] = 'prottrans'; from prottrans_hpc.launch.cli import main; sys.exit(main())"]

    def __call__(
        self, *arguments: str, code: int | None = 0, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run with `arguments`; fails unless the exit code is `code` (None: any)."""
        environment = checkout_environment() | dict(env or {})
        done = subprocess.run([*self.argv, *arguments], cwd=cwd or self.cwd, env=environment, capture_output=True, text=True, timeout=timeout)
        if code is not None and done.returncode != code:
            pytest.fail(f"prottrans {' '.join(arguments)} ended with {done.returncode}, not {code}\n--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}")
        return done


def checkout_environment() -> dict[str, str]:
    """This environment, with the checkout importable in child processes."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))}


@pytest.fixture(scope="session")
def prottrans(tmp_path_factory: pytest.TempPathFactory) -> Prottrans:
    """`prottrans("corpus", "show", path, code=0)` runs the real command line and gives its CompletedProcess."""
    return Prottrans(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(scope="session")
def held_up() -> Callable[[int], AbstractContextManager[None]]:
    """`with held_up(pid)`: the process is stopped three quarters of the time."""

    @contextmanager
    def slowly(pid: int) -> Iterator[None]:
        over = threading.Event()
        thread = threading.Thread(target=_stop_and_go, args=(pid, over))
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    return slowly


def _stop_and_go(pid: int, over: threading.Event) -> None:
    with suppress(ProcessLookupError):
        while not over.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.03)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.01)


@dataclass(frozen=True)
class Rank:
    """How one rank ended."""

    returncode: int
    stdout: str
    stderr: str


RunRanks = Callable[..., list[Rank]]


@contextmanager
def held_port() -> Iterator[int]:
    """A TCP port of the loopback address that nobody else is given while the block runs; a rank that reuses addresses can listen there."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield int(held.getsockname()[1])


def rank_environments(num_ranks: int, *, port: int, num_nodes: int = 1) -> list[dict[str, str]]:
    """The variables that our own local starter sets, for each rank."""
    if num_ranks % num_nodes:
        raise ValueError(f"{num_ranks} ranks do not fill {num_nodes} nodes")
    per_node = num_ranks // num_nodes
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PROTTRANS_NONCE": secrets.token_hex(8), "OMP_NUM_THREADS": "1"}
    return [
        shared
        | {
            "PROTTRANS_RANK": str(rank),
            "PROTTRANS_WORLD_SIZE": str(num_ranks),
            "PROTTRANS_LOCAL_RANK": str(rank % per_node),
            "PROTTRANS_LOCAL_WORLD_SIZE": str(per_node),
            "PROTTRANS_NODE_RANK": str(rank // per_node),
        }
        for rank in range(num_ranks)
    ]


@pytest.fixture
def run_ranks(tmp_path: Path) -> RunRanks:
    """`run_ranks(argv, n, code=0, num_nodes=1, env={}, timeout=120)` runs `python argv...` as n real ranks.

    Fails unless every rank ends with `code` (None: any); gives each rank's return code and output. No rank
    outlives the call.
    """

    def run(argv: Sequence[str], n: int, *, code: int | None = 0, num_nodes: int = 1, env: Mapping[str, str] | None = None, timeout: float = 120) -> list[Rank]:
        base = checkout_environment() | dict(env or {})
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder, held_port() as port:
            outputs = [(Path(folder, f"{rank}.out"), Path(folder, f"{rank}.err")) for rank in range(n)]
            processes = [
                subprocess.Popen([sys.executable, *argv], env=base | own, stdout=out.open("wb"), stderr=err.open("wb"), start_new_session=True)
                for own, (out, err) in zip(rank_environments(n, port=port, num_nodes=num_nodes), outputs, strict=True)
            ]
            timed_out = _wait(processes, timeout)
            ranks = [
                Rank(process.returncode, out.read_text(errors="replace"), err.read_text(errors="replace"))
                for process, (out, err) in zip(processes, outputs, strict=True)
            ]
        if timed_out or (code is not None and any(rank.returncode != code for rank in ranks)):
            story = "\n".join(f"--- rank {i} ended with {rank.returncode}\n{rank.stdout[-2000:]}\n{rank.stderr[-4000:]}" for i, rank in enumerate(ranks))
            pytest.fail(f"{'ranks hung' if timed_out else f'not every rank ended with {code}'}: {' '.join(argv)}\n{story}")
        return ranks

    return run


def _wait(processes: list[subprocess.Popen[bytes]], timeout: float) -> bool:
    """Wait for all, then kill what is left; whether the time ran out."""
    end = time.monotonic() + timeout
    try:
        for process in processes:
            process.wait(max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return True
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return False


@pytest.fixture(autouse=True)
def _normal_verbosity() -> Iterator[None]:
    from prottrans_hpc import terminal

    before = terminal.verbosity()
    yield
    terminal.set_verbosity(before)


@pytest.fixture(autouse=True)
def _signals_stay_as_they_are() -> Iterator[None]:
    """A signal that a test leaves blocked or ignored is so in every child that a later test starts, and cannot end it."""
    before = _signals()
    yield
    after = _signals()
    signal.pthread_sigmask(signal.SIG_SETMASK, before[0])  # one test fails, not all that come after it
    for number, handler in before[1].items():
        signal.signal(number, handler)
    assert after == before


def _signals() -> tuple[set[int], dict[signal.Signals, Any]]:
    stopping = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, ())), {number: signal.getsignal(number) for number in stopping}


def _no_mpirun() -> str | None:
    return None if shutil.which("mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])) else "no mpirun"


def _no_horovod() -> str | None:
    return None if importlib.util.find_spec("horovod") else "HOROVOD IS NOT BUILT, so its comm back end goes untested: `make horovod` builds it"


def _no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA GPU"


_OBSTACLES: dict[str, Callable[[], str | None]] = {"mpi": _no_mpirun, "horovod": _no_horovod, "gpu": _no_gpu}


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Say at once what failed: a run that is cut off never comes to its summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\nFAILED {report.nodeid} ({report.when}, {report.duration:.0f} s)\n{str(report.longrepr)[-3000:]}", file=sys.__stderr__, flush=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine lacks the means for."""
    for marker, obstacle in _OBSTACLES.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = obstacle() if marked else None
        for item in marked if reason else []:
            item.add_marker(pytest.mark.skip(reason=reason or ""))
