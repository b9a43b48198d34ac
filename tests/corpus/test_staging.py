"""A corpus copied to a node's disk: verified, atomic, reused, shared by processes, bounded in space, private."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from prottrans_hpc import durable, errors, file_lock
from prottrans_hpc.corpus import node_disk
from prottrans_hpc.corpus.checking import check_shard
from prottrans_hpc.corpus.index import Index, read_index
from prottrans_hpc.corpus.node_disk import staged_folder
from prottrans_hpc.corpus.staging import Staging
from prottrans_hpc.errors import ConfigError, DataError, ResourceError

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def index(small_corpus: Path, tmp_path: Path) -> Index:
    """A corpus that a test may damage."""
    shutil.copytree(small_corpus, tmp_path / "shared")
    return read_index(tmp_path / "shared")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return tmp_path / "disk"


def stage(index: Index, disk: Path, **options: object) -> Staging:
    """Stage to the end; raises what the copy raises."""
    staging = Staging(index, staged_folder(index, str(disk), {}), **options)
    assert staging.wait(120)
    staging.close()
    if staging.error:
        raise staging.error
    return staging


def files_of(index: Index) -> set[str]:
    return {shard.file for split in index.splits.values() for shard in split.shards}


def versions(folder: Path) -> dict[str, tuple[int, int]]:
    """What another copy of a file would not have; a number of a removed file may be given again, so its time as well."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.h5")}


def test_a_staged_corpus_is_a_corpus(index, disk):
    folder = stage(index, disk).folder
    assert {path.name for path in folder.iterdir()} == files_of(index) | {"index.json", node_disk.JOURNAL}
    copy = read_index(folder)
    assert copy.sha256 == index.sha256
    assert [check_shard((copy.shard_path(shard), shard)).problems for split in copy.splits.values() for shard in split.shards] == [(), (), ()]
    assert folder == disk / f"prottrans-{os.getuid()}" / index.sha256[:16]
    assert [path.stat().st_mode & 0o077 for path in (disk, folder.parent, folder)] == [0, 0, 0]


def test_the_validation_shards_are_staged_as_well(index, disk):
    assert {name.partition("-")[0] for name in versions(stage(index, disk).folder)} == {"train", "validation"}


def test_what_is_there_is_reused_and_what_has_changed_is_not(index, disk):
    folder = stage(index, disk).folder
    before = versions(folder)
    again = stage(index, disk)
    assert versions(folder) == before
    assert again.num_bytes_ready == index.num_bytes
    (folder / "train-00000.h5").write_bytes((folder / "train-00000.h5").read_bytes())  # the same content, another time
    (folder / "validation-00000.h5").unlink()
    stage(index, disk)
    assert {name for name, version in versions(folder).items() if version != before[name]} == {"train-00000.h5", "validation-00000.h5"}


def flip(path: Path) -> None:
    """Change a bit and put the time back: no look at the file itself shows it."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_hidden_change_is_found_by_the_full_check(index, disk):
    folder = stage(index, disk).folder
    flip(folder / "train-00001.h5")
    damaged = durable.sha256_of(folder / "train-00001.h5")
    stage(index, disk)
    assert durable.sha256_of(folder / "train-00001.h5") == damaged
    stage(index, disk, rehash=True)
    assert {path.name: durable.sha256_of(path) for path in folder.glob("*.h5")} == {
        shard.file: shard.sha256 for split in index.splits.values() for shard in split.shards
    }


def test_a_damaged_source_is_named_and_never_staged(index, disk):
    flip(index.path / "train-00001.h5")
    with pytest.raises(DataError, match=r"shared/train-00001.h5 is damaged"):
        stage(index, disk)
    folder = staged_folder(index, str(disk), {})
    assert not (folder / "train-00001.h5").exists()
    assert not (folder / "index.json").exists()
    assert not [path for path in folder.iterdir() if durable.is_temporary(path)]


def test_a_read_that_goes_wrong_once_is_repeated(index, disk, monkeypatch, caplog):
    """What a network garbles now and then must not end a job of a thousand nodes."""
    honest, garbled = Staging._chunks, []

    def garble_once(self, path):
        for chunk in honest(self, path):
            if path.name == "train-00001.h5" and not garbled:
                garbled.append(path)
                chunk[0] ^= 255
            yield chunk

    monkeypatch.setattr(Staging, "_chunks", garble_once)
    folder = stage(index, disk).folder
    assert garbled
    assert "read once more" in caplog.text
    assert durable.sha256_of(folder / "train-00001.h5") == durable.sha256_of(index.path / "train-00001.h5")


def test_a_missing_source_is_named(index, disk):
    (index.path / "validation-00000.h5").unlink()
    with pytest.raises(DataError, match=r"shared/validation-00000.h5 is missing"):
        stage(index, disk)


def test_a_kill_in_the_middle_leaves_only_what_was_verified(index, disk, tmp_path):
    """The second shard never ends: a pipe stands in for a file system that is slow."""
    slow = index.path / "train-00001.h5"
    content = slow.read_bytes()
    slow.unlink()
    os.mkfifo(slow)
    program = (
        "import sys; from prottrans_hpc.corpus.index import read_index; from prottrans_hpc.corpus.staging import Staging; from pathlib import Path\n"
        "Staging(read_index(sys.argv[1]), Path(sys.argv[2])).wait(600)"
    )
    folder = staged_folder(index, str(disk), {})
    process = subprocess.Popen([sys.executable, "-c", program, str(index.path), str(folder)], env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    try:
        with slow.open("wb", buffering=0) as pipe:
            pipe.write(content[: len(content) // 2])
            deadline = time.monotonic() + 180
            while len(node_disk.read_journal(folder)) < 2 or not any(path.stat().st_size for path in folder.glob(".train-00001*")):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
    finally:
        process.kill()
    assert set(versions(folder)) == {"train-00000.h5", "validation-00000.h5"}
    assert [path for path in folder.iterdir() if durable.is_temporary(path)]
    before = versions(folder)
    slow.unlink()
    slow.write_bytes(content)
    stage(index, disk)
    assert versions(folder).items() >= before.items()
    assert not [path for path in folder.iterdir() if durable.is_temporary(path)]
    assert read_index(folder).sha256 == index.sha256


def test_a_torn_line_of_the_journal_costs_a_copy_and_no_more(index, disk):
    folder = stage(index, disk).folder
    journal = folder / node_disk.JOURNAL
    torn = journal.read_bytes()[:-20]
    lost = set(node_disk.read_journal(folder))
    journal.write_bytes(torn)
    lost -= set(node_disk.read_journal(folder))
    assert len(lost) == 1
    before = versions(folder)
    stage(index, disk)
    assert {name for name, version in versions(folder).items() if version != before[name]} == lost
    assert set(node_disk.read_journal(folder)) == files_of(index)


def test_concurrent_starts_copy_once(index, disk, monkeypatch):
    copied = []
    honest = Staging._copy_shard
    monkeypatch.setattr(Staging, "_copy_shard", lambda self, shard: (copied.append(shard.file), time.sleep(0.2), honest(self, shard)))
    stagings = [Staging(index, staged_folder(index, str(disk), {})) for _ in range(3)]
    assert all(staging.wait(120) for staging in stagings)
    assert [staging.error for staging in stagings] == [None] * 3
    assert sorted(copied) == sorted(files_of(index))
    for staging in stagings:
        staging.close()


def test_a_copy_that_is_told_to_stop_stops(index, disk):
    slow = index.path / "train-00001.h5"
    slow.unlink()
    os.mkfifo(slow)
    with slow.open("r+b", buffering=0) as pipe:
        staging = Staging(index, staged_folder(index, str(disk), {}))
        threading.Timer(0.5, lambda: pipe.write(b"x" * 1000)).start()
        assert not staging.wait(0.2)
        staging.close()
    assert staging.wait(0)
    assert not (staging.folder / "index.json").exists()


def test_the_copy_is_removed_unless_somebody_reads_it(index, disk):
    first, second = (Staging(index, staged_folder(index, str(disk), {})) for _ in range(2))
    assert first.wait(120)
    assert second.wait(120)
    first.close(remove=True)
    assert (first.folder / "index.json").exists()
    second.close(remove=True)
    assert not first.folder.exists()


def test_nodes_begin_at_different_shards(index, disk, monkeypatch):
    monkeypatch.setattr("prottrans_hpc.corpus.staging._NUM_THREADS", 1)
    order = []
    honest = Staging._copy_shard
    monkeypatch.setattr(Staging, "_copy_shard", lambda self, shard: (order.append(shard.file), honest(self, shard)))
    for number in range(3):
        (disk / str(number)).mkdir(parents=True)
        stage(index, disk / str(number), begin_at=number / 3)
    assert [order[0], order[3], order[6]] == ["train-00000.h5", "train-00001.h5", "validation-00000.h5"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)], capture_output=True).returncode:
        pytest.skip("this user may not mount a small file system")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_too_little_space_is_told_with_numbers_before_anything_is_copied(index, small_disk):
    (small_disk / "taken").write_bytes(bytes((4 << 20) - 100_000))
    with pytest.raises(OSError, match=r"0\.[1-9] MB of the corpus are to be staged there, 0\.\d MB are free") as caught:
        stage(index, small_disk)
    assert errors.exit_code(caught.value) == errors.CANNOT_WRITE
    assert f"(file system {small_disk})" in errors.explain(caught.value)
    assert not list(small_disk.rglob("*.h5"))


def test_a_disk_that_fills_up_meanwhile_is_named(index, small_disk, monkeypatch):
    monkeypatch.setattr(node_disk, "require_space", lambda folder, needed: None)
    (small_disk / "taken").write_bytes(bytes((4 << 20) - 100_000))
    with pytest.raises(OSError, match="No space left") as caught:
        stage(index, small_disk)
    assert errors.exit_code(caught.value) == errors.CANNOT_WRITE
    assert f"(file system {small_disk})" in errors.explain(caught.value)
    assert not [path for path in small_disk.rglob("*") if durable.is_temporary(path)]


def test_unused_corpora_make_room_and_used_ones_do_not(index, small_disk):
    folder = staged_folder(index, str(small_disk), {})
    node_disk.make_private(folder.parent)
    unused, used = folder.with_name("0" * 16), folder.with_name("1" * 16)
    for other in (unused, used):
        other.mkdir()
        (other / "train-00000.h5").write_bytes(bytes(2_050_000))
    descriptor = node_disk.lock_file(used, "lock")
    assert file_lock.take(descriptor, shared=True) is file_lock.Lock.HELD
    try:
        stage(index, small_disk)
    finally:
        os.close(descriptor)
    assert used.exists()
    assert not unused.exists()


@pytest.mark.parametrize(
    ("disk", "environment", "said"),
    [
        ("/mnt/bb/$USER", {}, "the environment variable USER is not set on this node"),
        ("/mnt/bb/$", {"USER": "ada"}, "not followed by a variable's name"),
        ("$SCRATCH", {"SCRATCH": "scratch"}, "must be an absolute path"),
    ],
)
def test_a_path_that_cannot_be_used_is_refused(index, disk, environment, said):
    with pytest.raises(ConfigError, match=said.replace("$", r"\$")):
        staged_folder(index, disk, environment)


def test_variables_of_the_node_are_in_the_path(index):
    environment = {"USER": "ada", "SLURM_JOB_ID": "17"}
    folder = staged_folder(index, "/mnt/${USER}/$SLURM_JOB_ID", environment)
    assert folder == Path("/mnt/ada/17", f"prottrans-{os.getuid()}", index.sha256[:16])


def test_a_mount_that_is_missing_is_no_folder_to_make(index, tmp_path):
    with pytest.raises(ResourceError, match="this node has no"):
        stage(index, tmp_path / "mnt" / "bb")
    assert not (tmp_path / "mnt").exists()


def test_a_folder_that_others_can_open_is_refused(index, disk):
    disk.mkdir()
    mine = disk / f"prottrans-{os.getuid()}"
    mine.mkdir(mode=0o755)
    mine.chmod(0o755)
    with pytest.raises(ResourceError, match="open to others"):
        stage(index, disk)
    mine.rmdir()
    elsewhere = disk / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    mine.symlink_to(elsewhere)
    with pytest.raises(ResourceError, match="is no folder"):
        stage(index, disk)
    assert not list(elsewhere.iterdir())


def test_an_index_that_changes_meanwhile_is_noticed(index, disk):
    values = json.loads((index.path / "index.json").read_text())
    (index.path / "index.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match="has changed"):
        stage(index, disk)
