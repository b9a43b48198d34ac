"""The gang of one, what travels as an object, and how ranks meet: threads stand for ranks where no collective is needed."""

from __future__ import annotations

import json
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from prottrans_hpc import comm, comm_rendezvous
from prottrans_hpc.errors import ConfigError, ProttransError, RankLostError, ResourceError
from prottrans_hpc.rank import RankContext
from prottrans_hpc.recipe_parallel import Parallel

CPU = torch.device("cpu")


def place(rank, world_size, *, num_nodes=1):
    local = world_size // num_nodes
    return RankContext(rank, world_size, rank % local, local, rank // local, num_nodes, socket.gethostname(), "mpirun")


@pytest.mark.parametrize("back_end", ["torch", "horovod"])
def test_one_rank_needs_no_back_end(back_end):
    alone = comm.open_comm(Parallel(comm=back_end), place(0, 1), device=CPU)
    assert (alone.name, alone.rank, alone.world_size, alone.device) == ("solo", 0, 1, CPU)
    given = torch.tensor([1.0, 2.0])
    summed = alone.all_reduce_sum(given)
    assert torch.equal(summed, given)
    assert summed.data_ptr() != given.data_ptr()
    assert alone.broadcast_object({"a": (1, 2)}) == {"a": [1, 2]}
    assert alone.all_gather_object("x") == ["x"]
    alone.barrier()
    comm.check_same(alone, "nothing", b"digest")
    alone.close()


def test_the_gradients_of_one_rank_add_up_over_micro_batches():
    layer = torch.nn.Linear(3, 2)
    model = comm.Solo(CPU).parallel(layer, 25)
    for _ in range(2):
        model.zero_gradients()
        with model.no_sync():
            model.backward(model.module(torch.ones(1, 3)).sum())
        model.backward(model.module(torch.ones(4, 3)).sum())
        model.finish_gradients()
        assert torch.equal(layer.weight.grad, torch.full((2, 3), 5.0))


def test_what_is_not_json_does_not_travel():
    with pytest.raises(TypeError):
        comm.Solo(CPU).broadcast_object({"a": object()})
    assert comm.decode(comm.encode({"text": "\u00e4\n", "n": None})) == {"text": "\u00e4\n", "n": None}
    assert b"\n" not in comm.encode("a\nb\u2028")


def test_a_digest_sees_one_flipped_bit_and_a_changed_name():
    layer = torch.nn.Linear(3, 2)
    before = comm.parameter_digest(layer)
    assert comm.parameter_digest(layer) == before
    layer.weight.data.view(torch.int32)[1, 1] ^= 1
    assert comm.parameter_digest(layer) != before
    layer.weight.data.view(torch.int32)[1, 1] ^= 1
    assert comm.parameter_digest(layer) == before
    assert comm.parameter_digest(torch.nn.Sequential(layer)) != before


def test_what_names_a_start():
    pmix = {"PMIX_NAMESPACE": "prterun-node-1@1"}
    assert comm.require_nonce({"PROTTRANS_NONCE": "abc", **pmix}) == "abc"
    assert comm.require_nonce(pmix) == "prterun-node-1@1"
    assert comm.require_nonce({"TORCHELASTIC_RUN_ID": "job", "TORCHELASTIC_RESTART_COUNT": "2"}) == "job-2"
    assert comm.require_nonce({"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "3"}) == "17-3"
    with pytest.raises(ConfigError, match="PROTTRANS_NONCE"):
        comm.require_nonce({"SLURM_JOB_ID": "17"})


def meet(environments, *, contexts=None, run_dir=None, timeout_s=20):
    """What `connect` gives each rank: a store or an error."""
    contexts = contexts or [place(rank, len(environments)) for rank in range(len(environments))]

    def one(context, environment):
        try:
            return comm_rendezvous.connect(context, timeout_s=timeout_s, run_dir=run_dir, environment=environment)
        except ProttransError as error:
            return error

    with ThreadPoolExecutor(len(contexts)) as pool:
        return list(pool.map(one, contexts, environments))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def master(nonce="word", port=None):
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port or free_port(), "PROTTRANS_NONCE": nonce}


def test_ranks_meet_where_the_starter_says():
    environment = master()
    stores = meet([environment] * 3)
    stores[0].set("key", "value")
    assert [store.get("key") for store in stores] == [b"value"] * 3


@pytest.mark.parametrize("num_nodes", [1, 3])
def test_ranks_meet_in_the_run_directory_and_leave_nothing_there(tmp_path, num_nodes):
    contexts = [place(rank, 3, num_nodes=num_nodes) for rank in range(3)]
    stores = meet([{"PMIX_NAMESPACE": "job@1"}] * 3, contexts=contexts, run_dir=tmp_path)
    stores[2].set("key", "value")
    assert [store.get("key") for store in stores] == [b"value"] * 3
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("way", ["given", "published"])
def test_the_store_of_ranks_on_one_host_listens_on_the_loopback_address_alone(tmp_path, way):
    if not (own := own_address()):
        pytest.skip("this host has the loopback address alone")
    environment = master() if way == "given" else {"PROTTRANS_NONCE": "word"}
    store = meet([environment] * 2, run_dir=tmp_path)[0]
    port = store.underlying_store.port
    socket.create_connection(("127.0.0.1", port), timeout=10).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((own, port), timeout=10)


def own_address():
    """An address of this host that is not the loopback one; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        address = probe.getsockname()[0]
    return None if address.startswith("127.") else address


def test_a_rank_that_reaches_the_store_of_another_job_leaves_and_says_so():
    port = free_port()
    mine, foreign = meet([master("mine", port), master("xyzzy", port)])
    assert isinstance(foreign, ConfigError)
    assert "another start" in str(foreign)
    assert "xyzzy" not in str(foreign)  # the nonce itself is a secret
    assert not isinstance(mine, ProttransError)


def test_two_processes_with_one_rank_are_refused():
    environment = master()
    results = meet([environment] * 3, contexts=[place(0, 2), place(1, 2), place(1, 2)])
    refused = [result for result in results if isinstance(result, ConfigError)]
    assert len(refused) == 1
    assert "two processes" in str(refused[0])


def test_a_taken_port_is_said_with_its_number():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(ResourceError, match=port):
            comm_rendezvous.connect(place(0, 2), timeout_s=3, run_dir=None, environment=master(port=port))


def test_ranks_that_never_come_are_an_error_after_the_time_out(tmp_path):
    environment = {"PROTTRANS_NONCE": "word"}
    with pytest.raises(RankLostError, match="only 0 of the 2 other ranks"):
        comm_rendezvous.connect(place(0, 3), timeout_s=1, run_dir=tmp_path, environment=environment)
    assert not os.listdir(tmp_path)
    with pytest.raises(RankLostError, match="waited for rank 0"):
        comm_rendezvous.connect(place(1, 3), timeout_s=1, run_dir=tmp_path, environment=environment)
    with pytest.raises(RankLostError, match="cannot reach rank 0"):
        comm_rendezvous.connect(place(1, 3), timeout_s=1, run_dir=tmp_path, environment=master())


def test_the_address_left_by_a_killed_start_does_not_mislead_the_next_one(tmp_path):
    """Rank 0 of a start that was killed could not remove its file; a new start has a new nonce, hence another file."""
    dead = {"address": "127.0.0.1", "port": int(free_port())}
    for nonce in ("old", "older"):
        (tmp_path / f".rendezvous-{comm_rendezvous._short(nonce)}.json").write_text(json.dumps(dead))
    stores = meet([{"PROTTRANS_NONCE": "new"}] * 2, run_dir=tmp_path)
    assert not any(isinstance(store, ProttransError) for store in stores)


def test_there_must_be_a_place_to_meet():
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        comm_rendezvous.connect(place(0, 2), timeout_s=1, run_dir=None, environment={"PROTTRANS_NONCE": "word"})
    with pytest.raises(ConfigError, match="not a number"):
        comm_rendezvous.connect(place(0, 2), timeout_s=1, run_dir=None, environment=master(port="http"))


def test_garbage_on_the_port_does_not_stop_the_ranks():
    """A port scanner, or another program's health check."""
    environment = master()
    stop = threading.Event()

    def disturb():
        while not stop.is_set():
            try:
                with socket.create_connection(("127.0.0.1", int(environment["MASTER_PORT"])), timeout=1) as connection:
                    connection.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(range(256)))
            except OSError:
                stop.wait(0.01)

    noise = threading.Thread(target=disturb)
    noise.start()
    try:
        stores = meet([environment] * 2)
        assert not any(isinstance(store, ProttransError) for store in stores), stores
        stores[0].set("key", "value")
        assert stores[1].get("key") == b"value"
    finally:
        stop.set()
        noise.join()


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2", True),
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation to complete", True),
        ("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Read error [10.0.0.3]:33060: Connection reset by peer", True),
        ("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)", False),
        ("The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0", False),
    ],
)
def test_a_lost_peer_is_told_from_a_bug(text, lost):
    from prottrans_hpc.comm_torch import is_lost_peer

    assert is_lost_peer(RuntimeError(text)) is lost


def test_running_out_of_gpu_memory_is_no_lost_peer():
    from prottrans_hpc.comm_torch import is_lost_peer

    assert not is_lost_peer(torch.OutOfMemoryError("CUDA out of memory while NCCL was running"))
