"""One safetensors file read row by row, by its offsets: mapped where local, in ranges elsewhere."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray

_TYPES = {
    "F16": np.float16, "F32": np.float32, "F64": np.float64, "U8": np.uint8, "I16": np.int16,
    "I32": np.int32, "I64": np.int64,
}  # fmt: skip
_FIRST_READ = 1 << 16  # one request brings the header and, in most shards, the ids


@dataclass(frozen=True)
class Field:
    """Where a tensor of the file lies, and what one row of it is."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    count: int
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape) * self.dtype.itemsize


class Shard:
    """A safetensors file whose tensors have records as their first dimension.

    Args:
        url: Of the store, which tells fsspec the file system.
        path: Of the file, as that file system names it.
        local: Whether it can be mapped.

    Raises:
        ValueError: Not such a file.
    """

    def __init__(self, url: str, path: str, *, local: bool) -> None:
        self._url, self._path, self._local = url, path, local
        head = self._bytes(0, _FIRST_READ)
        length = int.from_bytes(head[:8], "little")
        if length > 100_000_000:
            raise ValueError(f"{path}: not a safetensors file")
        text = bytes(head[8 : 8 + length])
        if len(text) < length:
            text = bytes(self._bytes(8, 8 + length))
        entries = json.loads(text)
        self.fields = {
            name: _field(entry, 8 + length)
            for name, entry in entries.items()
            if name != "__metadata__"
        }

    def all(self, name: str) -> NDArray[Any]:
        """A whole tensor.

        Raises:
            KeyError: No such field.
        """
        field = self.fields[name]
        raw = self._bytes(field.offset, field.offset + field.row_bytes * field.count)
        return np.frombuffer(raw, field.dtype).reshape(field.count, *field.shape)

    def read_into(
        self, out: Mapping[str, NDArray[Any]], places: Sequence[int], rows: Sequence[int]
    ) -> None:
        """Put rows of the fields of `out` at its `places`."""
        starts: list[int] = []
        ends: list[int] = []
        for name in out:
            field, size = self.fields[name], self.fields[name].row_bytes
            starts += [field.offset + row * size for row in rows]
            ends += [start + size for start in starts[len(ends) :]]
        parts = iter(self._ranges(starts, ends))
        for name, array in out.items():
            field = self.fields[name]
            for place in places:
                array[place] = np.frombuffer(next(parts), field.dtype).reshape(field.shape)

    def _ranges(self, starts: list[int], ends: list[int]) -> list[Any]:
        if not self._local:
            files = fsspec.url_to_fs(self._url)[0]
            paths = [self._path] * len(starts)
            found: list[Any] = files.cat_ranges(paths, starts, ends, on_error="raise")
            return found
        status = os.stat(self._path)
        whole = _mapped(self._path, status.st_size, status.st_mtime_ns)
        return [whole[start:end].data for start, end in zip(starts, ends, strict=True)]

    def _bytes(self, start: int, end: int) -> Any:
        return self._ranges([start], [end])[0]


@functools.lru_cache(maxsize=64)
def _mapped(path: str, size: int, changed: int) -> NDArray[np.uint8]:
    """A file in memory; few at once, since each holds a descriptor.

    Outside of the shards, which are copied to workers; by size and time, since reading where a file
    was cut off would end the process.
    """
    return np.memmap(path, np.uint8, "r")


def _field(entry: Mapping[str, Any], start: int) -> Field:
    dtype = np.dtype(_TYPES[entry["dtype"]])
    count, *shape = entry["shape"]
    return Field(dtype, tuple(shape), count, start + entry["data_offsets"][0])
