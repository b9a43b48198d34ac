"""`prottrans embed` as a farm of real local jobs: the same file, byte for byte, as one process writes."""

from __future__ import annotations

import json

import h5py
import pytest

from prottrans_hpc.embed.piece import read_piece

CHOICES = ("--per-residue", "--device", "cpu")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def wanted(tmp_path_factory, tiny_checkpoint, few_fasta, prottrans) -> bytes:
    """The file that one process writes."""
    path = tmp_path_factory.mktemp("wanted") / "out.h5"
    prottrans("embed", str(tiny_checkpoint), str(few_fasta), "--out", str(path), *CHOICES, env=ONE_THREAD)
    with h5py.File(path) as file:
        assert len(file["failed_names"]) == 4
    return path.read_bytes()


@pytest.fixture
def command(tmp_path, tiny_checkpoint, few_fasta, machine):
    profile = machine.folder / "unruly.toml"
    profile.write_text(profile.read_text().replace("num_cpu_cores = 2", "num_cpu_cores = 1"))
    return ("embed", str(tiny_checkpoint), str(few_fasta), "--out", str(tmp_path / "out.h5"), "--machine", machine.profile, *CHOICES)


def test_the_bytes_are_those_of_one_process(tmp_path, prottrans, command, wanted, machine):
    done = prottrans(*command, "--items", "3", "--nodes", "2", "--json")
    assert (tmp_path / "out.h5").read_bytes() == wanted
    summary = json.loads(done.stdout)
    assert (summary["num_embedded"], summary["num_failed"]) == (420, 4)
    assert machine.take_calls() == ["00000.0", "00001.0", "00002.0"]
    assert [path.name for path in tmp_path.iterdir() if path.name != "machine"] == ["out.h5"]
    assert "is complete already" in prottrans(*command, "--items", "3").stderr
    assert machine.take_calls() == []
    # What a kill behind the last rename has left goes, too.
    (tmp_path / "out.h5.farm" / "pieces").mkdir(parents=True)
    (tmp_path / "out.h5.farm").chmod(0o700)
    prottrans(*command, "--items", "3")
    assert [path.name for path in tmp_path.iterdir() if path.name != "machine"] == ["out.h5"]


def test_finished_items_are_not_run_again(tmp_path, prottrans, command, wanted, machine):
    machine.misbehave("00001.0", *["exit 71"] * 3)
    done = prottrans(*command, "--items", "3", code=71)
    assert "embed: job 1 ended with exit code 71" in done.stderr
    assert machine.take_calls() == ["00000.0", *["00001.0"] * 3, "00002.0"]
    states = json.loads((tmp_path / "out.h5.farm" / "embed" / "farm.json").read_text())["jobs"]
    assert [job["state"] for job in states] == ["done", "failed", "done"]
    assert states[1]["codes"] == [71, 71, 71]
    done = prottrans(*command, "--items", "3")
    assert "embed: 2 of 3 jobs were done before" in done.stderr
    assert machine.take_calls() == ["00001.0"]
    assert (tmp_path / "out.h5").read_bytes() == wanted


def test_a_second_model_is_read_on_the_nodes_too(tmp_path, prottrans, command, few_fasta, machine, tiny_checkpoint):
    from prottrans_hpc.train import checkpoint

    record, shape, weights = checkpoint.load_model(tiny_checkpoint)
    weights["embeddings.words.weight"][3, 3] += 1.0
    checkpoint.write_model_checkpoint(tmp_path / "second", record=record, shape=shape, weights=weights, origin={})
    also = ("--also", "second")
    prottrans("embed", str(tiny_checkpoint), str(few_fasta), "--out", str(tmp_path / "one.h5"), *also, *CHOICES, env=ONE_THREAD, cwd=tmp_path)
    prottrans(*command, *also, "--items", "2", cwd=tmp_path)
    assert machine.take_calls() == ["00000.0", "00001.0"]
    assert (tmp_path / "out.h5").read_bytes() == (tmp_path / "one.h5").read_bytes()
    assert "also: {" in prottrans(*command, "--items", "2", code=78).stderr


def test_an_item_that_stopped_with_its_state_saved_goes_on(tmp_path, prottrans, command, wanted, machine):
    machine.misbehave("00000.0", *["exit 75"] * 5)
    prottrans(*command, "--items", "2")
    assert machine.take_calls().count("00000.0") == 6
    assert (tmp_path / "out.h5").read_bytes() == wanted


def test_a_damaged_part_is_computed_again(tmp_path, prottrans, command, wanted, machine):
    machine.misbehave("00001.0", *["exit 71"] * 3)
    prottrans(*command, "--items", "3", code=71)
    (part,) = (tmp_path / "out.h5.farm" / "pieces" / "piece-00000.h5.parts").glob("*.safetensors")
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    done = prottrans(*command, "--items", "3", code=65)
    assert "was damaged after it was written" in done.stderr
    prottrans(*command, "--items", "3")
    assert (tmp_path / "out.h5").read_bytes() == wanted


def test_the_pieces_of_another_request_are_not_taken(tmp_path, prottrans, command, machine):
    machine.misbehave("00000.0", *["exit 71"] * 3)
    prottrans(*command, "--items", "2", code=71)
    done = prottrans(*command, "--items", "2", "--precision", "fp16", code=78)
    assert "precision" in done.stderr
    assert "start over" in done.stderr


def test_no_protein_fits(tmp_path, prottrans, command, few_fasta, machine):
    fasta = tmp_path / "long.fasta"
    fasta.write_bytes(b">a\n" + b"M" * 150_000 + b"\n>b\n" + b"M" * 150_000 + b"\n>c\n" + b"M" * 10_000 + b"\n")
    done = prottrans(*[str(fasta) if word == str(few_fasta) else word for word in command], "--items", "2", code=65)
    assert "none of the 3 proteins could be embedded" in done.stderr
    assert not (tmp_path / "out.h5.farm").exists()


def test_pieces_hold_every_protein_once_and_exactly(tmp_path, prottrans, command, machine, few_fasta):
    from prottrans_hpc.embed import model, records
    from prottrans_hpc.embed.options import Options

    for item in ("00000.0", "00001.0", "00002.0"):
        machine.misbehave(item, *["exit 71"] * 3)
    prottrans(*command, "--items", "3", code=71)
    pieces = sorted((tmp_path / "out.h5.farm" / "pieces").glob("piece-?????"))
    found = [protein for piece in pieces for protein in read_piece(piece)]
    options = Options(few_fasta, (few_fasta,), tmp_path / "x.h5", True, True, "fp32", 16_384, "cpu", "error", False)
    limit = model.read_max_residues(model.find_source(command_source(command)))
    assert found == list(records.open_input(options, limit)())
    assert len(pieces) == 3
    assert all(any(True for _ in read_piece(piece)) for piece in pieces)


def command_source(command):
    from pathlib import Path

    return Path(command[1])
