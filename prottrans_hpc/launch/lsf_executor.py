"""`LsfExecutor`, a plug-in that lets submitit submit to LSF: `submitit.AutoExecutor(folder, cluster="lsf")`.

submitit finds it by the entry-point group `submitit` of this package. Parameters are those of `LsfParameters`, with
the prefix `lsf_`, and submitit's shared ones (timeout_min, nodes, tasks_per_node, cpus_per_task, gpus_per_node,
mem_gb, name). Element k of an array, counted from 1 as LSF does, has the submitit job id "ID_k".
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from submitit.core import core, job_environment, logger, utils

from .job_state import State
from .lsf import compute_hosts, state_of
from .lsf_script import PARAMETERS, REQUEUE_SUFFIX, WARNING_FILE, LsfParameters, render

_WORDS = {
    State.PENDING: "PENDING",
    State.RUNNING: "RUNNING",
    State.SUSPENDED: "PREEMPTED",
    State.DONE: "COMPLETED",
    State.FAILED: "FAILED",
}
"""submitit's words for the states of a job; it knows no suspended one."""
FORGOTTEN = "FORGOTTEN"
"""LSF's daemon answered that it does not know the job (any more)."""
_TIMEOUT_S = 60
_LOOK_EVERY_S = 1.0
# bsub takes directives from standard input only; bjobs fails, telling the rest, when it has forgotten one of the jobs.
_SUBMIT = 'exec bsub <"$1"'
_ASK = 'bjobs "$@" 2>&1 || :'


def lsf_id(job_id: str) -> str:
    """submitit's "123_4" as LSF writes it: "123[4]"; an id without an index is the same in both."""
    number, _, index = job_id.partition("_")
    return f"{number}[{index}]" if index else number


class LsfInfoWatcher(core.InfoWatcher):
    """Asks for all jobs with one bjobs."""

    def _make_command(self) -> list[str] | None:
        numbers = sorted({job_id.partition("_")[0] for job_id in self._registered - self._finished})
        return states_argv(numbers) if numbers else None

    def get_state(self, job_id: str, mode: str = "standard") -> str:
        """The state in submitit's words; one that LSF does not tell is UNKNOWN, and so not done."""
        info = self.get_info(job_id, mode=mode) or self._info_dict.get(job_id.partition("_")[0], {})
        return info.get("State", "UNKNOWN")

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        """Job id -> {"JobID", "State", "NodeList"} in what bjobs printed."""
        return read_states(string if isinstance(string, str) else string.decode(errors="replace"))


def states_argv(numbers: Sequence[str]) -> list[str]:
    """The one command that tells the states of jobs and of all elements of arrays; it ends with 0 in any case."""
    return ["bash", "-c", _ASK, "ask", "-a", "-noheader", "-o", "jobid jobindex stat exec_host delimiter='|'", *numbers]


def read_states(output: str) -> dict[str, dict[str, str]]:
    """What `states_argv` printed, by submitit's job ids."""
    found: dict[str, dict[str, str]] = {}
    for line in output.splitlines():
        if row := re.fullmatch(r"\s*(\d+)\|(\d*|-)\|([A-Z]+)\|(.*)", line):
            job_id = row[1] if row[2] in ("", "-", "0") else f"{row[1]}_{row[2]}"
            found[job_id] = {"JobID": job_id, "State": _WORDS.get(state_of(row[3]), "UNKNOWN"), "NodeList": row[4].strip()}
        elif missing := re.match(r"\s*Job <(\d+)(?:\[(\d+)\])?> is not found", line):
            job_id = f"{missing[1]}_{missing[2]}" if missing[2] else missing[1]
            found[job_id] = {"JobID": job_id, "State": FORGOTTEN}
    return found


class LsfJob(core.Job[core.R]):
    """A job, or an element of an array."""

    _cancel_command = "bkill"
    watcher = LsfInfoWatcher(delay_s=60)

    def cancel(self, check: bool = True) -> None:
        """Cancel with bkill; `check` raises when it says that it could not."""
        subprocess.run([self._cancel_command, lsf_id(self.job_id)], check=check, stdout=subprocess.DEVNULL, timeout=_TIMEOUT_S)

    def _interrupt(self, timeout: bool = False) -> None:
        """Send the warning signal, as LSF does before the walltime ends (`timeout` is submitit's; LSF has one signal for both)."""
        subprocess.run(["bkill", "-s", LsfJobEnvironment.USR_SIG, lsf_id(self.job_id)], check=True, stdout=subprocess.DEVNULL, timeout=_TIMEOUT_S)


class LsfJobEnvironment(job_environment.JobEnvironment):
    """Where a task is, from the variables of LSF and of whatever started it."""

    _env = {"job_id": "LSB_JOBID", "array_job_id": "LSB_JOBID", "array_task_id": "LSB_JOBINDEX"}  # noqa: RUF012 - submitit's declaration
    # jsrun's own first: Spectrum MPI sets Open MPI's names too, and only jsrun's are there without MPI.
    _RANK = ("JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK")
    _SIZE = ("JSM_NAMESPACE_SIZE", "OMPI_COMM_WORLD_SIZE")
    _LOCAL_RANK = ("JSM_NAMESPACE_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    _LOCAL_SIZE = ("JSM_NAMESPACE_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")

    @property
    def array_job_id(self) -> str | None:
        """None outside arrays, where LSB_JOBINDEX is 0."""
        return os.environ["LSB_JOBID"] if os.environ.get("LSB_JOBINDEX", "0") not in ("", "0") else None

    @property
    def hostnames(self) -> list[str]:
        """The compute hosts in LSF's order, without the launch node."""
        return compute_hosts(os.environ) or [self.hostname]

    @property
    def num_nodes(self) -> int:
        """Hosts of the job."""
        return len(self.hostnames)

    @property
    def num_tasks(self) -> int:
        """The world size."""
        return _first_number(self._SIZE, 1)

    @property
    def global_rank(self) -> int:
        """The rank."""
        return _first_number(self._RANK, 0)

    @property
    def local_rank(self) -> int:
        """The rank on its node."""
        return _first_number(self._LOCAL_RANK, 0)

    @property
    def node(self) -> int:
        """Ranks fill one node after the other."""
        per_node = _first_number(self._LOCAL_SIZE, max(1, self.num_tasks // self.num_nodes))
        return self.global_rank // per_node

    def _handle_signals(self, paths: utils.JobPaths, submission: utils.DelayedSubmission) -> None:
        super()._handle_signals(paths, submission)
        if warning := os.environ.get(WARNING_FILE):
            threading.Thread(target=_signal_when_warned, args=(Path(warning), self._usr_sig()), daemon=True).start()

    def _requeue(self, countdown: int) -> None:
        if warning := os.environ.get(WARNING_FILE):
            Path(warning + REQUEUE_SUFFIX).touch()
        else:
            subprocess.run(["brequeue", lsf_id(self.job_id)], check=True, stdout=subprocess.DEVNULL, timeout=_TIMEOUT_S)
        logger.get_logger().info(f"Requeued job {self.job_id} ({countdown} remaining timeouts)")


def _signal_when_warned(warning: Path, number: int) -> None:
    while not warning.exists():
        time.sleep(_LOOK_EVERY_S)
    os.kill(os.getpid(), number)


def _first_number(names: Sequence[str], default: int) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), default)


class LsfExecutor(core.PicklingExecutor):
    """Submits pickled functions to LSF; see `LsfParameters` for what may be set."""

    job_class = LsfJob

    def __init__(self, folder: Path | str, max_num_timeout: int = 3, max_pickle_size_gb: float = 1.0, python: str | None = None) -> None:
        super().__init__(folder, max_num_timeout=max_num_timeout, max_pickle_size_gb=max_pickle_size_gb)
        self.python = shlex.quote(sys.executable) if python is None else python
        self._array_size: int | None = None

    @classmethod
    def affinity(cls) -> int:
        """How well submitit's automatic choice fits here."""
        return -1 if shutil.which("bsub") is None else 2

    @classmethod
    def _equivalence_dict(cls) -> core.EquivalenceDict:
        return core.EquivalenceDict(
            name="job_name",
            timeout_min="walltime_min",
            mem_gb="mem_gb",
            nodes="nodes",
            cpus_per_task="cpus_per_task",
            gpus_per_node="gpus_per_node",
            tasks_per_node="tasks_per_node",
        )

    @classmethod
    def _valid_parameters(cls) -> set[str]:
        return set(PARAMETERS)

    def _internal_update_parameters(self, **kwargs: Any) -> None:
        unknown = sorted(set(kwargs) - PARAMETERS)
        if unknown:
            defaults = "\n".join(f"  - {name} (default: {value!r})" for name, value in sorted(asdict(LsfParameters()).items()))
            raise ValueError(f"Unavailable parameter(s): {unknown}\nValid parameters are:\n{defaults}")
        LsfParameters(**{**self.parameters, **kwargs})  # refuses what cannot be submitted
        super()._internal_update_parameters(**kwargs)

    @property
    def _checked(self) -> LsfParameters:
        return replace(LsfParameters(), **self.parameters)

    def _internal_process_submissions(self, delayed_submissions: list[utils.DelayedSubmission]) -> list[core.Job[Any]]:
        if len(delayed_submissions) == 1:
            return super()._internal_process_submissions(delayed_submissions)
        folder = utils.JobPaths.get_first_id_independent_folder(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        pickles = [folder / f"{uuid.uuid4().hex}.pkl" for _ in delayed_submissions]
        for delayed, pickle in zip(delayed_submissions, pickles, strict=True):
            delayed.set_timeout(self._checked.walltime_min, self.max_num_timeout)
            delayed.dump(pickle)
        self._throttle()
        self._array_size = len(delayed_submissions)
        try:
            whole = self._submit_command(self._submitit_command_str)
        finally:
            self._array_size = None
        # Only its elements have states; left in the watcher the array itself would be asked for without end.
        LsfJob.watcher._registered.discard(whole.job_id)
        tasks = list(range(self._num_tasks()))
        jobs: list[core.Job[Any]] = [LsfJob(self.folder, f"{whole.job_id}_{index}", tasks) for index in range(1, len(pickles) + 1)]
        for job, pickle in zip(jobs, pickles, strict=True):
            job.paths.move_temporary_file(pickle, "submitted_pickle")
        return jobs

    @property
    def _submitit_command_str(self) -> str:
        return f"{self.python} -u -m submitit.core._submit {shlex.quote(str(self.folder))}"

    def _num_tasks(self) -> int:
        return self._checked.num_tasks

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        paths = utils.JobPaths(self.folder)
        # submitit writes %j for a job id and %A_%a for array and index; LSF %J for the number and %I for the index.
        own = "%J" if self._array_size is None else "%J_%I"
        stdout, stderr = (str(path).replace("%j", own).replace("%A", "%J").replace("%a", "%I").replace("%t", "0") for path in (paths.stdout, paths.stderr))
        folder = str(utils.JobPaths.get_first_id_independent_folder(self.folder))
        signal = LsfJobEnvironment.USR_SIG
        return render(command, self._checked, folder=folder, stdout=stdout, stderr=stderr, array_size=self._array_size, warning_signal=signal)

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        if shutil.which("bsub") is None:
            raise RuntimeError('Could not detect "bsub", are you indeed on an LSF cluster?')
        return ["bash", "-c", _SUBMIT, "submit", str(submission_file_path)]

    @staticmethod
    def _get_job_id_from_submission_command(string: bytes | str) -> str:
        text = string if isinstance(string, str) else string.decode(errors="replace")
        match = re.search(r"^Job <(\d+)> is submitted", text, re.MULTILINE)
        if match is None:
            raise utils.FailedSubmissionError(f"bsub answered {text!r} instead of a job id; look at bjobs before you submit again")
        return match[1]
