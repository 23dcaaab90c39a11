"""Compare formats for caches of teacher outputs: writing, random access, corruption, requests.

A record has an int64 id, a `posterior` float16 (80,) and a `map` float16 (320, 12, 12), half of it
zero: 92 kB. Training looks records up by id, in an order per epoch that depends only on seed, epoch
and position. Shards contain 256 records.

files        one torch.save per record, torch.load(weights_only=True): the baseline
zarr         v3, sharded, one chunk per record: raw, with its default zstd, with crc32c
safetensors  256 records per file, with a sha256 per file; read by offset through a memory map,
             and with safe_open().get_slice
webdataset   tar shards; no look-up, so its own shuffle: shards, then a buffer of 1,000 records
litdata      chunks; by index, decoding one record at a time, and as its own shuffled stream

Speeds are medians of rounds in which the formats take turns. The files are in the page cache: just
written, without fsync, and read for one epoch before the measured one. All records are compared
with what was written. The time to open includes reading a first record. Then the largest file is
damaged (a byte flipped, cut in half, removed) to see what a reader notices. Last, records are
looked up through fsspec from memory, where each request takes `--latency`.

    python -m benchmarks.cache_formats [--records 3000] [--reads 256] [--rounds 3] [--workers 2]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks._cache_remote import remote
from benchmarks._cache_stores import (
    BATCH,
    FORMATS,
    SHAPES,
    Batch,
    Format,
    Read,
    Records,
    generated,
    rows_of,
    verify,
    write_safetensors,
)

SECONDS = 1.0  # least duration of a speed measurement
DAMAGED = 512  # records of the store that is damaged


class Order:
    """Lists of ids in the order of an epoch; each iteration yields the next epoch."""

    def __init__(self, ids: np.ndarray, reads: int) -> None:
        self.ids, self.reads, self.epoch = ids, reads, 0

    def __iter__(self) -> Iterator[list[int]]:
        self.epoch += 1
        keys = np.random.default_rng([0, self.epoch]).permutation(self.ids)[: self.reads].tolist()
        return (keys[start : start + BATCH] for start in range(0, len(keys), BATCH))


class Batches(Dataset[Batch]):
    """Batches of records, looked up by lists of ids; the store is opened in the reading process."""

    def __init__(self, form: Format, folder: Path) -> None:
        self.form, self.folder = form, folder
        self.read: Read | None = None

    def __getitem__(self, keys: list[int]) -> Batch:
        if self.read is None:
            assert self.form.lookup is not None
            self.read = self.form.lookup(self.folder)
        found = [self.read(key) for key in keys]
        fields = {n: torch.from_numpy(np.stack([record[n] for record in found])) for n in SHAPES}
        return {"id": torch.tensor(keys), **fields}


def batches(form: Format, folder: Path, ids: np.ndarray, reads: int, workers: int) -> Iterable[Any]:
    """Return the batches, a new epoch each time they are iterated."""
    if form.stream is not None:
        return form.stream(folder, workers)
    options: Any = {"num_workers": workers, "persistent_workers": workers > 0}
    return DataLoader(Batches(form, folder), batch_size=None, sampler=Order(ids, reads), **options)


def wrong(records: Records, read: Iterable[Any]) -> tuple[int, int]:
    """Count the records that were read, and those that differ from what was written."""
    row_of, total, differ = rows_of(records["id"]), 0, 0
    for batch in read:
        rows = [row_of[key] for key in batch["id"].tolist()]
        bad = np.zeros(len(rows), bool)
        for name in SHAPES:
            same = records[name][rows].view(np.int16) == batch[name].numpy().view(np.int16)
            bad |= ~same.reshape(len(rows), -1).all(axis=1)
        total, differ = total + len(rows), differ + int(bad.sum())
    return total, differ


def speed(read: Iterable[Batch], seconds: float) -> tuple[float, float]:
    """Measure records and CPU microseconds per record in this process, over whole epochs."""
    start, cpu, count, took = time.perf_counter(), time.process_time(), 0, 0.0
    while not count or took < seconds:
        count += sum(len(batch["id"]) for batch in read)
        took = time.perf_counter() - start
    return count / took, (time.process_time() - cpu) / count * 1e6


def opened(form: Format, folder: Path, records: Records) -> float:
    """Measure milliseconds to open and read a first record, or a stream's first batch."""
    start = time.perf_counter()
    if form.lookup is not None:
        form.lookup(folder)(int(records["id"][-1]))
    else:
        next(iter(batches(form, folder, records["id"], 0, 0)))
    return (time.perf_counter() - start) * 1000


def timed(
    form: Format, folder: Path, records: Records, reads: int, workers: int, check: bool
) -> dict[str, float]:
    """Run one round of one format, from writing to deleting its folder."""
    ids, numbers = records["id"], {}
    folder.mkdir()
    start = time.perf_counter()
    form.write(records, folder)
    numbers["write"] = len(ids) / (time.perf_counter() - start)
    numbers["bytes"] = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / len(ids)
    once = batches(form, folder, ids, len(ids), 0)
    if check and (found := wrong(records, once)) != (len(ids), 0):
        raise SystemExit(f"{form.name}: of {len(ids)} records, (read, differ) = {found}")
    numbers["open"] = statistics.median(opened(form, folder, records) for _ in range(3))
    for count, name in ((workers, "workers"), (0, "alone")):
        loader = batches(form, folder, ids, reads, count)
        speed(loader, 0)  # starts the workers
        numbers[name], numbers["cpu"] = speed(loader, SECONDS)
        del loader
    shutil.rmtree(folder)
    return numbers


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def noticed(form: Format, folder: Path, records: Records, harm: Callable[[Path], None]) -> str:
    """Report what a reader of all records notices when the largest file is damaged."""
    folder.mkdir()
    form.write(records, folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    harm(max(files, key=lambda path: (path.stat().st_size, path.name)))
    ids = records["id"]
    try:
        count, differ = wrong(records, batches(form, folder, ids, len(ids), 0))
    except Exception as error:
        result = type(error).__name__
    else:
        lost = f", {len(ids) - count} left out" if count < len(ids) else ""
        result = f"SILENT: {differ} wrong{lost}"
    if form.write is write_safetensors:
        result += f"; sha256: {len(verify(folder))} shard"
    shutil.rmtree(folder)
    return result


def report(rounds: dict[str, list[dict[str, float]]]) -> None:
    """Print medians; for reading also the range, and the ratio to one file per record."""
    heads = ("write/s", "B/record", "open ms", "CPU us/read")
    print(f"\n{'':24}" + "".join(f"{head:>12}" for head in heads), end="")
    print("".join(f"{head:>22}{'ratio':>7}" for head in ("read/s (range)", "workers (range)")))
    base: dict[str, float] = {}
    for name, found in rounds.items():
        median = {key: statistics.median(one[key] for one in found) for key in found[0]}
        base = base or median
        cells = [f"{median[key]:12.0f}" for key in ("write", "bytes")]
        cells += [f"{median['open']:12.1f}{median['cpu']:12.0f}"]
        for key in ("alone", "workers"):
            values = [one[key] for one in found]
            spread = f"{median[key]:.0f} ({min(values):.0f}-{max(values):.0f})"
            cells.append(f"{spread:>22}{median[key] / base[key]:7.2f}")
        print(f"{name:24}" + "".join(cells), flush=True)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--records", type=int, default=3000)
    parser.add_argument("--reads", type=int, default=256, help="look-ups an epoch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--latency", type=float, default=0.01, help="seconds of a request")
    parser.add_argument("--only", default="", help="formats whose name has this in it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    formats = []
    for form in FORMATS:
        if find_spec(form.package) is None:
            print(f"{form.name}: left out; pip install {form.package}")
        elif form is FORMATS[0] or options.only in form.name:
            formats.append(form)
    packages = sorted({form.package for form in formats})
    print(", ".join(f"{package} {version(package)}" for package in packages), flush=True)
    records = generated(options.records)
    some = {name: values[:DAMAGED] for name, values in records.items()}
    rounds: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "store")
        for number in range(options.rounds):
            for form in formats:
                arguments = (records, options.reads, options.workers, number == 0)
                rounds[form.name].append(timed(form, folder, *arguments))
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
        report(rounds)
        print(f"\n{'':26}{'byte flipped':38}{'file cut in half':38}file removed")
        for form in formats:
            cells = [noticed(form, folder, some, harm) for harm in (flip, halve, Path.unlink)]
            print(f"{form.name:26}" + "".join(f"{cell:38}" for cell in cells).rstrip(), flush=True)
        remote(records, folder, Order(records["id"], 8 * BATCH), options.rounds, options.latency)


if __name__ == "__main__":
    main()
