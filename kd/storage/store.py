"""Store of records by id: safetensors shards in a folder, on local disk or object storage.

All records have the same fields, each with a fixed dtype and shape. Any number of processes may
read at once. A shard's file name contains its number and checksum, so missing and corrupt shards
are found and rebuilt. `docs/results/cost.md` compares storage formats.
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
_FIRST_READ = 1 << 16  # bytes of a shard's first request, enough for most headers


@dataclass(frozen=True)
class Field:
    """A tensor in a shard: dtype and shape of one row, number of rows, and offset in the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    count: int
    offset: int

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Shard:
    """Reader of a safetensors file in which row i of each tensor belongs to record i.

    `url` is the store's URL, which selects the fsspec file system; `path` is the file's path there.
    Local files are memory-mapped.
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
        self.fields: dict[str, Field] = {}
        for name, entry in entries.items():
            if name != "__metadata__":
                dtype, (count, *shape) = np.dtype(_TYPES[entry["dtype"]]), entry["shape"]
                offset = 8 + length + entry["data_offsets"][0]
                self.fields[name] = Field(dtype, tuple(shape), count, offset)

    def all(self, name: str) -> NDArray[Any]:
        """Read a whole tensor: (rows, *shape)."""
        field = self.fields[name]
        raw = self._bytes(field.offset, field.offset + field.row_bytes * field.count)
        return np.frombuffer(raw, field.dtype).reshape(field.count, *field.shape)

    def read_into(
        self, out: Mapping[str, NDArray[Any]], places: Sequence[int], rows: Sequence[int]
    ) -> None:
        """Copy the shard's `rows` of each field in `out` to the positions `places` of its array."""
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
    """Memory-map a file; a cache limits the number of open files.

    The arguments `size` and `changed` (time) make the cache map a modified file again.
    """
    return np.memmap(path, np.uint8, "r")


FORMAT = "kd-cache-1"
IDS = "ids"
_MARKS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated", "created")
_MANIFEST, _VERIFIED = "manifest.json", "verified.json"
_NAME = re.compile(r"(\d{5,})-([0-9a-f]{16})\.safetensors")


class Store:
    """Sharded records in one folder, read by id.

    `url` is a local path, or any URL that fsspec opens: `s3://...`, `filecache::https://...`.
    """

    def __init__(self, url: str | Path) -> None:
        self.url = str(url)
        try:
            _, self._root = fsspec.url_to_fs(self.url)
        except (ImportError, ValueError) as error:  # unknown protocol or missing package
            raise UserError(f"{self.url}: {error}") from error
        self._local = isinstance(self._files, LocalFileSystem)
        self._shards: list[Shard] | None = None
        self._fields: dict[str, Field] = {}
        self._sorted: NDArray[np.int64] = np.zeros(0, np.int64)
        self._order: NDArray[np.int64] = np.zeros(0, np.int64)
        self._first: NDArray[np.int64] = np.zeros(1, np.int64)

    @property
    def _files(self) -> Any:
        """The fsspec file system, looked up at each use: forked processes must not share it."""
        return fsspec.url_to_fs(self.url)[0]

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def manifest(self) -> dict[str, Any] | None:
        """Read the manifest: format, `about`, number of shards and notes; None if missing."""
        try:
            content = json.loads(self._files.cat_file(self._path(_MANIFEST)))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.url}/{_MANIFEST}: cannot be read: {error}") from error
        valid = isinstance(content, dict) and {"about", "shards"} <= content.keys()
        if not valid or content.get("format") != FORMAT:
            raise UserError(f"{self.url}: not a cache of format {FORMAT}")
        return dict(content)

    def create(self, about: Mapping[str, Any], shards: int, **notes: Any) -> None:
        """Create a store for `shards` shards, removing the shards of an earlier store.

        `about` has everything that the records depend on, for `check_about` to compare. `notes` are
        other entries of the manifest.
        """
        for name in self._names():
            self._remove(name)
        content = {"format": FORMAT, "about": dict(about), "shards": shards, **notes}
        self._write(_MANIFEST, json.dumps(content, indent=1).encode())

    def check_about(self, about: Mapping[str, Any]) -> None:
        """Raise a UserError listing the differences if the manifest's `about` is different."""
        manifest = self.manifest()
        there = {} if manifest is None else manifest["about"]
        differences = [
            f"{key} is {there.get(key)!r} there, {value!r} here"
            for key, value in about.items()
            if there.get(key) != value
        ]
        if differences:
            raise UserError(
                f"{self.url}: a cache of other content: {'; '.join(differences)}. Use matching "
                "settings, delete the folder to rebuild it, or choose another one"
            )

    def present(self) -> dict[int, str]:
        """File names of the existing shards by shard number."""
        return {int(name.partition("-")[0]): name for name in self._names()}

    def _names(self) -> list[str]:
        """Names of all shard files; concurrent runs may have written two files for one shard."""
        files = self._files
        files.invalidate_cache(self._root)  # other processes may have written here
        try:
            names = [str(name).rsplit("/", 1)[-1] for name in files.ls(self._root, False)]
        except FileNotFoundError:
            return []
        return sorted(name for name in names if _NAME.fullmatch(name))

    def missing(self) -> list[int]:
        """Numbers of the shards that have not been written yet."""
        manifest = self.manifest()
        there = self.present()
        return [n for n in range(manifest["shards"] if manifest else 0) if n not in there]

    def write_shard(self, number: int, records: Mapping[str, NDArray[Any]]) -> None:
        """Write shard `number` atomically; `records` has `ids` and fields of the same length."""
        arrays = {name: np.ascontiguousarray(array) for name, array in records.items()}
        content = save(arrays, metadata={"format": FORMAT})
        self._write(f"{number:05d}-{_checksum(content)}.safetensors", content)
        self._shards = None

    def remove_corrupt(self) -> list[str]:
        """Remove shards that do not match the checksum in their names; return their file names.

        A verified shard is read again only if its size, time or ETag has changed.
        """
        known, verified, corrupt = self._verified(), {}, []
        for name in self._names():
            fingerprint = self._fingerprint(name)
            if fingerprint is None or known.get(name) != fingerprint:
                content = self._files.cat_file(self._path(name))
                if _checksum(content) not in name:
                    corrupt.append(name)
                    self._remove(name)
                    continue
            verified[name] = fingerprint
        if corrupt or verified != known:
            with contextlib.suppress(UserError):  # a read-only store is verified each time
                self._write(_VERIFIED, json.dumps(verified).encode())
        self._shards = None if corrupt else self._shards
        return corrupt

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

    def _fingerprint(self, name: str) -> list[int | str] | None:
        """A value that changes whenever the file does; None if the file system has none."""
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
        """Ids of all records in ascending order, (M,)."""
        self._open()
        return self._sorted

    @property
    def fields(self) -> dict[str, Field]:
        """Fields of a record by name, without `ids`."""
        self._open()
        return self._fields

    @property
    def bytes(self) -> int:
        """Total size of all shards in bytes."""
        return sum(int(self._files.size(self._path(name))) for name in self.present().values())

    def column(self, name: str) -> NDArray[Any]:
        """Read one field of all records, in the order of `ids()`: (M, *shape)."""
        parts = [shard.all(name) for shard in self._open()]
        whole: NDArray[Any] = np.concatenate(parts)[self._order]
        return whole

    def read(
        self, ids: Sequence[int] | NDArray[np.int64], names: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Read the records of K ids: (K, *shape) for each field in `names` (None: all)."""
        shards = self._open()
        wanted = np.asarray(ids, dtype=np.int64)
        places = np.minimum(np.searchsorted(self._sorted, wanted), max(len(self._sorted) - 1, 0))
        if not len(self._sorted) or (self._sorted[places] != wanted).any():
            unknown = wanted[~np.isin(wanted, self._sorted)]
            raise UserError(
                f"{self.url}: has no record of {len(unknown)} ids, such as {unknown[0]}; "
                "was it built for another dataset?"
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
                raise UserError(f"{self.url}: unreadable shard: {error}") from error
        return found

    def _open(self) -> list[Shard]:
        if self._shards is None:
            names = [name for _, name in sorted(self.present().items())]
            if not names:
                raise UserError(f"{self.url}: empty cache")
            try:
                shards = [Shard(self.url, self._path(name), local=self._local) for name in names]
                ids = [shard.all(IDS) for shard in shards]
            except (OSError, ValueError, KeyError) as error:
                raise UserError(f"{self.url}: unreadable shard: {error}") from error
            every = np.concatenate(ids)
            self._order = np.argsort(every, kind="stable")
            self._sorted = every[self._order]
            self._first = np.cumsum([0, *(len(part) for part in ids)])
            self._fields = {name: f for name, f in shards[0].fields.items() if name != IDS}
            self._shards = shards
        return self._shards


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
