"""One safetensors file read row by row, by its offsets; nothing of it stays open between reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


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
        self, out: Mapping[str, NDArray[Any]], places: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> None:
        """Put rows of the fields of `out` at its `places`."""
        jobs = [
            (name, place, self.fields[name].offset + row * self.fields[name].row_bytes)
            for name in out
            for place, row in zip(places.tolist(), rows.tolist(), strict=True)
        ]
        starts = [start for _, _, start in jobs]
        ends = [start + self.fields[name].row_bytes for name, _, start in jobs]
        for (name, place, _), raw in zip(jobs, self._ranges(starts, ends), strict=True):
            field = self.fields[name]
            out[name][place] = np.frombuffer(raw, field.dtype).reshape(field.shape)

    def _ranges(self, starts: list[int], ends: list[int]) -> list[Any]:
        if not self._local:
            files = fsspec.url_to_fs(self._url)[0]
            paths = [self._path] * len(starts)
            found: list[Any] = files.cat_ranges(paths, starts, ends, on_error="raise")
            return found
        parts = []
        with open(self._path, "rb", buffering=0) as file:
            for start, end in zip(starts, ends, strict=True):
                file.seek(start)
                parts.append(file.read(end - start))
        return parts

    def _bytes(self, start: int, end: int) -> Any:
        return self._ranges([start], [end])[0]


def _field(entry: Mapping[str, Any], start: int) -> Field:
    dtype = np.dtype(_TYPES[entry["dtype"]])
    count, *shape = entry["shape"]
    return Field(dtype, tuple(shape), count, start + entry["data_offsets"][0])
