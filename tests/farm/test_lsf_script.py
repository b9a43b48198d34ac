"""The script of a submitit job on LSF: every parameter where LSF reads it, and nothing that LSF or a shell could misread."""

from __future__ import annotations

import subprocess

import pytest

from prottrans_hpc.launch.lsf_script import LsfParameters, launcher, render


def script(array_size: int | None = None, **parameters) -> str:
    logs = {"stdout": "/logs/%J_0_log.out", "stderr": "/logs/%J_0_log.err"}
    return render("python -m task '/my folder'", LsfParameters(**parameters), folder="/logs", array_size=array_size, warning_signal="USR2", **logs)


def directives(text: str) -> list[str]:
    return [line.removeprefix("#BSUB ") for line in text.splitlines() if line.startswith("#BSUB")]


def test_slots_on_a_usual_cluster():
    text = script(job_name="a.b-c", project="BIO1", queue="gpu", walltime_min=135, nodes=2, tasks_per_node=4, cpus_per_task=3, gpus_per_node=4, mem_gb=1.5)
    assert directives(text) == [
        "-J a.b-c",
        "-P BIO1",
        "-q gpu",
        "-W 2:15",
        "-n 24",
        '-R "span[ptile=12]"',
        '-gpu "num=4"',
        '-R "rusage[mem=1536MB]"',
        "-wa USR2",
        "-wt 2",
        "-r",
        "-o /logs/%J_0_log.out",
        "-e /logs/%J_0_log.err",
    ]
    assert "mpirun -np 8 --map-by ppr:4:node --bind-to none python -m task '/my folder'" in text.splitlines()


def test_nodes_as_on_summit():
    text = script(allocation="nodes", nodes=3, tasks_per_node=6, cpus_per_task=7, gpus_per_node=6, rerunnable=False, stderr_to_stdout=True)
    assert directives(text) == ["-J submitit", "-W 0:05", "-nnodes 3", "-wa USR2", "-wt 2", "-rn", "-o /logs/%J_0_log.out"]
    assert "exec jsrun -n 18 -r 6 -a 1 -c 7 -g 1 -b packed:7 -l gpu-cpu -d packed python -m task" in text


def test_arrays_count_from_one_and_are_throttled():
    assert directives(script(12, job_name="many", array_parallelism=5))[0] == '-J "many[1-12]%5"'
    assert directives(script(2, array_parallelism=5))[0] == '-J "submitit[1-2]%2"'


@pytest.mark.parametrize(("walltime_min", "delay_s", "warning"), [(60, 61, "-wt 2"), (60, 3600, "-wt 59"), (1, 60, None), (60, 0, None)])
def test_the_warning_comes_in_whole_minutes_after_the_start(walltime_min, delay_s, warning):
    found = [line for line in directives(script(walltime_min=walltime_min, signal_delay_s=delay_s)) if line.startswith("-wt")]
    assert found == ([warning] if warning else [])


def test_setup_launcher_and_further_directives():
    text = script(setup=["module load x", "source a/bin/activate"], launcher=["my launcher", "-x"], directives=["-alloc_flags nvme"])
    assert text.index("#BSUB -alloc_flags nvme\n") < text.index("module load x\nsource a/bin/activate\n") < text.index("'my launcher' -x python")
    assert launcher(LsfParameters()) == []


@pytest.mark.parametrize("parameters", [{}, {"allocation": "nodes"}, {"setup": ["true"]}])
def test_it_is_a_shell_script(parameters):
    assert subprocess.run(["bash", "-n"], input=script(**parameters), text=True, capture_output=True, timeout=30).stderr == ""


@pytest.mark.parametrize("name", ["x\ntouch PWNED #", "a b", "a;b", "", "-q", "$(x)", "a[1-9]", "x" * 65, "a\x00"])
def test_a_job_name_that_could_be_more_than_a_name_is_refused(name):
    with pytest.raises(ValueError, match="the job name"):
        LsfParameters(job_name=name)


@pytest.mark.parametrize("text", ["a\ntouch PWNED", '"', "$(touch x)", "`x`", "a\\b", "-P", "", "a\u2028b"])
@pytest.mark.parametrize("field", ["queue", "project"])
def test_a_word_that_could_be_taken_apart_is_refused(field, text):
    with pytest.raises(ValueError, match="cannot stand in a job script"):
        script(**{field: text})


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"walltime_min": 0}, "walltime_min must be at least 1"),
        ({"nodes": 0}, "nodes must be at least 1"),
        ({"allocation": "racks"}, "allocation is 'slots' or 'nodes'"),
        ({"gpus_per_node": 5, "tasks_per_node": 2}, "cannot be shared equally"),
        ({"directives": ["-q x\ntrue"]}, "must be one line"),
        ({"setup": ["true\n#BSUB -q x"]}, "directives belong into"),
    ],
)
def test_other_nonsense_is_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        LsfParameters(**parameters)
