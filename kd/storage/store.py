"""A store of records by id: safetensors shards in a folder, on local disk or object storage.

Every record has the same fields, each of one type and shape; a record is read by its id, in any
order, from any number of processes. A shard's file is named by its number and the checksum of its
content, so that what is there is known by listing the folder, an interrupted run goes on with the
shards that lack, and a damaged one is found, named and made again alone. The measurements by which
the format was chosen are in `docs/results/cost.md`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from safetensors.numpy import save

from kd.errors import UserError
from kd.utils.io import write_atomic

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


FORMAT = "kd-cache-1"
IDS = "ids"
_MARKS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated", "created")
_MANIFEST, _VERIFIED = "manifest.json", "verified.json"
_NAME = re.compile(r"(\d{5,})-([0-9a-f]{16})\.safetensors")


class Store:
    """Records of one folder.

    Args:
        url: A local path, or whatever fsspec opens: `s3://...`, `filecache::https://...`.
    """

    def __init__(self, url: str | Path) -> None:
        self.url = str(url)
        try:
            _, self._root = fsspec.url_to_fs(self.url)
        except (ImportError, ValueError) as error:  # a protocol without its package, or unknown
            raise UserError(f"{self.url}: {error}") from error
        self._local = isinstance(self._files, LocalFileSystem)
        self._shards: list[Shard] | None = None
        self._fields: dict[str, Field] = {}
        self._sorted: NDArray[np.int64] = np.zeros(0, np.int64)
        self._order: NDArray[np.int64] = np.zeros(0, np.int64)
        self._first: NDArray[np.int64] = np.zeros(1, np.int64)

    @property
    def _files(self) -> Any:
        """The file system; fsspec keeps one for each process, which a fork must not share."""
        return fsspec.url_to_fs(self.url)[0]

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def manifest(self) -> dict[str, Any] | None:
        """What the folder says of itself, None where there is none.

        Raises:
            UserError: Another kind of folder, or one that cannot be read.
        """
        try:
            content = json.loads(self._files.cat_file(self._path(_MANIFEST)))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.url}/{_MANIFEST}: cannot be read: {error}") from error
        sound = isinstance(content, dict) and {"about", "shards"} <= content.keys()
        if not sound or content.get("format") != FORMAT:
            raise UserError(f"{self.url}: not a cache of this version of kd ({FORMAT})")
        return dict(content)

    def create(self, about: Mapping[str, Any], shards: int, **notes: Any) -> None:
        """Start a store; shards that a deleted one left behind are no part of it.

        Args:
            about: What the records follow from; another is refused later.
            shards: How many there will be.
            notes: Anything else to keep.
        """
        for name in self._names():
            self._remove(name)
        content = {"format": FORMAT, "about": dict(about), "shards": shards, **notes}
        self._write(_MANIFEST, json.dumps(content, indent=1).encode())

    def check_about(self, about: Mapping[str, Any]) -> None:
        """Refuse a store that was made of something else.

        Raises:
            UserError: It names each thing that differs.
        """
        manifest = self.manifest()
        there = {} if manifest is None else manifest["about"]
        odd = [
            f"{key} is {there.get(key)!r} there, {value!r} here"
            for key, value in about.items()
            if there.get(key) != value
        ]
        if odd:
            raise UserError(
                f"{self.url}: a cache of something else: {'; '.join(odd)}. Ask for what is there, "
                "delete the folder and it is rebuilt, or name another one"
            )

    def present(self) -> dict[int, str]:
        """The shards that are there: number to file name."""
        return {int(name.partition("-")[0]): name for name in self._names()}

    def _names(self) -> list[str]:
        """All shard files, more than one of a number where two runs made it at once."""
        files = self._files
        files.invalidate_cache(self._root)  # other processes write here too
        try:
            names = [str(name).rsplit("/", 1)[-1] for name in files.ls(self._root, False)]
        except FileNotFoundError:
            return []
        return sorted(name for name in names if _NAME.fullmatch(name))

    def missing(self) -> list[int]:
        """Numbers of the shards that are still to be made."""
        manifest = self.manifest()
        there = self.present()
        return [n for n in range(manifest["shards"] if manifest else 0) if n not in there]

    def write_shard(self, number: int, records: Mapping[str, NDArray[Any]]) -> None:
        """Write a shard, whole or not at all.

        Args:
            number: Which.
            records: Fields of the same length, `ids` among them.
        """
        arrays = {name: np.ascontiguousarray(array) for name, array in records.items()}
        content = save(arrays, metadata={"format": FORMAT})
        self._write(f"{number:05d}-{_checksum(content)}.safetensors", content)
        self._shards = None

    def remove_corrupt(self) -> list[str]:
        """Check every shard's content against its name and remove those that do not agree.

        Shards that were checked once and have not changed since (size and time, or what else the
        file system tells them apart by) are not read again.

        Returns:
            Names of the removed shards.
        """
        known, seen, damaged = self._verified(), {}, []
        for name in self._names():
            stamp = self._stamp(name)
            if stamp is None or known.get(name) != stamp:
                content = self._files.cat_file(self._path(name))
                if _checksum(content) not in name:
                    damaged.append(name)
                    self._remove(name)
                    continue
            seen[name] = stamp
        if damaged or seen != known:
            with contextlib.suppress(UserError):  # a place that is only read needs no notes
                self._write(_VERIFIED, json.dumps(seen).encode())
        self._shards = None if damaged else self._shards
        return damaged

    def _remove(self, name: str) -> None:
        try:
            self._files.rm_file(self._path(name))
        except OSError as error:
            raise UserError(f"{self.url}/{name}: cannot be removed: {error}") from error

    def _verified(self) -> dict[str, Any]:
        try:
            content = json.loads(self._files.cat_file(self._path(_VERIFIED)))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _stamp(self, name: str) -> list[int | str] | None:
        """What changes with the file, None where the file system says nothing of the kind."""
        if self._local:
            status = Path(self._path(name)).stat()
            return [status.st_size, status.st_mtime_ns]
        about = self._files.info(self._path(name))
        marks = [str(about[key]) for key in _MARKS if about.get(key)]
        return [int(about["size"]), *marks] if marks else None

    def _write(self, name: str, content: bytes) -> None:
        if self._local:
            write_atomic(Path(self._path(name)), lambda partial: partial.write_bytes(content))
            return
        try:
            self._files.makedirs(self._root, exist_ok=True)
            self._files.pipe_file(self._path(name), content)
        except (OSError, NotImplementedError) as error:
            raise UserError(f"{self.url}/{name}: cannot be written: {error}") from error

    def ids(self) -> NDArray[np.int64]:
        """Ids of all records, in rising order."""
        self._open()
        return self._sorted

    @property
    def fields(self) -> dict[str, Field]:
        """What a record consists of, its id apart."""
        self._open()
        return self._fields

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(int(self._files.size(self._path(name))) for name in self.present().values())

    def column(self, name: str) -> NDArray[Any]:
        """A field of all records, in the order of `ids()`.

        Raises:
            UserError: No such field.
        """
        parts = [shard.all(name) for shard in self._open()]
        whole: NDArray[Any] = np.concatenate(parts)[self._order]
        return whole

    def read(
        self, ids: Sequence[int] | NDArray[np.int64], names: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Records by id.

        Args:
            ids: (K,).
            names: The fields that are wanted; all of them where not given.

        Returns:
            Each field, in the order of `ids`: (K, *shape).

        Raises:
            UserError: An id that is not there.
        """
        shards = self._open()
        wanted = np.asarray(ids, dtype=np.int64)
        places = np.minimum(np.searchsorted(self._sorted, wanted), max(len(self._sorted) - 1, 0))
        if not len(self._sorted) or (self._sorted[places] != wanted).any():
            lacking = wanted[~np.isin(wanted, self._sorted)]
            raise UserError(
                f"{self.url}: no record of {len(lacking)} objects, first {lacking[0]}; the data "
                "set is another than the one it was made for"
            )
        rows = self._order[places]
        owners = np.searchsorted(self._first, rows, side="right") - 1
        found = {
            name: np.empty((len(wanted), *field.shape), field.dtype)
            for name, field in self.fields.items()
            if names is None or name in names
        }
        groups: dict[int, list[int]] = {}
        for place, owner in enumerate(owners.tolist()):
            groups.setdefault(owner, []).append(place)
        for owner, here in groups.items():
            try:
                shards[owner].read_into(found, here, (rows[here] - self._first[owner]).tolist())
            except (OSError, ValueError, KeyError) as error:
                raise UserError(f"{self.url}: a shard that cannot be read: {error}") from error
        return found

    def _open(self) -> list[Shard]:
        """Read the shards' headers and ids, once."""
        if self._shards is None:
            names = [name for _, name in sorted(self.present().items())]
            if not names:
                raise UserError(f"{self.url}: an empty cache")
            try:
                shards = [Shard(self.url, self._path(name), local=self._local) for name in names]
                ids = [shard.all(IDS) for shard in shards]
            except (OSError, ValueError, KeyError) as error:
                raise UserError(f"{self.url}: a shard that cannot be read: {error}") from error
            every = np.concatenate(ids)
            self._order = np.argsort(every, kind="stable")
            self._sorted = every[self._order]
            self._first = np.cumsum([0, *(len(part) for part in ids)])
            self._fields = {name: f for name, f in shards[0].fields.items() if name != IDS}
            self._shards = shards
        return self._shards


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
