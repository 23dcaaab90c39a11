"""Records by id: any order, any process, interrupted, damaged, and not on this disk."""

from __future__ import annotations

import json
import os
import pickle
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from kd.errors import UserError
from kd.storage.store import Store

SIZES = (3, 1, 4)


def shard(number: int) -> dict[str, NDArray[Any]]:
    """Records whose numbers follow from their ids; ids are neither sorted nor dense."""
    count = SIZES[number]
    ids = np.array([100 - 7 * number - 30 * row for row in range(count)], dtype=np.int64)
    return {"ids": ids, **{name: record(ids)[name] for name in ("values", "places")}}


def record(ids: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    values = (ids[:, None, None] + np.arange(6).reshape(2, 3) / 8).astype(np.float16)
    return {"values": values, "places": np.stack([ids % 5, ids % 3], axis=1).astype(np.uint8)}


def fill(url: str | Path, numbers: tuple[int, ...] = (0, 1, 2)) -> Store:
    store = Store(url)
    store.create({"teacher": "abc", "top_k": 0}, len(SIZES))
    for number in numbers:
        store.write_shard(number, shard(number))
    return store


@pytest.fixture
def memory() -> Iterator[str]:
    files = fsspec.filesystem("memory")
    files.makedirs("/caches", exist_ok=True)
    yield "memory://caches/one"
    files.rm("/caches", recursive=True)


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_records_are_read_back_in_any_order(where: str, tmp_path: Path, memory: str) -> None:
    store = fill(tmp_path / "deep" / "cache" if where == "disk" else memory)
    every = np.concatenate([shard(number)["ids"] for number in range(3)])
    assert store.ids().tolist() == sorted(every.tolist())
    again = Store(store.url)
    order = np.random.default_rng(1).permutation(np.tile(every, 2))
    found = again.read(order)
    assert set(found) == {"values", "places"} == set(again.fields)
    for name, expected in record(order).items():
        assert found[name].dtype == expected.dtype
        assert np.array_equal(found[name], expected)
    assert np.array_equal(again.column("values"), record(again.ids())["values"])
    assert again.read([])["values"].shape == (0, 2, 3)
    assert again.bytes > 8 * (8 + 12 + 2)


class Reading(Dataset[Any]):
    def __init__(self, store: Store) -> None:
        self.store = store

    def __len__(self) -> int:
        return 8

    def __getitem__(self, place: int) -> NDArray[Any]:
        return self.store.read(self.store.ids()[[place]])["values"]


@pytest.mark.parametrize("opened_first", [False, True])
def test_workers_read_what_one_process_reads(tmp_path: Path, opened_first: bool) -> None:
    store = fill(tmp_path)
    if opened_first:
        store.ids()
    loader: DataLoader[Any] = DataLoader(Reading(store), num_workers=2, batch_size=None)
    rows = [np.asarray(row) for row in loader]
    assert np.array_equal(np.concatenate(rows), store.column("values"))


def test_an_unknown_id_is_reported(tmp_path: Path) -> None:
    store = fill(tmp_path)
    for stranger in (-1, 41, 10_000):
        with pytest.raises(UserError, match=rf"no record of 1 ids, such as {stranger}; was it"):
            store.read([100, stranger])


def test_missing_shards_are_found_from_the_folder_listing(tmp_path: Path) -> None:
    assert Store(tmp_path / "none").missing() == []
    assert Store(tmp_path / "none").manifest() is None
    store = fill(tmp_path, (2, 0))
    (tmp_path / ".00001-0123456789abcdef.safetensors.77.partial").write_bytes(b"half")
    assert Store(tmp_path).missing() == [1]
    store.write_shard(1, shard(1))
    assert Store(tmp_path).missing() == []
    assert len(store.ids()) == sum(SIZES)


def test_a_full_disk_leaves_no_shard(tmp_path: Path) -> None:
    store = fill(tmp_path, (0,))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
    try:
        with pytest.raises(UserError, match=r"00001-.*cannot be written: .*File too large"):
            store.write_shard(1, {"ids": np.arange(9), "values": np.zeros((9, 900))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert store.missing() == [1, 2]
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".safetensors"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, 40)


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("harm", [flip, cut, empty])
def test_a_corrupt_shard_is_reported_and_rebuilt_alone(tmp_path: Path, harm: Any) -> None:
    store = fill(tmp_path)
    assert store.remove_corrupt() == []
    (victim,) = tmp_path.glob("00001-*")
    others = {file: file.stat().st_mtime_ns for file in tmp_path.glob("0000[02]-*")}
    harm(victim)
    again = Store(tmp_path)
    assert again.remove_corrupt() == [victim.name]
    assert again.missing() == [1]
    again.write_shard(1, shard(1))
    assert again.remove_corrupt() == []
    assert {file: file.stat().st_mtime_ns for file in others} == others
    assert np.array_equal(again.column("values"), record(again.ids())["values"])


def test_corruption_is_found_without_modification_times(memory: str) -> None:
    store = fill(memory)
    files = fsspec.filesystem("memory")
    (victim,) = (name for name in files.ls("/caches/one", False) if "00002-" in name)
    files.pipe_file(victim, files.cat_file(victim)[:-1] + b"!")
    assert store.remove_corrupt() == [victim.rsplit("/", 1)[-1]]
    assert store.missing() == [2]


def test_a_verified_shard_is_not_read_again_until_it_changes(tmp_path: Path) -> None:
    store = fill(tmp_path)
    store.remove_corrupt()
    (file,) = tmp_path.glob("00000-*")
    checked = json.loads((tmp_path / "verified.json").read_text())
    assert checked[file.name] == [file.stat().st_size, file.stat().st_mtime_ns]
    stamp = file.stat()
    flip(file)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert store.remove_corrupt() == []  # by its time it is the one that was checked
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert store.remove_corrupt() == [file.name]


def test_a_store_of_other_content_is_rejected_with_reasons(tmp_path: Path) -> None:
    store = fill(tmp_path / "one")
    store.check_about({"teacher": "abc", "top_k": 0})
    with pytest.raises(
        UserError, match=r"teacher is 'abc' there, 'xyz' here; data is None there, 'd' here. Use"
    ):
        store.check_about({"teacher": "xyz", "top_k": 0, "data": "d"})
    (tmp_path / "one" / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(UserError, match="not a cache of format kd-cache-1"):
        store.manifest()
    (tmp_path / "one" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read"):
        store.manifest()


def test_a_store_that_cannot_be_opened_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere://x: Protocol not known"):
        Store("nowhere://x")
    with pytest.raises(UserError, match="empty cache"):
        Store(tmp_path).ids()
    fill(tmp_path, (0,))
    (file,) = tmp_path.glob("*.safetensors")
    for content in (b"", b"garbage", b"\xff" * 64, (30).to_bytes(8, "little") + b'{"ids": 3}' * 3):
        file.write_bytes(content)
        with pytest.raises(UserError, match="unreadable shard"):
            Store(tmp_path).ids()


def test_few_files_are_open_at_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.create({}, 200)
    for number in range(200):
        store.write_shard(number, {"ids": np.array([number]), "values": np.zeros((1, 2))})
    before = len(os.listdir("/proc/self/fd"))
    assert store.read(np.arange(200))["values"].shape == (200, 2)
    assert len(os.listdir("/proc/self/fd")) <= before + 64
    assert len(store.read([3])["values"]) == 1


def test_a_pickled_store_is_small(tmp_path: Path) -> None:
    store = fill(tmp_path)
    store.read(store.ids())
    assert len(pickle.dumps(store)) < 10_000  # what a worker that is spawned is sent


def test_shards_written_by_two_runs_are_verified(tmp_path: Path) -> None:
    store = fill(tmp_path)
    (first,) = tmp_path.glob("00001-*")
    twin = tmp_path / f"00001-{'0' * 16}.safetensors"
    twin.write_bytes(first.read_bytes())
    flip(first)
    assert set(store.remove_corrupt()) == {first.name, twin.name}
    assert store.missing() == [1]


def test_shards_without_a_manifest_are_not_reused(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "manifest.json").unlink()
    store = Store(tmp_path)
    store.create({"teacher": "another"}, 3)
    assert store.missing() == [0, 1, 2]


def test_a_vanished_shard_is_a_user_error(tmp_path: Path, memory: str) -> None:
    for url in (str(tmp_path), memory):
        store = fill(url)
        store.ids()
        for name in store.present().values():
            files, path = fsspec.core.url_to_fs(f"{url}/{name}")
            files.rm_file(path)
        with pytest.raises(UserError, match="unreadable shard"):
            store.read([100])


def test_an_unwritable_verification_record_is_harmless(tmp_path: Path) -> None:
    store = fill(tmp_path)
    (tmp_path / "verified.json").mkdir()  # so that no file of this name can be written
    assert store.remove_corrupt() == []
    assert (tmp_path / "verified.json").is_dir()
