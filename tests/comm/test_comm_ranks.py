"""Real ranks: the same sums, objects, parameters and gradients on every back end, and a lost rank is an error in time."""

from __future__ import annotations

import signal
import socket

import pytest
import torch
from safetensors.torch import load_file

from prottrans_hpc.comm import parameter_digest

HOROVOD = pytest.param("horovod", marks=[pytest.mark.horovod, pytest.mark.mpi])
BACK_ENDS = ["torch", HOROVOD]
TWO_AND_THREE = pytest.mark.parametrize("num_ranks", [2, 3])


@TWO_AND_THREE
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_sums_and_objects(ranks_agree, back_end, num_ranks):
    reports = ranks_agree(back_end, num_ranks).reports
    assert sorted(reports) == list(range(num_ranks))
    total = num_ranks * (num_ranks + 1) / 2
    gathered = [reports[rank]["gathered"][rank] for rank in range(num_ranks)]
    assert [one["rank"] for one in gathered] == list(range(num_ranks))
    for report in reports.values():
        assert (report["name"], report["world_size"]) == (back_end, num_ranks)
        for dtype in (torch.float32, torch.float64, torch.int64):
            assert report[f"sum {dtype}"] == [[total, 10 * num_ranks], [0, 2 * num_ranks]]
        assert report["number"] == total - num_ranks
        assert report["broadcast"] == gathered[0] == {"rank": 0, "text": '\u00e4\n"\u2028', "none": None, "list": [1.5, True]}
        assert report["gathered"] == gathered
        assert report["empty"] == ["", [None] * num_ranks]


@TWO_AND_THREE
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_every_rank_starts_with_rank_0s_parameters(ranks_agree, rank_work, back_end, num_ranks):
    digests = {report["parameters"] for report in ranks_agree(back_end, num_ranks).reports.values()}
    assert digests == {parameter_digest(rank_work.net(seed=0)).hex()}


@TWO_AND_THREE
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_gradients_are_those_of_the_whole_batch_and_the_same_bits_on_every_rank(ranks_agree, rank_work, back_end, num_ranks):
    folder = ranks_agree(back_end, num_ranks).folder
    for suffix, dtype, tolerance in (("float64.safetensors", torch.float64, 1e-13), ("safetensors", torch.float32, 2e-6)):
        module = rank_work.net(seed=0, dtype=dtype)
        module(rank_work.samples(2, dtype)).backward()
        expected = rank_work.gradients(module)
        by_rank = [load_file(folder / f"{rank}.{suffix}") for rank in range(num_ranks)]
        for name, value in expected.items():
            assert (by_rank[0][name] - value).abs().max() <= tolerance * value.abs().max(), name
            assert all(torch.equal(by_rank[0][name], other[name]) for other in by_rank[1:]), name


@pytest.mark.horovod
@pytest.mark.mpi
def test_two_ranks_get_the_same_gradients_from_both_back_ends(ranks_agree):
    """With two ranks there is one order in which to add: not only near, but equal."""
    torchs, horovods = (load_file(ranks_agree(back_end, 2).folder / "0.safetensors") for back_end in ("torch", "horovod"))
    assert all(torch.equal(torchs[name], horovods[name]) for name in torchs)


@TWO_AND_THREE
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_a_rank_that_differs_is_named_on_every_rank(ranks_agree, back_end, num_ranks):
    for report in ranks_agree(back_end, num_ranks).reports.values():
        assert report["odd"].startswith(f"the digests differ between the ranks: rank 1 of {num_ranks} ")


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_the_first_step_after_a_resume_has_the_bits_of_any_other(back_end, run_processes, run_mpirun):
    """Three ranks: from there on the layout of the buckets decides the order of summation."""
    ended = run_processes(3, "layout", "torch") if back_end == "torch" else run_mpirun(3, "layout", back_end)
    assert set(ended.codes) == {0}, ended.stderr
    for rank in range(3):
        straight, resumed = (load_file(ended.folder / f"{rank}.{name}.safetensors") for name in ("straight", "resumed"))
        assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize("scenario", ["killed-in-sum", "killed-in-training"])
def test_sigkill_of_a_rank_is_an_error_of_the_other_and_not_a_hang(run_processes, scenario):
    ended = run_processes(2, scenario, "torch")
    assert ended.codes == [75, -signal.SIGKILL], ended.stderr
    assert ended.reports[0]["error"] == "RankLostError"
    assert "The last checkpoint is good" in ended.reports[0]["message"]
    assert f"lost rank 1 on {socket.gethostname()} during" in ended.reports[0]["message"]


@pytest.mark.parametrize("scenario", ["stopped-in-sum", "stopped-in-training"])
def test_a_rank_that_hangs_is_an_error_of_the_other_after_the_time_out(run_processes, scenario):
    ended = run_processes(2, scenario, "torch", "3")
    assert ended.codes[0] == 75, ended.stderr
    assert ended.reports[0]["error"] == "RankLostError"
    assert "time-out 3 s" in ended.reports[0]["message"]
    assert f"lost rank 1 on {socket.gethostname()} during" in ended.reports[0]["message"]


@pytest.mark.horovod
@pytest.mark.mpi
@pytest.mark.parametrize("scenario", ["stopped-in-sum", "stopped-in-training"])
def test_horovod_does_not_wait_for_ever_for_a_rank_that_hangs(run_mpirun, scenario):
    ended = run_mpirun(2, scenario, "horovod", "3")
    assert ended.codes == [75], ended.stderr  # mpirun's, which is that of the first rank to fail; 124 would be the test's limit
    assert ended.reports[0]["error"] == "RankLostError"


@pytest.mark.horovod
@pytest.mark.mpi
def test_sigkill_of_a_rank_ends_a_horovod_job(run_mpirun):
    ended = run_mpirun(2, "killed-in-training", "horovod", "20")
    assert ended.codes[0] not in (0, 124), ended.stderr


@pytest.mark.mpi
def test_torch_ranks_meet_in_the_run_directory_under_mpirun(run_mpirun):
    ended = run_mpirun(2, "nothing", "torch")
    assert ended.codes == [0], ended.stderr
    assert sorted(ended.reports) == [0, 1]
    assert not list(ended.folder.glob(".rendezvous*"))


def test_torch_ranks_end_in_order_under_torchrun(run_alone):
    """A thread of gloo that needs the interpreter's lock after its end aborts the process, which torchrun tells."""
    ended = run_alone(["-m", "torch.distributed.run", "--nproc-per-node", "2"], "layout", "torch")
    assert ended.codes == [0], ended.stderr
    assert sorted(ended.reports) == [0, 1]


@pytest.mark.horovod
@pytest.mark.mpi
def test_horovod_without_an_mpi_starter_says_what_it_needs(run_alone):
    ended = run_alone([], "nothing", "horovod", rank=0, world_size=2)
    assert ended.codes == [64], ended.stderr
    assert "MPI says rank 0 of 1" in ended.reports[0]["message"]
    assert "mpirun" in ended.reports[0]["message"]


def test_a_missing_horovod_is_said_with_its_remedy(run_alone):
    hidden = "import sys, runpy; sys.modules['horovod'] = None; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
    ended = run_alone(["-c", hidden], "nothing", "horovod", rank=0, world_size=2)
    assert ended.codes == [71], ended.stderr
    assert "make horovod" in ended.reports[0]["message"]
