"""Simulated remote reads for `cache_formats.py`: fsspec files in memory with a request latency."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.implementations.memory import MemoryFileSystem

from benchmarks._cache_stores import (
    BATCH,
    SHAPES,
    Records,
    parts_of,
    rows_of,
    write_safetensors,
    write_zarr,
)

HEAD = 4096  # bytes of a shard that contain its header and its ids
AT_ONCE = 10  # concurrent requests; zarr's default
Look = Callable[[list[int]], list[np.ndarray]]  # maps ids to a batch, one array per field


class Remote(MemoryFileSystem):  # type: ignore[misc]
    """An fsspec file system in memory that records the size of each read and delays it."""

    cachable = False
    latency = 0.0
    answers: list[int] = []  # noqa: RUF012

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> Any:
        """Read a range of bytes."""
        time.sleep(self.latency)
        content = super().cat_file(path, start=start, end=end, **options)
        self.answers.append(len(content))
        return content


def remote_zarr(files: Remote, root: str) -> Look:
    import zarr
    from zarr.storage import FsspecStore

    store = FsspecStore(AsyncFileSystemWrapper(files, True), read_only=True, path=root)
    group: Any = zarr.open_group(store, mode="r")
    row_of, arrays = rows_of(group["id"][:]), [group[name] for name in SHAPES]
    return lambda keys: [array.oindex[[row_of[key] for key in keys]] for array in arrays]


def remote_safetensors(files: Remote, root: str) -> Look:
    """Open each shard with one request, then read each field of each record with one request."""
    pool = ThreadPoolExecutor(AT_ONCE)
    paths = files.glob(f"{root}/*.safetensors")
    heads = pool.map(lambda path: files.cat_file(path, start=0, end=HEAD), paths)
    where = {}
    for path, head in zip(paths, heads, strict=True):
        parts = parts_of(head)
        dtype, _, begin, end = parts["id"]
        for row, key in enumerate(np.frombuffer(head[begin:end], dtype).tolist()):
            where[key] = (path, parts, row)

    def field(name: str, key: int) -> np.ndarray:
        path, parts, row = where[key]
        dtype, shape, begin, _ = parts[name]
        size = dtype.itemsize * int(np.prod(shape[1:]))
        content = files.cat_file(path, start=begin + row * size, end=begin + (row + 1) * size)
        return np.frombuffer(content, dtype).reshape(shape[1:])

    def look(keys: list[int]) -> list[np.ndarray]:
        fields = [[pool.submit(field, name, key) for key in keys] for name in SHAPES]
        return [np.stack([each.result() for each in found]) for found in fields]

    return look


def measured(open_remote: Callable[[Remote, str], Look], root: str, lists: list[list[int]]) -> str:
    start = time.perf_counter()
    look = open_remote(Remote(), root)
    ready = time.perf_counter()
    Remote.answers.clear()
    for keys in lists:
        look(keys)
    took, count = time.perf_counter() - ready, sum(map(len, lists))
    speed, each = count / took, len(Remote.answers) / count
    opened, size = (ready - start) * 1000, sum(Remote.answers) / count
    return f"{opened:9.0f}{speed:9.0f}{each:17.1f}{size:14.0f}"


def remote(
    records: Records, folder: Path, orders: Iterable[list[int]], rounds: int, latency: float
) -> None:
    """Write a store, copy it into memory, and look up batch after batch in one process."""
    print(f"\nby requests of {latency * 1000:.0f} ms, batches of {BATCH}, {AT_ONCE} at a time")
    print(f"{'':26}{'open ms':>9}{'read/s':>9}{'requests/record':>17}{'bytes/record':>14}")
    stores: dict[str, Any] = {"safetensors": (write_safetensors, remote_safetensors)}
    if find_spec("zarr"):
        stores["zarr, no codec"] = (lambda *a: write_zarr("none", *a), remote_zarr)
    for name, (write, open_remote) in stores.items():
        folder.mkdir()
        write(records, folder)
        Remote.latency = 0.0
        Remote().put(str(folder), "/", recursive=True)
        shutil.rmtree(folder)
        Remote.latency = latency
        for _ in range(rounds):
            print(f"{name:26}" + measured(open_remote, f"/{folder.name}", list(orders)), flush=True)
        Remote.latency = 0.0
        Remote().rm(f"/{folder.name}", recursive=True)
