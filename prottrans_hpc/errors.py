"""Every error that a user can meet, and the exit code that each one ends a process with.

The codes follow sysexits.h so that batch scripts and schedulers can act on them; ``docs/exit-codes.md``
lists them. 0 is used only when the work that was asked for is done.
"""

from __future__ import annotations

import errno
import os

DONE = 0
USAGE = 64
BAD_DATA = 65
NO_INPUT = 66
BUG = 70
NO_RESOURCES = 71
CANNOT_WRITE = 73
IO_ERROR = 74
REQUEUE = 75
NUMERICS = 76
NO_PERMISSION = 77
IDENTITY = 78
INTERRUPTED = 130

MEANING = {
    DONE: "the work is done",
    USAGE: "the command line, a recipe or a machine profile is wrong",
    BAD_DATA: "the input data are damaged or not what they should be",
    NO_INPUT: "no usable checkpoint or input was found",
    BUG: "an error of the program itself: please report it",
    NO_RESOURCES: "out of memory, processes, file handles or ports, the scheduler refused, or a gate on slow nodes is closed",
    CANNOT_WRITE: "the output cannot be written: disk full, quota, read-only, or no folder to be there",
    IO_ERROR: "a file system, or the network on the way to it, reported an error",
    REQUEUE: "stopped before the end with the state saved: run or requeue the same command",
    NUMERICS: "the training diverged: non-finite loss or gradients",
    NO_PERMISSION: "no permission for a file or directory",
    IDENTITY: "the run, corpus or checkpoint is not the one this command describes",
    INTERRUPTED: "interrupted from the keyboard",
}


class ProttransError(Exception):
    """An error to show to the user as it is: what was asked, what is possible, what to do."""

    exit_code = BUG


class ConfigError(ProttransError):
    """A command line, recipe or machine profile that cannot be honoured."""

    exit_code = USAGE


class DataError(ProttransError):
    """Input data that are damaged, empty or of another format than expected."""

    exit_code = BAD_DATA


class CheckpointError(ProttransError):
    """No checkpoint, corpus or other input that this command could use."""

    exit_code = NO_INPUT


class OutputError(ProttransError, OSError):
    """An output cannot be at the place that was asked for: something else is in the way."""

    exit_code = CANNOT_WRITE


class ResourceError(ProttransError):
    """A package, process, port or amount of memory that could not be had."""

    exit_code = NO_RESOURCES


class SubmitError(ProttransError):
    """The scheduler, or the program that starts ranks, refused."""

    exit_code = NO_RESOURCES


class NumericsError(ProttransError):
    """Training met non-finite losses or gradients that a rollback did not cure."""

    exit_code = NUMERICS


class IdentityError(ProttransError):
    """A resume whose recipe, corpus, vocabulary or architecture is not that of the run."""

    exit_code = IDENTITY


class RankLostError(ProttransError):
    """Another rank died, hangs or left: this start is over, the last checkpoint is good."""

    exit_code = REQUEUE


class NodeError(ProttransError):
    """What failed on one node, told on all ranks; ends them all with the code of what failed there."""

    def __init__(self, message: str, *, code: int = NO_RESOURCES) -> None:
        super().__init__(message)
        self.exit_code = code


class FarmError(ProttransError):
    """A job of a farm failed for good; ends the farm with that job's exit code."""

    def __init__(self, message: str, *, code: int = NO_RESOURCES) -> None:
        super().__init__(message)
        self.exit_code = code


class RequeueRequested(ProttransError):  # noqa: N818 - a request by the scheduler, not a fault
    """The work stopped early on a signal, with its state saved."""

    exit_code = REQUEUE


def missing_package(package: str, extra: str, purpose: str) -> ResourceError:
    """The error for an optional package that is not installed, with the command that installs it."""
    # pip alone cannot build Horovod against today's torch.
    command = "make horovod (in a checkout of prottrans-hpc)" if package == "horovod" else f"pip install 'prottrans-hpc[{extra}]'"
    return ResourceError(f"{purpose} needs the package {package!r}, which is not installed here. Install it with: {command}")


_ERRNO_CODES = {
    errno.ENOSPC: CANNOT_WRITE,
    errno.EDQUOT: CANNOT_WRITE,
    errno.EFBIG: CANNOT_WRITE,
    errno.EROFS: CANNOT_WRITE,
    errno.EEXIST: CANNOT_WRITE,
    errno.ENOTEMPTY: CANNOT_WRITE,
    errno.EACCES: NO_PERMISSION,
    errno.EPERM: NO_PERMISSION,
    errno.ENOENT: NO_INPUT,
    errno.ENOTDIR: NO_INPUT,
    errno.EISDIR: NO_INPUT,
    errno.ELOOP: NO_INPUT,
    errno.ENAMETOOLONG: NO_INPUT,
    errno.EMFILE: NO_RESOURCES,
    errno.ENFILE: NO_RESOURCES,
    errno.EAGAIN: NO_RESOURCES,
    errno.ENOMEM: NO_RESOURCES,
    errno.ENOBUFS: NO_RESOURCES,
    errno.EADDRINUSE: NO_RESOURCES,
}
"""Every other number is an IO_ERROR: network file systems have dozens (ESTALE, EREMOTEIO, 524 ...), and most go away by themselves."""

_OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "not enough memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""How torch and the libraries below it say so in a bare RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on the host or on a GPU. torch's own class is known by its name: the base does not import torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def exit_code(error: BaseException) -> int:
    """The exit code for an exception that ends a process; an unforeseen one is a bug (70)."""
    if isinstance(error, ProttransError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if is_out_of_memory(error):
        return NO_RESOURCES
    if isinstance(error, OSError) and error.errno:
        return _ERRNO_CODES.get(error.errno, IO_ERROR)
    return BUG


def explain(error: BaseException) -> str:
    """One paragraph for the user: the message, and for a failed write the file system that refused it."""
    if isinstance(error, OSError) and not isinstance(error, ProttransError):
        where = _mount_point(error.filename) if exit_code(error) == CANNOT_WRITE else None
        reason = error.strerror or str(error)
        named = f"{error.filename!s}: {reason}" if error.filename else reason
        return f"{named} (file system {where})" if where else named
    if is_out_of_memory(error):
        return f"out of memory: {_first_line(error)}" if str(error) else "out of memory"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return str(error) or type(error).__name__


def _first_line(error: BaseException) -> str:
    """What follows in torch's messages are the frames of its C++ code, or advice about its allocator."""
    return str(error).strip().partition("\n")[0]


def _mount_point(path: str | bytes | int | None) -> str | None:
    if not isinstance(path, str):
        return None
    place = os.path.abspath(path)
    while not os.path.ismount(place):
        place = os.path.dirname(place)
    return place
