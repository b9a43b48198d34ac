"""submitit on LSF, through `AutoExecutor(cluster="lsf")` and the strict stand-in: real processes, results, arrays, signals, requeues."""

from __future__ import annotations

import os
import time

import pytest

submitit = pytest.importorskip("submitit")

from submitit.core import utils  # noqa: E402

from prottrans_hpc.launch import lsf_executor  # noqa: E402
from prottrans_hpc.launch.lsf_executor import FORGOTTEN, LsfExecutor, LsfJob, LsfJobEnvironment, lsf_id, read_states  # noqa: E402

SUMMIT = {"lsf_project": "BIO123", "lsf_allocation": "nodes", "lsf_rerunnable": True}


@pytest.fixture
def executor(lsf, tmp_path, monkeypatch):
    """submitit's own automatic executor, on a stand-in that runs."""
    for name in ("PATH", "FAKE_LSF"):
        monkeypatch.setenv(name, lsf.environment[name])
    lsf.configure(minute_s=10.0, terminate_interval_s=0.5)
    lsf.start()
    LsfJob.watcher.clear()
    LsfJob.watcher._registered.clear()
    found = submitit.AutoExecutor(tmp_path / "jobs %j", cluster="lsf")
    found.update_parameters(timeout_min=60, name="task", **SUMMIT)
    return found


def whereabouts():
    """A function that runs within the job; local ones travel with the pickle."""

    def tell():
        environment = submitit.JobEnvironment()
        return {
            "job_id": environment.job_id,
            "tasks": environment.num_tasks,
            "nodes": environment.num_nodes,
            "rank": environment.global_rank,
            "local": environment.local_rank,
            "node": environment.node,
            "hosts": list(environment.hostnames),
        }

    return tell


def test_it_is_found_by_its_name_and_by_bsub_on_the_path(executor, monkeypatch):
    assert isinstance(executor._executor, LsfExecutor)
    assert LsfExecutor.name() == "lsf"
    assert LsfExecutor.affinity() == 2
    monkeypatch.setenv("PATH", "/nowhere")
    assert LsfExecutor.affinity() == -1
    with pytest.raises(RuntimeError, match='Could not detect "bsub"'):
        executor.submit(sum, [1, 2])


def test_a_job_gives_its_result_and_knows_where_it_is(executor):
    job = executor.submit(whereabouts())
    found = job.result()
    assert found == {"job_id": job.job_id, "tasks": 1, "nodes": 1, "rank": 0, "local": 0, "node": 0, "hosts": ["a001n01"]}
    assert "_" not in job.job_id


def test_two_tasks_on_each_of_two_nodes(executor):
    executor.update_parameters(nodes=2, tasks_per_node=2, gpus_per_node=4, cpus_per_task=10)
    found = executor.submit(whereabouts()).results()
    assert [(one["rank"], one["local"], one["node"], one["tasks"], one["nodes"]) for one in found] == [
        (0, 0, 0, 4, 2),
        (1, 1, 0, 4, 2),
        (2, 0, 1, 4, 2),
        (3, 1, 1, 4, 2),
    ]


def test_an_array_is_one_submission_and_is_throttled(executor, lsf):
    executor.update_parameters(lsf_array_parallelism=2)

    def square(number):
        return number * number

    jobs = executor.map_array(square, range(1, 5))
    number = jobs[0].job_id.partition("_")[0]
    assert [job.job_id for job in jobs] == [f"{number}_{index}" for index in range(1, 5)]
    assert max(len({job["id"] for job in _running(lsf)}) for _ in _until(lambda: all(job.done() for job in jobs))) <= 2
    assert [job.result() for job in jobs] == [1, 4, 9, 16]


def _running(lsf):
    return [job for job in (lsf.job(path.name) for path in (lsf.folder / "jobs").iterdir()) if job["stat"] == "RUN"]


def _until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
        yield
    yield


def test_one_query_for_many_jobs(executor, tmp_path, monkeypatch):
    jobs = [*executor.map_array(time.sleep, [60, 60, 60]), executor.submit(time.sleep, 60)]
    calls = []
    run = lsf_executor.core.subprocess.check_output
    monkeypatch.setattr(lsf_executor.core.subprocess, "check_output", lambda command, **kwargs: calls.append(command) or run(command, **kwargs))
    assert {job.watcher.get_state(job.job_id, mode="standard") for job in jobs} <= {"PENDING", "RUNNING"}
    assert len(calls) == 1
    assert calls[0][-2:] == [jobs[0].job_id.partition("_")[0], jobs[-1].job_id]
    for job in jobs:
        job.cancel(check=False)


def test_an_error_comes_back_with_its_trace(executor):
    def fail():
        raise ValueError("on the node")

    with pytest.raises(utils.FailedJobError, match="ValueError: on the node"):
        executor.submit(fail).result()


def test_elements_are_cancelled_one_by_one(executor, lsf):
    jobs = executor.map_array(time.sleep, [600, 600])
    number = int(jobs[0].job_id.partition("_")[0])
    lsf.wait(1_000_000 + number, "RUN")
    lsf.wait(2_000_000 + number, "RUN")
    jobs[1].cancel()
    lsf.wait(2_000_000 + number, "EXIT")
    assert lsf.job(1_000_000 + number)["stat"] == "RUN"
    assert LsfJob.watcher.is_done(jobs[1].job_id, mode="force")
    assert not LsfJob.watcher.is_done(jobs[0].job_id, mode="force")
    jobs[0].cancel()


@pytest.mark.parametrize("num_jobs", [1, 2])
def test_a_checkpointing_function_is_queued_again_after_the_warning(executor, lsf, tmp_path, num_jobs):
    lsf.configure(minute_s=1.0)
    # The warning comes 8 of 60 minutes after the start; a minute takes a second.
    executor.update_parameters(timeout_min=60, lsf_signal_delay_s=52 * 60)

    class Counter:
        def __call__(self, resumed=False):
            if not resumed:
                time.sleep(600)
            return "resumed"

        def checkpoint(self, resumed=False):
            return submitit.helpers.DelayedSubmission(self, resumed=True)

    jobs = executor.submit_array([Counter() for _ in range(num_jobs)])
    assert [job.result() for job in jobs] == ["resumed"] * num_jobs
    number, _, index = jobs[-1].job_id.partition("_")
    assert lsf.job(int(index or 0) * 1_000_000 + int(number))["starts"] == 2
    assert not list(tmp_path.glob("jobs*/.warned*"))


def test_wrong_parameters_are_answered_with_the_right_ones(executor):
    with pytest.raises(NameError, match="Unknown argument 'walltime' for executor 'lsf'"):
        executor.update_parameters(lsf_walltime=5)
    with pytest.raises(ValueError, match=r"Unavailable parameter(?s:.*)array_parallelism \(default: 256\)"):
        executor._executor.update_parameters(nonsense=1)
    with pytest.raises(ValueError, match="the job name"):
        executor.update_parameters(name="x\ntouch PWNED #")


def test_what_bsub_refuses_is_told(executor):
    executor.update_parameters(lsf_queue="nowhere")
    with pytest.raises(utils.FailedJobError, match="nowhere: No such queue"):
        executor.submit(sum, [1])


def test_states_in_what_bjobs_prints():
    lines = (
        *("100|0|RUN|batch1:a1", "101|1|DONE|a2", "101|2|EXIT|a2", "102|-|PEND|-", "103|0|NEWSTATE|-", "106|1|ZOMBI|a3", "107|0|UNKWN|a3", "108|0|SSUSP|a3"),
        *("Job <104> is not found", "Job <105[2]> is not found", "Cannot connect"),
    )
    assert {job_id: info["State"] for job_id, info in read_states("\n".join(lines)).items()} == {
        "100": "RUNNING",
        "101_1": "COMPLETED",
        "101_2": "FAILED",
        "102": "PENDING",
        "103": "UNKNOWN",
        "104": FORGOTTEN,
        "105_2": FORGOTTEN,
        # Jobs whose host does not answer may still run: they must not be taken for ended.
        "106_1": "UNKNOWN",
        "107": "UNKNOWN",
        "108": "PREEMPTED",
    }
    assert read_states("LSF is down. Please wait ...") == {}


def test_a_forgotten_job_is_done_and_one_that_lsf_does_not_tell_of_is_not(executor):
    watcher = lsf_executor.LsfInfoWatcher()
    assert watcher.is_done("999", mode="force")
    watcher._info_dict.clear()
    watcher.read_info = lambda string: {}
    assert not watcher.is_done("999", mode="force")


def test_ids_in_lsf_s_spelling():
    assert lsf_id("12") == "12"
    assert lsf_id("12_3") == "12[3]"
    with pytest.raises(utils.FailedSubmissionError, match="instead of a job id"):
        LsfExecutor._get_job_id_from_submission_command("Request aborted by esub.")


@pytest.mark.parametrize("prefix", ["JSM_NAMESPACE", "OMPI_COMM_WORLD"])
def test_ranks_by_whatever_started_them(monkeypatch, prefix):
    for name in list(os.environ):
        if name.startswith(("JSM_", "OMPI_", "PMIX_", "LSB_")):
            monkeypatch.delenv(name)
    for name, value in {"RANK": 9, "SIZE": 12, "LOCAL_RANK": 3, "LOCAL_SIZE": 6}.items():
        monkeypatch.setenv(f"{prefix}_{name}", str(value))
    monkeypatch.setenv("LSB_JOBID", "77")
    monkeypatch.setenv("LSB_JOBINDEX", "0")
    monkeypatch.setenv("LSB_MCPU_HOSTS", "batch1 1 a1 42 a2 42")
    environment = LsfJobEnvironment()
    assert (environment.global_rank, environment.num_tasks, environment.local_rank, environment.node, environment.num_nodes) == (9, 12, 3, 1, 2)
    assert environment.job_id == "77"
    monkeypatch.setenv("LSB_JOBINDEX", "5")
    assert environment.job_id == "77_5"
