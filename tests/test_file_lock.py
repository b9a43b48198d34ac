"""Locks on files: held, busy, or none to be had; and what each user of one does where there are none."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prottrans_hpc import errors, file_lock
from prottrans_hpc.file_lock import Lock
from prottrans_hpc.launch import lease
from prottrans_hpc.run_dir import RunDir


@pytest.fixture
def open_twice(tmp_path):
    """Two descriptors of one file, as two processes have them."""
    descriptors = [os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT) for _ in range(2)]
    yield descriptors
    for descriptor in descriptors:
        os.close(descriptor)


def test_one_holds_it_others_find_it_busy(open_twice) -> None:
    first, second = open_twice
    assert file_lock.take(first) is Lock.HELD
    assert file_lock.take(second) is file_lock.take(second, shared=True) is Lock.BUSY
    assert file_lock.take(first, shared=True) is Lock.HELD
    assert file_lock.take(second, shared=True) is Lock.HELD


def test_the_lock_of_a_killed_process_is_free(open_twice, tmp_path: Path) -> None:
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'r+'); fcntl.flock(f, fcntl.LOCK_EX); print('mine', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "lock")], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert file_lock.take(open_twice[0]) is Lock.BUSY
        holder.kill()
        assert file_lock.take(open_twice[0], waits=True) is Lock.HELD


def refusing(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(descriptor: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, 524])
def test_a_file_system_without_locks_is_no_error(open_twice, monkeypatch, number: int) -> None:
    refusing(monkeypatch, number)
    assert file_lock.take(open_twice[0]) is file_lock.take(open_twice[0], waits=True) is Lock.NO_LOCKS


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_any_other_fault_is(open_twice, monkeypatch, number: int) -> None:
    refusing(monkeypatch, number)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        file_lock.take(open_twice[0])
    assert errors.exit_code(caught.value) == errors.IO_ERROR


@pytest.mark.parametrize("number", [None, 524])
def test_a_full_disk_under_the_lock_of_a_lease_is_told_as_such(tmp_path, monkeypatch, number: int | None) -> None:
    if number is not None:
        refusing(monkeypatch, number)
    with pytest.raises(OSError, match="No space left") as caught, lease._locked(RunDir(tmp_path)) as is_locked:
        assert is_locked is (number is None)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "lease.json"))
    assert errors.exit_code(caught.value) == errors.CANNOT_WRITE
