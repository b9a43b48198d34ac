"""The daemon of the stand-in for LSF: starts pending jobs for real, keeps their time, delivers signals, requeues.

`python lsf_daemon.py` serves the state folder until it is told to stop; nothing that it started outlives it. A job's
hosts are names only: the script runs here, and so do the ranks that `jsrun` starts. What a job prints is shown when
it has ended, as LSF does unless a site changes that.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lsf_state import Job, State, here, is_satisfied

_POLL_S = 0.02
_PR_SET_PDEATHSIG = 1


@dataclass
class Running:
    """A job that runs: its process, and what is still to be done to it."""

    process: subprocess.Popen[bytes]
    hosts: list[str]
    began: float
    agenda: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    """(when, what), on the daemon's clock."""
    reason: str | None = None
    """What LSF will say ended the job."""
    requeues: bool = False
    """Whether the job is queued again when it has been ended."""
    lost: bool = False
    """Its host has failed: whatever it answers does not count."""

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def at(self, when: float, what: Callable[[], None]) -> None:
        self.agenda = sorted([*self.agenda, (when, what)], key=lambda entry: entry[0])


@dataclass
class Daemon:
    """Owns the running jobs."""

    state: State
    running: dict[int, Running] = field(default_factory=dict)

    @property
    def now(self) -> float:
        """The monotonic clock; a test may put it forward."""
        return time.monotonic() + float(self.state.cluster["clock_ahead_s"])

    def serve(self) -> None:
        """Until SIGTERM."""
        stopped: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
        try:
            while not stopped:
                with self.state.requests() as requests:
                    for request in requests:
                        self._handle(request)
                for job_id in list(self.running):
                    self._look_after(job_id)
                self._dispatch()
                time.sleep(_POLL_S)
        finally:
            for job in self.running.values():
                job.signal(signal.SIGKILL)
                job.process.wait()

    def _handle(self, request: Job) -> None:
        job_id, what = request["id"], request["what"]
        job, running = self.state.read(job_id), self.running.get(job_id)
        if job is None:
            return
        if running is None:
            if what == "kill" and job["stat"] == "PEND":
                self.state.write({**job, "stat": "EXIT", "exit_reason": "TERM_OWNER: job killed by owner"})
            elif what == "requeue" and job["stat"] in ("EXIT", "DONE"):
                self.state.write({**job, "stat": "PEND", "exit_reason": None, "exit_code": None})
        elif what == "signal":
            running.signal(request["number"])
        elif what == "kill":
            self._end(running, "TERM_OWNER: job killed by owner")
        elif what == "requeue":
            running.requeues = True
            self._end(running, "TERM_REQUEUE_OWNER: job killed and requeued by owner")
        elif what == "preempt" and self._may_be_preempted(job, running):
            running.requeues = not job["requeue_forbidden"]
            self._end(running, "TERM_PREEMPT: job killed after preemption")
        elif what == "host failure":
            running.requeues, running.lost, running.reason = job["rerunnable"], True, "TERM_EXTERNAL_SIGNAL: job killed by a signal external to LSF"
            running.signal(signal.SIGKILL)

    def _may_be_preempted(self, job: Job, running: Running) -> bool:
        cluster = self.state.cluster
        limits = cluster["preemptable_after_min"].get(job["queue"], [])
        after_min = next((minutes for least, most, minutes in limits if least <= job["nodes"] <= most), None)
        return after_min is not None and self.now >= running.began + after_min * cluster["minute_s"]

    def _end(self, running: Running, reason: str) -> None:
        """SIGINT, SIGTERM, SIGKILL, one after the other."""
        interval, now = self.state.cluster["terminate_interval_s"], self.now
        running.reason = reason
        for index, number in enumerate((signal.SIGINT, signal.SIGTERM, signal.SIGKILL)):
            running.at(now + index * interval, lambda number=number: running.signal(number))  # type: ignore[misc]

    def _look_after(self, job_id: int) -> None:
        running = self.running[job_id]
        while running.agenda and running.agenda[0][0] <= self.now:
            running.agenda.pop(0)[1]()
        if running.process.poll() is None:
            return
        running.signal(signal.SIGKILL)  # what it left behind
        job = self.state.read(job_id)
        assert job is not None
        self._show_output(job)
        status = running.process.returncode
        code = status if status >= 0 else 128 - status
        ended = {"stat": "EXIT" if code else "DONE", "exit_code": code, "exit_reason": running.reason if code else None}
        if running.requeues and (code or running.lost):
            ended = {"stat": "PEND", "exit_code": None, "exit_reason": None}
        del self.running[job_id]
        self.state.write({**job, **ended, "last_code": code, "hosts": running.hosts})

    def _show_output(self, job: Job) -> None:
        for name in ("out", "err"):
            spooled = self.state.job_folder(job["id"]) / name
            if job[name]:
                path = job[name].replace("%J", str(job["number"])).replace("%I", str(job["index"]))
                # LSF mails what has no folder any more.
                with contextlib.suppress(FileNotFoundError), open(path, "ab") as file:
                    file.write(spooled.read_bytes())

    def _dispatch(self) -> None:
        for job in self.state.jobs():
            if job["stat"] == "PEND" and (not job["after"] or is_satisfied(job["after"], self.state)):
                hosts = [] if self._is_held_back(job) else self._free_hosts(job)
                if hosts:
                    self._start(job, hosts)

    def _is_held_back(self, job: Job) -> bool:
        """Whether so many elements of its array run already as may run at a time."""
        if not job["limit"]:
            return False
        running = [self.state.read(job_id) for job_id in self.running]
        return sum(other is not None and other["number"] == job["number"] for other in running) >= job["limit"]

    def _free_hosts(self, job: Job) -> list[str]:
        """Hosts for a job, of few racks when it asks for that; none when it has to wait."""
        taken = {host for running in self.running.values() for host in running.hosts}
        free = [host for host in self.state.hosts if host not in taken]
        if job["racks"]:
            racks: dict[str, list[str]] = {}
            for host in free:
                racks.setdefault(host[:4], []).append(host)
            emptiest = sorted(racks.values(), key=len, reverse=True)[: job["racks"]]
            free = sorted(host for rack in emptiest for host in rack)
        return free[: job["nodes"]] if len(free) >= job["nodes"] else []

    def _start(self, job: Job, hosts: list[str]) -> None:
        cluster, folder = self.state.cluster, self.state.job_folder(job["id"])
        slots = [cluster["launch_host"], *(host for host in hosts for _ in range(cluster["cores"]))]
        (folder / "hosts").write_text("".join(f"{host}\n" for host in slots))
        variables = {
            "FAKE_LSF": str(self.state.folder),
            "LSB_JOBID": str(job["number"]),
            "LSB_JOBINDEX": str(job["index"]),
            "LSB_JOBNAME": job["name"],
            "LSB_QUEUE": job["queue"],
            "LSB_DJOB_HOSTFILE": str(folder / "hosts"),
            "LSB_DJOB_NUMPROC": str(len(slots)),
            "LSB_SUB_HOST": "login1",
        }
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            process = subprocess.Popen(
                ["bash", str(folder / "script")],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=job["cwd"],
                env=job["environment"] | variables,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        running = Running(process, hosts, self.now)
        self.running[job["id"]] = running
        self._plan_time(job, running)
        self.state.write({**job, "stat": "RUN", "starts": job["starts"] + 1, "hosts": hosts})

    def _plan_time(self, job: Job, running: Running) -> None:
        """The warning, the end of the walltime, and what follows it."""
        cluster = self.state.cluster
        minute_s, limit = cluster["minute_s"], job["walltime_min"]
        if job["warning"]:
            name, before = job["warning"]
            running.at(running.began + (limit - before) * minute_s, lambda: running.signal(signal.Signals[f"SIG{name}"]))

        def is_over() -> None:
            running.reason = "TERM_RUNLIMIT: job killed after reaching LSF run time limit"
            running.signal(signal.SIGUSR2)

        running.at(running.began + limit * minute_s, is_over)
        running.at(running.began + (limit + cluster["kill_after_min"]) * minute_s, lambda: running.signal(signal.SIGKILL))


def die_with_parent() -> None:
    """For a child, between fork and exec: SIGKILL when the process that started it is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(Daemon(here()).serve())
