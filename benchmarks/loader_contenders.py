"""The other ways to read records that loader.py measures: each makes files of its own, then hands out token arrays."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import io
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from prottrans_hpc import architecture

BATCH_TOKENS = 32_768
TABLE = np.frombuffer(architecture.get("prot_bert").vocabulary.residue_table(), np.uint8)

Batches = Iterator[tuple[int, int]]
"""Records and tokens of each finished batch."""


@dataclass(frozen=True)
class Contender:
    """One way to read records."""

    name: str
    start: Callable[[], Batches]
    """Begins an endless pass over the data."""
    is_ours: bool = False


def packed(records: Iterable[np.ndarray[Any, Any]]) -> Batches:
    """Token arrays of any integer type, joined to batches."""
    waiting: list[np.ndarray[Any, Any]] = []
    total = 0
    for record in records:
        if waiting and total + len(record) > BATCH_TOKENS:
            tokens = np.concatenate(waiting).astype(np.int64)
            yield len(waiting), len(tokens)
            waiting, total = [], 0
        waiting.append(record)
        total += len(record)


def tokens_of(residues: bytes) -> np.ndarray[Any, Any]:
    return TABLE[np.frombuffer(residues, np.uint8)]


def shuffled(num: int) -> Iterator[int]:
    epoch = 0
    while True:
        yield from np.random.default_rng(epoch).permutation(num).tolist()
        epoch += 1


def h5py_records(path: Path) -> Iterator[np.ndarray[Any, Any]]:
    with h5py.File(path) as file:
        residues, offsets = file["residues"], file["offsets"][:].tolist()
        for i in shuffled(len(offsets) - 1):
            yield TABLE[residues[offsets[i] : offsets[i + 1]]]


def datasets_contenders(records: list[bytes], folder: Path) -> list[Contender]:
    import datasets

    datasets.disable_progress_bars()
    as_bytes, as_lists = folder / "hf_bytes", folder / "hf_lists"
    datasets.Dataset.from_dict({"residues": records}, features=datasets.Features({"residues": datasets.Value("binary")})).save_to_disk(str(as_bytes))
    features = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int64"))})

    def rows() -> Iterator[dict[str, Any]]:
        for record in records:
            yield {"input_ids": tokens_of(record)}

    with contextlib.redirect_stderr(io.StringIO()):
        datasets.Dataset.from_generator(rows, features=features, cache_dir=str(folder / "hf_cache")).save_to_disk(str(as_lists))

    def one_by_one() -> Iterator[np.ndarray[Any, Any]]:
        table = datasets.load_from_disk(str(as_bytes))
        return (tokens_of(table[i]["residues"]) for i in shuffled(len(table)))

    def by_hundred() -> Iterator[np.ndarray[Any, Any]]:
        table, numbers = datasets.load_from_disk(str(as_bytes)), shuffled(len(records))
        while True:
            yield from map(tokens_of, table[[next(numbers) for _ in range(100)]]["residues"])

    def lists(kind: str | None) -> Iterator[np.ndarray[Any, Any]]:
        table = datasets.load_from_disk(str(as_lists)).with_format(kind)
        return (np.asarray(table[i]["input_ids"]) for i in shuffled(len(table)))

    version = datasets.__version__
    return [
        Contender(f"HF datasets {version}, bytes, 100 indices at once", lambda: packed(by_hundred())),
        Contender(f"HF datasets {version}, bytes, ds[i]", lambda: packed(one_by_one())),
        Contender(f"HF datasets {version}, input_ids as int64 lists, numpy format, ds[i]", lambda: packed(lists("numpy"))),
        Contender(f"HF datasets {version}, input_ids as int64 lists, default, ds[i]", lambda: packed(lists(None))),
    ]


def webdataset_contenders(records: list[bytes], folder: Path) -> list[Contender]:
    import webdataset

    path = folder / "records.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for i, record in enumerate(records):
            writer.write({"__key__": f"{i:08d}", "residues": record})

    def stream() -> Iterator[np.ndarray[Any, Any]]:
        source = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False).shuffle(1000).repeat()
        return (tokens_of(sample["residues"]) for sample in source)

    return [Contender(f"webdataset {webdataset.__version__}, shuffle(1000), sequential", lambda: packed(stream()))]


def streaming_contenders(records: list[bytes], folder: Path) -> list[Contender]:
    _stand_in_for_torchvision()
    import streaming

    out = folder / "mds"
    with streaming.MDSWriter(out=str(out), columns={"residues": "bytes"}) as writer:
        for record in records:
            writer.write({"residues": record})

    def local() -> Iterator[np.ndarray[Any, Any]]:
        table = streaming.LocalDataset(str(out))
        return (tokens_of(table[i]["residues"]) for i in shuffled(len(table)))

    def stream() -> Iterator[np.ndarray[Any, Any]]:
        streaming.base.util.clean_stale_shared_memory()
        table = streaming.StreamingDataset(local=str(out), shuffle=True, batch_size=1)
        while True:
            for sample in table:
                yield tokens_of(sample["residues"])

    version = streaming.__version__
    return [
        Contender(f"MosaicML streaming {version}, LocalDataset[i]", lambda: packed(local())),
        Contender(f"MosaicML streaming {version}, StreamingDataset(shuffle=True)", lambda: packed(stream())),
    ]


def _stand_in_for_torchvision() -> None:
    """Streaming imports torchvision for its picture datasets, of which none is used here."""
    if importlib.util.find_spec("torchvision") is None:
        for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]
        sys.modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]


OTHERS: dict[str, Callable[[list[bytes], Path], list[Contender]]] = {
    "datasets": datasets_contenders,
    "webdataset": webdataset_contenders,
    "mosaicml-streaming": streaming_contenders,
}


def h5py_contenders(shard: Path) -> list[Contender]:
    return [Contender(f"h5py {h5py.__version__}, one slice a record", lambda: packed(h5py_records(shard)))]
