"""The whole way, on real proteins: right numbers, right order, nothing lost, and what happens when it cannot go on."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from prottrans_hpc import errors, terminal
from prottrans_hpc.embed import compute, h5file
from prottrans_hpc.embed import proteins as windows


def content(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path, "r") as file:
        return {name: dataset[()] for name, dataset in file.items()}


def names(proteins):
    return [name.encode() for name, _ in proteins]


def small_pieces(monkeypatch):
    """Many windows, and a part for every batch."""
    monkeypatch.setattr(windows, "WINDOW_RESIDUES", 3_000)
    monkeypatch.setattr(compute, "_PART_BYTES", 1)


def test_vectors_are_those_of_each_protein_alone_in_the_order_of_the_input(embed, proteins, one_by_one, monkeypatch):
    small_pieces(monkeypatch)
    found = content(embed(per_residue=True))
    assert list(found["names"]) == names(proteins)
    assert found["lengths"].tolist() == [len(residues) for _, residues in proteins]
    assert found["offsets"].tolist() == [0, *np.cumsum(found["lengths"]).tolist()]
    assert found["residues"].dtype == found["mean"].dtype == np.float32
    for place, (_, residues) in enumerate(proteins):
        alone = one_by_one(residues)
        start, end = found["offsets"][place : place + 2]
        assert np.abs(found["residues"][start:end] - alone).max() <= 1e-5
        assert np.abs(found["mean"][place] - alone.mean(0, dtype=np.float64)).max() <= 1e-5


@pytest.mark.parametrize("bin_residues", [1, 5_000, 1_000_000])
def test_batch_mates_do_not_matter(embed, tmp_path, bin_residues):
    usual, other = content(embed(per_residue=True)), content(embed(per_residue=True, bin_residues=bin_residues, out=str(tmp_path / "other.h5")))
    assert np.abs(usual["residues"] - other["residues"]).max() <= 1e-5
    assert np.abs(usual["mean"] - other["mean"]).max() <= 1e-5


COMMON = {"names", "lengths", "failed_names", "failed_reasons"}


@pytest.mark.parametrize(
    ("per_residue", "pool", "extra"),
    [(False, "mean", {"mean"}), (True, "mean", {"mean", "residues", "offsets"}), (True, "none", {"residues", "offsets"})],
)
def test_the_flags_decide_which_datasets_there_are(embed, per_residue, pool, extra):
    path = embed(per_residue=per_residue, pool=pool)
    assert set(content(path)) == COMMON | extra
    assert h5file.problems(path) == []
    with h5py.File(path, "r") as file:
        assert all(dataset.chunks is None and dataset.compression is None for dataset in file.values())


def test_nothing_to_write_is_a_usage_error(embed):
    with pytest.raises(errors.ConfigError, match="leaves nothing to write"):
        embed(pool="none")


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 2e-3), ("bf16", 5e-2)])
def test_half_precision_is_close_to_fp32_and_stored_in_two_bytes(embed, tmp_path, precision, tolerance):
    full, half = content(embed(per_residue=True)), content(embed(per_residue=True, precision=precision, out=str(tmp_path / "half.h5")))
    for name in ("residues", "mean"):
        assert half[name].dtype == np.float16
        assert np.abs(half[name].astype(np.float32) - full[name]).max() <= tolerance
        ours, theirs = half[name].astype(np.float64), full[name].astype(np.float64)
        cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
        assert cosine.min() > 0.9995


def test_the_attributes_say_where_the_numbers_come_from(embed, tiny_checkpoint):
    attributes = h5file.read_attributes(embed(precision="fp16"))
    import hashlib

    assert attributes["manifest_sha256"] == hashlib.sha256((tiny_checkpoint / "manifest.json").read_bytes()).hexdigest()
    wanted = {"architecture": "prot_bert", "size": "tiny", "step": 0, "precision": "fp16", "dtype": "float16", "computed_in": "float32", "width": 64}
    assert {name: attributes[name] for name in wanted} == wanted
    assert (attributes["num_proteins"], attributes["num_embedded"], attributes["num_failed"]) == (60, 60, 0)
    assert attributes["tool_version"]
    assert "B O U Z -> X" in attributes["rules"]


ODD = [(b"empty", b""), (b"jay", b"MKJV"), (b"long", b"MKVLA" * 600), (b"digits", b"MK1V"), (b"stops", b"**")]


@pytest.mark.parametrize("invalid", ["error", "skip", "x"])
def test_every_protein_is_embedded_or_failed_exactly_once(embed, fasta, proteins, capsys, invalid):
    """Odd records at the start, in the middle and at the end; a name that occurs three times."""
    records = [(name.encode(), residues.encode()) for name, residues in proteins]
    mixed = [*ODD[:2], *records[:20], ODD[2], records[3], *records[20:], records[3], *ODD[3:]]
    fasta.write_bytes(b"".join(b">%s\n%s\n" % record for record in mixed))
    found = content(embed(invalid=invalid, per_residue=True))
    replaced = {b"jay", b"digits"} if invalid == "x" else set()
    odd = [name for name, _ in ODD if name not in replaced]
    assert list(found["failed_names"]) == odd
    assert list(found["names"]) == [name for name, _ in mixed if name not in odd]
    assert found["lengths"].tolist() == [len(residues) for name, residues in mixed if name not in odd]
    reasons = dict(zip(found["failed_names"], found["failed_reasons"], strict=True))
    assert reasons[b"long"] == b"3,000 residues, but the model's position table holds 2,558 at most"
    assert reasons[b"empty"] == reasons[b"stops"] == b"the record has no residues"
    assert replaced or (reasons[b"jay"], reasons[b"digits"]) == (b"the character 'J' is no residue", b"the character '1' is no residue")
    said = capsys.readouterr().err
    assert f"{len(odd)} proteins could not be embedded:\n  " in said
    assert "\n  long: 3,000 residues" in said
    assert f"1 name occurs more than once, the first is {records[3][0].decode()}" in said
    same = [place for place, name in enumerate(found["names"]) if name == records[3][0]]
    assert len(same) == 3
    assert np.abs(found["mean"][same] - found["mean"][same[0]]).max() <= 1e-5


def test_letters_as_they_come(embed, fasta, one_by_one):
    """Lower case, rare residues, gaps, a stop, CRLF and several lines: the residues that the rules make of them."""
    fasta.write_bytes(b">a x y\r\nmkub\r\nV-L*\r\n\r\n>b\r\nACD\r\n")
    found = content(embed(per_residue=True))
    assert found["lengths"].tolist() == [6, 3]
    assert np.abs(found["residues"][:6] - one_by_one("MKXXVL")).max() <= 1e-5


def test_names_are_stored_raw_and_never_shown_raw(embed, fasta, capsys):
    raw = ["prot\u00e9ine".encode(), b"prot\xe9ine", b"x\x7fy\x9b31m", "bi\u202edi".encode(), b"long" * 400]
    bad = [b"\x9b2Jbad", "bi\u202ebad".encode()]
    fasta.write_bytes(b"".join(b">%s\nMKV\n" % name for name in raw) + b"".join(b">%s\nMJ\n" % name for name in bad))
    terminal.set_verbosity(terminal.VERBOSE)
    found = content(embed())
    assert list(found["names"]) == raw
    assert list(found["failed_names"]) == bad
    said = capsys.readouterr().err
    assert not any(character in said for character in "\x9b\x7f\u202e\x1b\ufffd")
    assert "bi\\u202ebad: the character 'J' is no residue" in said


def test_two_files_are_read_one_after_the_other(embed, fasta, tmp_path, proteins):
    import gzip

    more = tmp_path / "more.fa.gz"
    more.write_bytes(gzip.compress(b">one\nMKV\n>two\nMKL\n"))
    assert list(content(embed(fasta=[str(more), str(fasta)]))["names"]) == [b"one", b"two", *names(proteins)]


def test_the_same_command_again_says_that_it_is_done(embed, fasta, tmp_path, capsys):
    path = embed()
    before = (path.read_bytes(), path.stat().st_ino)
    moved = tmp_path / "elsewhere.fasta"
    moved.write_bytes(fasta.read_bytes())
    capsys.readouterr()
    embed(fasta=[str(moved)], json=True)
    said = capsys.readouterr()
    assert f"{path} is complete already" in said.err
    summary = json.loads(said.out)
    assert (summary["num_embedded"], summary["complete_before"], summary["out"]) == (60, True, str(path))
    assert (path.read_bytes(), path.stat().st_ino) == before


def test_the_same_request_gives_the_same_bytes(embed, tmp_path):
    first = embed(per_residue=True)
    time.sleep(1.1)  # a time stamp in the file would differ now
    assert first.read_bytes() == embed(per_residue=True, out=str(tmp_path / "again.h5")).read_bytes()


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"per_residue": True}, "options.per_residue: False -> True"),
        ({"precision": "fp16"}, "options.precision: 'fp32' -> 'fp16'"),
        ({"invalid": "x"}, "options.invalid: 'error' -> 'x'"),
        ({"bin_residues": 99}, "options.bin_residues: 16384 -> 99"),
    ],
)
def test_a_finished_file_of_another_request_is_not_overwritten(embed, choices, said):
    path = embed()
    before = path.read_bytes()
    with pytest.raises(errors.IdentityError) as caught:
        embed(**choices)
    assert said in str(caught.value)
    assert "give another --out" in str(caught.value)
    assert path.read_bytes() == before
    assert not path.with_name("out.h5.parts").exists()


def test_other_proteins_are_another_request(embed, fasta):
    embed()
    fasta.write_text(fasta.read_text().replace("\nM", "\nA", 1))
    with pytest.raises(errors.IdentityError, match=r"input\.sha256"):
        embed()


def test_other_weights_are_another_request(embed, tiny_checkpoint, tmp_path):
    from prottrans_hpc.train import checkpoint

    embed()
    record, shape, weights = checkpoint.load_model(tiny_checkpoint)
    weights["embeddings.words.weight"][3, 3] += 1.0
    checkpoint.write_model_checkpoint(tmp_path / "other", record=record, shape=shape, weights=weights, origin={})
    with pytest.raises(errors.IdentityError, match=r"checkpoint\.manifest_sha256"):
        embed(source=str(tmp_path / "other"))


@pytest.mark.parametrize("stranger", [b"", b"my thesis", b"\x89HDF\r\n\x1a\n" + bytes(2000)])
def test_a_file_that_is_not_ours_is_not_overwritten(embed, tmp_path, stranger):
    (tmp_path / "out.h5").write_bytes(stranger)
    with pytest.raises(errors.DataError, match=r"out\.h5 is damaged, or no file of `prottrans embed`.*give another --out"):
        embed()
    assert (tmp_path / "out.h5").read_bytes() == stranger
    h5py.File(tmp_path / "other.h5", "w").close()
    with pytest.raises(errors.DataError, match="no file of"):
        embed(out=str(tmp_path / "other.h5"))


def test_a_flipped_bit_in_the_finished_file_is_found(embed):
    path = embed(per_residue=True)
    with h5py.File(path, "r") as file:
        places = {name: file[name].id.get_offset() for name in ("mean", "residues", "lengths", "offsets")}
    whole = path.read_bytes()
    places |= {"names": whole.index(b"\0" + content(path)["names"][7]) + 2}
    for name, place in places.items():
        path.write_bytes(whole[: place + 9] + bytes([whole[place + 9] ^ 8]) + whole[place + 10 :])
        with pytest.raises(errors.DataError, match=f"the dataset {name} is damaged"):
            embed(per_residue=True)
    path.write_bytes(whole)
    embed(per_residue=True)


def test_nothing_at_all_embedded_leaves_no_file(embed, fasta, tmp_path):
    fasta.write_text(">a\nJJ\n>b\n\n")
    with pytest.raises(
        errors.DataError, match=r"none of the 2 proteins could be embedded[\s\S]*a: the character 'J' is no residue\n  b: the record has no residues"
    ) as caught:
        embed()
    assert caught.value.exit_code == 65
    assert sorted(os.listdir(tmp_path)) == ["proteins.fasta"]


def test_a_damaged_input_is_an_error_before_anything_is_computed(embed, fasta, tmp_path):
    fasta.write_bytes(fasta.read_bytes() + b">a\nMK\x00V\n")
    with pytest.raises(errors.DataError, match=r"proteins\.fasta, line \d+.*NUL"):
        embed()
    assert sorted(os.listdir(tmp_path)) == ["proteins.fasta"]


def test_no_usable_checkpoint(embed, tmp_path, tiny_checkpoint):
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_checkpoint, damaged)
    weights = next(damaged.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    for source in (tmp_path, tmp_path / "missing", damaged):
        with pytest.raises(errors.CheckpointError):
            embed(source=str(source))


def test_a_gpu_that_is_not_there_is_said(embed):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA GPU")
    with pytest.raises(errors.ResourceError, match="PyTorch finds no CUDA GPU here"):
        embed(device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_gives_the_numbers_of_the_cpu(embed, tmp_path, precision):
    cpu, gpu = content(embed(per_residue=True)), content(embed(per_residue=True, device="cuda", precision=precision, out=str(tmp_path / "gpu.h5")))
    assert np.abs(gpu["residues"].astype(np.float32) - cpu["residues"]).max() <= {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}[precision]


def test_a_signal_stops_after_a_batch_and_the_next_run_goes_on(embed, tmp_path, monkeypatch, capsys):
    small_pieces(monkeypatch)
    undisturbed = embed(per_residue=True, out=str(tmp_path / "undisturbed.h5"))
    written = []
    real = compute._PartWriter.add

    def add(self, extract, **where):
        real(self, extract, **where)
        written.append(where)
        if len(written) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(compute._PartWriter, "add", add)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with pytest.raises(errors.RequeueRequested, match=r"stopped by SIGTERM: .*kept in .*out\.h5\.parts"):
        embed(per_residue=True)
    assert {number: signal.getsignal(number) for number in before} == before
    assert len(list((tmp_path / "out.h5.parts").glob("window-*"))) == 5
    monkeypatch.setattr(compute._PartWriter, "add", real)
    capsys.readouterr()
    embed(per_residue=True, json=True)
    assert json.loads(capsys.readouterr().out)["resumed_batches"] == 5
    assert (tmp_path / "out.h5").read_bytes() == undisturbed.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["out.h5", "proteins.fasta", "undisturbed.h5"]


def test_parts_of_another_request_are_not_mixed_in(embed, tmp_path, monkeypatch):
    small_pieces(monkeypatch)
    monkeypatch.setattr(h5file, "assemble", _interrupted)
    with pytest.raises(errors.RequeueRequested):
        embed()
    monkeypatch.undo()
    with pytest.raises(errors.IdentityError, match=r"out\.h5\.parts holds embeddings of another request.*'fp32' -> 'bf16'.*remove the folder"):
        embed(precision="bf16")


def _interrupted(*arguments, **choices):
    raise errors.RequeueRequested("now")


def test_a_part_that_is_damaged_while_the_others_are_made_is_found(embed, tmp_path, monkeypatch):
    small_pieces(monkeypatch)
    undisturbed = embed(out=str(tmp_path / "undisturbed.h5"))
    real = h5file.assemble

    def damage_first(windows, folder, *arguments, **choices):
        victim = folder.parts[1][0].path
        victim.write_bytes(victim.read_bytes()[:-4] + b"\x00\x00\x00\x01")
        real(windows, folder, *arguments, **choices)

    monkeypatch.setattr(h5file, "assemble", damage_first)
    with pytest.raises(errors.DataError, match="was damaged after it was written"):
        embed()
    assert not (tmp_path / "out.h5").exists()
    monkeypatch.setattr(h5file, "assemble", real)
    assert embed().read_bytes() == undisturbed.read_bytes()


def test_summary_as_json(embed, capsys):
    path = embed(json=True, per_residue=True)
    summary = json.loads(capsys.readouterr().out)
    assert summary["num_proteins"] == summary["num_embedded"] + summary["num_failed"] == 60
    assert summary["bytes"] == path.stat().st_size
    assert summary["seconds"] > 0


# The real command line, in a process of its own.


def test_the_command_line_embeds(prottrans, tiny_checkpoint, fasta, tmp_path, proteins):
    done = prottrans("embed", str(tiny_checkpoint), str(fasta), "--out", str(tmp_path / "cli.h5"), "--json")
    assert json.loads(done.stdout)["num_embedded"] == 60
    assert "60 of 60 proteins embedded, 0 failed" in done.stderr
    assert list(content(tmp_path / "cli.h5")["names"]) == names(proteins)


@pytest.mark.parametrize("limit", [3_000, 18_000, 60_000])
def test_a_full_disk_ends_with_73_and_leaves_nothing_that_looks_whole(prottrans, tiny_checkpoint, fasta, tmp_path, limit):
    """A limit on the size of a file stops writes half way like a full disk: in a part, or in the assembled file."""
    command = [*prottrans.argv, "embed", str(tiny_checkpoint), str(fasta), "--out", str(tmp_path / "out.h5")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)), timeout=300
    )
    whole = (tmp_path / "out.h5").exists()
    assert (done.returncode, whole) == ((0, True) if limit == 60_000 else (73, False)), done.stderr
    if not whole:
        assert "out.h5" in done.stderr
        assert "file system" in done.stderr
        assert "Traceback" not in done.stderr
        assert not list(tmp_path.glob(".out.h5*"))
        assert all(
            h5file_like.name.startswith("window-") or h5file_like.name in ("identity.json", "lock") for h5file_like in (tmp_path / "out.h5.parts").iterdir()
        )
    prottrans("embed", str(tiny_checkpoint), str(fasta), "--out", str(tmp_path / "out.h5"))
    assert h5file.problems(tmp_path / "out.h5") == []


def test_sigterm_ends_the_command_with_75(prottrans, tiny_checkpoint, repository, tmp_path):
    sample = repository / "data" / "swissprot201401_sp50_sample10k.fasta.zst"
    command = [*prottrans.argv, "embed", str(tiny_checkpoint), str(sample), "--out", str(tmp_path / "out.h5"), "--per-residue"]
    environment = os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 120
        while not list(tmp_path.glob("out.h5.parts/window-*")) and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 75, said
    assert "stopped by SIGTERM" in said
    assert not (tmp_path / "out.h5").exists()


MEASURE = """
import json, resource, sys
from prottrans_hpc.stage import run_stage
run_stage("embed", json.loads(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_proteins(tiny_checkpoint, repository, small_fasta, tmp_path):
    """Per-residue vectors of 10,000 proteins are 650 MiB; of 600 they are 40."""
    peaks = []
    for fasta in (small_fasta, repository / "data" / "swissprot201401_sp50_sample10k.fasta.zst"):
        out = tmp_path / f"{len(peaks)}.h5"
        request = {"source": str(tiny_checkpoint), "fasta": [str(fasta)], "out": str(out), "per_residue": True, "pool": "mean", "precision": "fp32"}
        request |= {"bin_residues": 16_384, "device": "cpu", "invalid": "error", "json": False}
        environment = os.environ | {"PYTHONPATH": str(repository)}
        done = subprocess.run([sys.executable, "-c", MEASURE, json.dumps(request)], env=environment, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
    assert out.stat().st_size > 600 << 20
    assert peaks[1] - peaks[0] < 200
