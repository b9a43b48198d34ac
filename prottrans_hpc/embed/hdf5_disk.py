"""HDF5 on a disk that may be full.

Left to its own file access, HDF5 keeps what the system refused to write, tries again when the file is closed and
when the interpreter ends, and crashes it there (HDF5 2.0: segmentation fault after ENOSPC or EFBIG). So it writes
through an object that takes everything once a write has failed; the failure is raised by us, as the system put it.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py


class _Disk(io.FileIO):
    """A file for HDF5's driver for Python objects; raises and remembers the first refusal, swallows what follows."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """All of `data`."""
        left = memoryview(data).cast("B")
        total = len(left)
        try:
            while left and self.error is None:
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
            raise
        return total

    def truncate(self, size: int | None = None) -> int:
        """Set the length."""
        try:
            if self.error is None:
                return super().truncate(size)
        except OSError as error:
            self.error = error
            raise
        return size or 0

    def readinto(self, buffer: Any) -> int:
        """What was written; zeros where it was not."""
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view) and (num := super().readinto(view[done:])):
            done += num
        view[done:] = bytes(len(view) - done)
        return len(view)


@contextlib.contextmanager
def new_hdf5(path: Path) -> Iterator[h5py.File]:
    """A new HDF5 file, closed at the end of the block. Raises the OSError of the first write that was refused."""
    disk = _Disk(path, "w+b")
    try:
        with h5py.File(disk, "w") as file:
            yield file
    except BaseException:
        if disk.error is not None:
            raise disk.error from None
        raise
    finally:
        disk.close()
    if disk.error is not None:
        raise disk.error
