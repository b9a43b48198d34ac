"""Exit codes and messages of every error that a user can meet."""

from __future__ import annotations

import errno
import inspect

import pytest

from prottrans_hpc import errors

OWN_ERRORS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.ProttransError)]


@pytest.mark.parametrize("kind", OWN_ERRORS)
def test_every_error_ends_with_a_code_that_has_a_meaning(kind):
    assert errors.MEANING[errors.exit_code(kind("what, and what to do"))]
    assert kind is errors.ProttransError or errors.exit_code(kind("")) not in (errors.DONE, errors.BUG)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 73),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 73),
        (OSError(errno.EROFS, "Read-only file system"), 73),
        (PermissionError(errno.EACCES, "Permission denied"), 77),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), 66),
        (OSError(errno.EMFILE, "Too many open files"), 71),
        (OSError(errno.EIO, "Input/output error"), 74),
        (OSError("no errno at all"), 70),
        (OSError(errno.ESTALE, "Stale file handle"), 74),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), 74),
        (OSError(errno.EREMOTEIO, "Remote I/O error"), 74),
        (OSError(errno.ENXIO, "No such device or address"), 74),
        (OSError(errno.EHOSTDOWN, "Host is down"), 74),
        (OSError(errno.ENODEV, "No such device"), 74),
        (OSError(errno.EBUSY, "Device or resource busy"), 74),
        (OSError(errno.ENOLCK, "No locks available"), 74),
        (OSError(524, "Unknown error 524"), 74),
        (OSError(errno.ENAMETOOLONG, "File name too long"), 66),
        (OSError(errno.EADDRINUSE, "Address already in use"), 71),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:132] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"), 71),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), 71),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2.00 GiB"), 71),
        (RuntimeError("expected scalar type Float but found Half"), 70),
        (MemoryError(), 71),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("division by zero"), 70),
    ],
)
def test_exceptions_of_others_map_by_what_the_user_can_do(error, code):
    assert errors.exit_code(error) == code
    assert code in errors.MEANING


def test_a_failed_write_names_the_file_and_its_file_system(tmp_path):
    message = errors.explain(OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "shard.h5")))
    assert "shard.h5: No space left on device" in message
    mount = message.rpartition("(file system ")[2].rstrip(")")
    assert str(tmp_path).startswith(mount)


def test_a_failed_read_names_the_file_only(tmp_path):
    assert errors.explain(FileNotFoundError(errno.ENOENT, "No such file or directory", "/nowhere/a.fasta")) == "/nowhere/a.fasta: No such file or directory"


def test_memory_that_ran_out_is_told_in_one_line():
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.\nframe #0: c10::Error::Error")
    assert errors.explain(error) == "out of memory: DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), ValueError(), errors.DataError("bad"), OSError("odd"), OSError(errno.ENOSPC, "full", 3)])
def test_no_error_explains_itself_with_nothing(error):
    assert errors.explain(error).strip()


def test_a_missing_package_comes_with_the_command_that_installs_it():
    error = errors.missing_package("matplotlib", "plots", "the loss curve")
    assert errors.exit_code(error) == 71
    assert "the loss curve needs" in str(error)
    assert "pip install 'prottrans-hpc[plots]'" in str(error)


def test_horovod_is_built_not_installed_by_pip():
    assert "make horovod" in str(errors.missing_package("horovod", "horovod", "this recipe"))
