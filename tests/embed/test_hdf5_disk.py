"""HDF5 on a disk that is full at any point: an OSError of ours, and a process that ends well (left alone, HDF5 crashes it)."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

from prottrans_hpc.embed.hdf5_disk import new_hdf5

# Each limit in a fork of its own, as the crash comes at the end of a process.
PROGRAM = """
import errno, json, os, resource, sys
from pathlib import Path
import h5py, numpy as np
from prottrans_hpc.embed.hdf5_disk import new_hdf5

def attempt(limit, path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        with new_hdf5(path) as file:
            names = file.create_dataset("names", (300,), h5py.string_dtype())
            for start in range(0, 300, 100):
                names[start : start + 100] = np.array([b"name%d" % i for i in range(100)], object)
            file.create_dataset("mean", data=np.ones((300, 16), "f4"))
            file.attrs["rules"] = "b" * 300
    except OSError as error:
        return 73 if error.errno == errno.EFBIG else 1
    return 0

ends = {}
for limit in range(0, 40_000, 800):
    child = os.fork()
    if child == 0:
        sys.exit(attempt(limit, Path(sys.argv[1])))
    ends[limit] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(ends))
"""


def test_a_limit_at_any_point_is_an_oserror_and_the_process_ends_well(tmp_path, repository):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "x.h5")], env=os.environ | {"PYTHONPATH": str(repository)}, capture_output=True, text=True, timeout=300
    )
    ends = list(json.loads(done.stdout).values())
    first_whole = ends.index(0)
    assert first_whole > 10
    assert set(ends[:first_whole]) == {73}
    assert set(ends[first_whole:]) == {0}
    assert done.stderr == ""


def test_any_reader_opens_the_file_and_can_map_it(tmp_path):
    data = np.arange(12_000, dtype=np.float32).reshape(-1, 8)
    path = tmp_path / "x.h5"
    with new_hdf5(path) as file:
        file["x"] = data
        file.create_dataset("names", data=[b"a", b"\xe9"], dtype=h5py.string_dtype())
        file.attrs["a"] = 1
    with h5py.File(path, "r") as file:
        assert np.array_equal(file["x"], data)
        assert list(file["names"]) == [b"a", b"\xe9"]
        assert file.attrs["a"] == 1
        assert np.array_equal(np.memmap(path, np.float32, "r", offset=file["x"].id.get_offset(), shape=data.shape), data)


def test_an_error_of_the_block_is_not_replaced(tmp_path):
    with pytest.raises(KeyError), new_hdf5(tmp_path / "x.h5") as file:
        file["missing"]
