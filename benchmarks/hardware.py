"""What a benchmark ran on, for every result file."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "numpy", "h5py", "transformers", "safetensors", "pyfastx", "biopython", "datasets", "webdataset", "torch_optimizer", "pytorch_optimizer")


def describe() -> dict[str, Any]:
    """Processor, cores, memory, system and versions; `line` says the same in one line for a report."""
    versions = {name: version for name in PACKAGES if (version := _version(name))}
    values = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    machine = f"{values['processor']}, {values['cores']} cores, {values['memory_gib']} GiB; {values['system']}"
    line = f"{values['date']}; {machine}; Python {values['python']}; {packages}"
    return values | {"line": line}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
