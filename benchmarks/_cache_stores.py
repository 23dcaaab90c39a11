"""Storage formats compared by `cache_formats.py`: writing, opening and reading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save
from torch import Tensor
from torch.utils.data import DataLoader

from kd.storage.store import Store

SHARD, BATCH, BUFFER = 256, 32, 1000
SHAPES = {"posterior": (80,), "map": (320, 12, 12)}
DTYPES = {"F16": np.dtype("<f2"), "I64": np.dtype("<i8")}
Records = dict[str, np.ndarray]  # "id" and the fields of SHAPES, one row per record
Read = Callable[[int], Records]
Batch = dict[str, Tensor]


class Format(NamedTuple):
    """A storage format: write a folder, look records up, stream them in the format's order."""

    name: str
    package: str
    write: Callable[[Records, Path], None]
    lookup: Callable[[Path], Read] | None = None
    stream: Callable[[Path, int], Iterable[Any]] | None = None


def generated(count: int) -> Records:
    """Generate random records, with ids that neither start at zero nor are sorted."""
    random = np.random.default_rng(0)
    records = {"id": random.permutation(np.arange(count, dtype=np.int64) * 7919 + 2**40)}
    for name, shape in SHAPES.items():
        values = np.empty((count, *shape), np.float16)
        for row in values:
            row[:] = random.standard_normal(shape, np.float32).clip(0)
        records[name] = values
    return records


def shards(records: Records) -> Iterator[Records]:
    for start in range(0, len(records["id"]), SHARD):
        yield {name: values[start : start + SHARD] for name, values in records.items()}


def rows_of(ids: Any) -> dict[int, int]:
    return {int(key): row for row, key in enumerate(ids)}


def write_files(records: Records, folder: Path) -> None:
    for row, key in enumerate(records["id"]):
        record = {name: torch.from_numpy(records[name][row].copy()) for name in SHAPES}
        torch.save(record, folder / f"{key}.pt")


def open_files(folder: Path) -> Read:
    def read(key: int) -> Records:
        record = torch.load(folder / f"{key}.pt", weights_only=True)
        return {name: record[name].numpy() for name in SHAPES}

    return read


def write_zarr(codec: str, records: Records, folder: Path) -> None:
    import zarr
    from zarr.codecs import Crc32cCodec

    codecs: Any = {"none": None, "zstd": "auto", "crc32c": (Crc32cCodec(),)}[codec]
    group: Any = zarr.open_group(folder, mode="w")
    group.create_array("id", data=records["id"])
    for name, shape in SHAPES.items():
        whole, sizes = (len(records["id"]), *shape), {"chunks": (1, *shape)}
        sizes["shards"] = (SHARD, *shape)
        group.create_array(name, shape=whole, dtype="float16", compressors=codecs, **sizes)
    for number, shard in enumerate(shards(records)):
        for name in SHAPES:
            group[name][number * SHARD : number * SHARD + len(shard["id"])] = shard[name]


def open_zarr(folder: Path) -> Read:
    import zarr

    group: Any = zarr.open_group(folder, mode="r")
    row_of, arrays = rows_of(group["id"][:]), {name: group[name] for name in SHAPES}
    return lambda key: {name: array[row_of[key]] for name, array in arrays.items()}


def write_safetensors(records: Records, folder: Path) -> None:
    sums = {}
    for number, shard in enumerate(shards(records)):
        content = save(shard)
        path = folder / f"{number:05}.safetensors"
        sums[path.name] = hashlib.sha256(content).hexdigest()
        path.with_suffix(".part").write_bytes(content)
        path.with_suffix(".part").replace(path)
    (folder / "sha256.json").write_text(json.dumps(sums))


def verify(folder: Path) -> list[str]:
    """Return the names of shards whose content does not match their checksum."""
    sums = json.loads((folder / "sha256.json").read_text())
    files = {name: folder / name for name in sums}
    return [
        name
        for name, path in files.items()
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != sums[name]
    ]


def parts_of(header: bytes) -> dict[str, tuple[np.dtype[Any], list[int], int, int]]:
    """Read dtype, shape and first and last byte of each tensor from a file's header."""
    start = 8 + int.from_bytes(header[:8], "little")
    parts = json.loads(header[8:start])
    return {
        name: (DTYPES[part["dtype"]], part["shape"], *(start + o for o in part["data_offsets"]))
        for name, part in parts.items()
    }


def mapped(path: Path) -> Records:
    content = np.memmap(path, np.uint8, mode="r")
    parts = parts_of(content[:4096].tobytes())
    return {
        name: np.asarray(content)[begin:end].view(dtype).reshape(shape)
        for name, (dtype, shape, begin, end) in parts.items()
    }


def open_mapped(folder: Path) -> Read:
    maps = [mapped(path) for path in sorted(folder.glob("*.safetensors"))]
    where = {int(key): (shard, row) for shard in maps for row, key in enumerate(shard["id"])}

    def read(key: int) -> Records:
        shard, row = where[key]
        return {name: shard[name][row] for name in SHAPES}

    return read


def open_slices(folder: Path) -> Read:
    where = {}
    for path in sorted(folder.glob("*.safetensors")):
        handle: Any = safe_open(path, framework="np")
        slices = {name: handle.get_slice(name) for name in SHAPES}
        where.update({int(k): (slices, row) for row, k in enumerate(handle.get_tensor("id"))})

    def read(key: int) -> Records:
        slices, row = where[key]
        return {name: slices[name][row] for name in SHAPES}

    return read


def write_store(records: Records, folder: Path) -> None:
    store = Store(folder)
    store.create({}, -(-len(records["id"]) // SHARD))
    for number, shard in enumerate(shards(records)):
        store.write_shard(number, {"ids": shard["id"], **{name: shard[name] for name in SHAPES}})


def open_store(folder: Path) -> Read:
    store = Store(folder)
    store.ids()

    def read(key: int) -> Records:
        return {name: rows[0] for name, rows in store.read([key]).items()}

    return read


def write_webdataset(records: Records, folder: Path) -> None:
    import webdataset

    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=SHARD, verbose=0) as writer:
        for row, key in enumerate(records["id"]):
            fields = {f"{name}.npy": records[name][row] for name in SHAPES}
            writer.write({"__key__": str(key), **fields})


def stream_webdataset(folder: Path, workers: int) -> Iterable[Any]:
    import webdataset

    urls = sorted(str(path) for path in folder.glob("*.tar"))
    dataset: Any = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False)
    dataset = dataset.shuffle(BUFFER).decode().to_tuple("__key__", *(f"{n}.npy" for n in SHAPES))
    dataset = dataset.batched(BATCH).map(named)
    return DataLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0)


def named(values: Any) -> Batch:
    keys, *arrays = values
    tensors = map(torch.from_numpy, arrays)
    return {
        "id": torch.tensor([int(key) for key in keys]),
        **dict(zip(SHAPES, tensors, strict=True)),
    }


def write_litdata(records: Records, folder: Path) -> None:
    from litdata.streaming.cache import Cache

    cache: Any = Cache(str(folder), chunk_size=SHARD)
    for row, key in enumerate(records["id"]):
        cache[row] = {"id": int(key), **{name: records[name][row] for name in SHAPES}}
    cache.done()
    cache.merge(1)
    np.save(folder / "ids.npy", records["id"])  # records are looked up by position only


def open_litdata(folder: Path) -> Read:
    import litdata

    dataset: Any = litdata.StreamingDataset(str(folder), batch_decode=1)
    row_of = rows_of(np.load(folder / "ids.npy"))
    return lambda key: dataset[row_of[key]]


def stream_litdata(folder: Path, workers: int) -> Iterable[Any]:
    import litdata

    dataset: Any = litdata.StreamingDataset(str(folder), shuffle=True, seed=0, batch_decode=1)
    options: Any = {"num_workers": workers, "persistent_workers": workers > 0}
    loader: Iterable[Any] = litdata.StreamingDataLoader(dataset, batch_size=BATCH, **options)
    return loader


FORMATS = [
    Format("files", "torch", write_files, open_files),
    Format("zarr, no codec", "zarr", partial(write_zarr, "none"), open_zarr),
    Format("zarr, zstd", "zarr", partial(write_zarr, "zstd"), open_zarr),
    Format("zarr, crc32c", "zarr", partial(write_zarr, "crc32c"), open_zarr),
    Format("kd's store", "safetensors", write_store, open_store),
    Format("safetensors, memory map", "safetensors", write_safetensors, open_mapped),
    Format("safetensors, get_slice", "safetensors", write_safetensors, open_slices),
    Format("webdataset, stream", "webdataset", write_webdataset, stream=stream_webdataset),
    Format("litdata, by index", "litdata", write_litdata, open_litdata),
    Format("litdata, stream", "litdata", write_litdata, stream=stream_litdata),
]
