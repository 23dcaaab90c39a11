"""Download public datasets: `python -m kd.data.download coco2017 --out DIR`.

Unpacked archives are skipped, failed requests repeated, and interrupted downloads resumed.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import http.client
import logging
import os
import shutil
import stat
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from filelock import FileLock
from rich import progress as rich_progress
from rich.console import Console
from rich.filesize import decimal as readable  # 19.3 GB

from kd.errors import UserError

log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_RETRYABLE = {408, 425, 429, 500, 502, 503, 504}
_HINTS = {401: "; access denied", 403: "; access denied", 404: "; check the address",
          410: "; the file was removed"}  # fmt: skip


@dataclass(frozen=True)
class Archive:
    """One zip file of a dataset."""

    name: str  # selects this archive on the command line (`--only`)
    location: str  # path relative to the base URL
    md5: str  # checksum of the zip file
    packed: int  # size of the zip file in bytes
    unpacked: int  # approximate total size of the unpacked files in bytes
    folder: str  # folder of the unpacked files, relative to the dataset's folder
    files: int  # number of unpacked files


# Name of a dataset -> (base URL of its archives, the archives).
DATASETS: dict[str, tuple[str, tuple[Archive, ...]]] = {
    "coco2017": (
        "http://images.cocodataset.org",
        (
            Archive("annotations", "annotations/annotations_trainval2017.zip",
                    "f4bbac642086de4f52a3fdda2de5fa2c", 252_907_541, 820_000_000,
                    "annotations", 6),
            Archive("val", "zips/val2017.zip", "442b8da7639aecaf257c1dceb8ba8c80",
                    815_585_330, 820_000_000, "val2017", 5_000),
            Archive("train", "zips/train2017.zip", "cced6f7f71b7629ddf16f17bbcfab6b2",
                    19_336_861_798, 19_400_000_000, "train2017", 118_287),
        ),
    )
}  # fmt: skip


def download(
    archives: Sequence[Archive],
    out: Path,
    *,
    base_url: str,
    keep: bool = False,
    retries: int = 5,
    backoff: float = 1.0,
) -> None:
    """Download and unpack archives into the dataset's folder, skipping complete ones.

    `base_url` is prepended to the archives' locations. If `keep`, zip files are not deleted. For
    `retries` and `backoff` see `fetch`. Raises a UserError if a step fails or disk space is too
    low.
    """
    missing = [archive for archive in archives if not _is_complete(archive, out)]
    for archive in archives:
        if archive not in missing:
            log.info("%s: complete, %d files", out / archive.folder, archive.files)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot create this folder: {error.strerror}") from error
    _check_space(missing, out, keep)
    for archive in missing:
        path = out / PurePosixPath(archive.location).name
        url = f"{base_url.rstrip('/')}/{archive.location}"
        fetch(url, path, md5=archive.md5, retries=retries, backoff=backoff)
        unpack(path, out)
        if not _is_complete(archive, out):
            raise UserError(
                f"{path}: unpacked, but {out / archive.folder} has fewer than the expected "
                f"{archive.files} files; is it the right archive?"
            )
        if not keep:
            path.unlink()


def _is_complete(archive: Archive, out: Path) -> bool:
    # Counting files is enough, because `unpack` gives a file its name only once it is complete.
    try:
        with os.scandir(out / archive.folder) as entries:
            files = sum(not entry.name.endswith(".part") for entry in entries if entry.is_file())
    except OSError:
        return False
    return files >= archive.files


def _check_space(archives: Sequence[Archive], out: Path, keep: bool) -> None:
    if not archives:
        return
    packed = [archive.packed for archive in archives]
    # Unless `keep`, each archive is deleted before the next is downloaded: count the largest.
    need = sum(archive.unpacked for archive in archives) + (sum(packed) if keep else max(packed))
    for archive in archives:
        name = PurePosixPath(archive.location).name
        for there in (out / name, out / f"{name}.part"):
            need -= there.stat().st_size if there.exists() else 0
        if (out / archive.folder).is_dir():
            with os.scandir(out / archive.folder) as entries:
                need -= sum(entry.stat().st_size for entry in entries if entry.is_file())
    free = shutil.disk_usage(out).free
    if need > free:
        raise UserError(
            f"{out}: needs {readable(need)}, but only {readable(free)} are free; "
            "choose another --out, or download less with --only"
        )


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip file into `folder`, skipping files that already exist with the right size.

    Raises a UserError if the archive is corrupt or an entry is a link or points outside `folder`.
    """
    try:
        with zipfile.ZipFile(archive) as source:
            members = [entry for entry in source.infolist() if not entry.is_dir()]
            targets = [_target(archive, entry, folder) for entry in members]
            total = sum(entry.file_size for entry in members)
            with ByteProgress(f"unpacking {archive.name}", total) as progress:
                for entry, target in zip(members, targets, strict=True):
                    _unpack_one(source, entry, target, progress)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise UserError(
            f"{archive}: corrupt zip file ({error}); delete it and run again"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"{folder}: the disk is full; free some space and run again"
        else:
            message = f"{archive}: cannot unpack: {error}"
        raise UserError(message) from error


def _target(archive: Path, entry: zipfile.ZipInfo, folder: Path) -> Path:
    path = PurePosixPath(entry.filename.replace("\\", "/"))
    outside = path.is_absolute() or ".." in path.parts or ":" in path.parts[0]
    if outside or stat.S_ISLNK(entry.external_attr >> 16):
        raise UserError(f"{archive}: unsafe entry {entry.filename!r}; nothing was unpacked")
    return folder.joinpath(*path.parts)  # links in `folder` are followed: they are the user's


def _unpack_one(
    source: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path, progress: ByteProgress
) -> None:
    if target.is_file() and target.stat().st_size == entry.file_size:
        progress.advance(entry.file_size)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.part")
    try:
        with source.open(entry) as packed, partial.open("wb") as file:
            while chunk := packed.read(_CHUNK):  # the last read verifies the entry's CRC
                file.write(chunk)
                progress.advance(len(chunk))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


class _Retry(Exception):
    """A failed request that is worth repeating."""


def fetch(
    url: str,
    path: Path,
    *,
    md5: str,
    retries: int = 5,
    backoff: float = 1.0,
    timeout: float = 30.0,
) -> None:
    """Download a file to `path` unless it exists; an interrupted download is resumed.

    The bytes are written to `PATH.part`, which is renamed when its `md5` (hexadecimal) is correct.
    An attempt that makes no progress is repeated `retries` times, first after `backoff` seconds,
    then after twice as long each time, up to a minute. An attempt fails after `timeout` seconds
    without data. Raises a UserError on failure; unless the checksum is wrong, another call can
    resume.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"{url}: not an http or https address")
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / ".lock"):
            if path.exists() and _md5(path) == md5:
                log.info("%s: already downloaded", path)
                return
            resumed = _size(part) > 0
            _receive_all(url, part, retries, backoff, timeout)
            if resumed and _md5(part) != md5:  # the server may have changed the file
                log.warning("%s: wrong checksum after resuming; downloading again", path)
                part.unlink()
                _receive_all(url, part, retries, backoff, timeout)
            if _md5(part) != md5:
                part.unlink()
                raise UserError(
                    f"{url}: wrong checksum: expected md5 {md5}; the received file is deleted. Run "
                    "again; if this persists, the file on the server has changed"
                )
            part.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = "the disk is full; free some space and run again to resume"
        else:
            message = f"cannot write: {error.strerror or error}"
        raise UserError(f"{path}: {message}") from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file, ByteProgress(f"checking {path.name}", _size(path)) as progress:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            progress.advance(len(chunk))
    return digest.hexdigest()


def _receive_all(url: str, part: Path, retries: int, backoff: float, timeout: float) -> None:
    failures = 0
    while True:
        before = _size(part)
        try:
            _receive(url, part, timeout)
            return
        except _Retry as error:
            reason = str(error)
        failures = 1 if _size(part) > before else failures + 1
        if failures > retries:
            raise UserError(
                f"{url}: {reason} ({failures} attempts); run again to resume after "
                f"{readable(_size(part))}"
            )
        pause = min(backoff * 2 ** (failures - 1), 60.0)
        log.warning("%s: %s; next attempt in %.0f s", url, reason, pause)
        time.sleep(pause)


def _receive(url: str, part: Path, timeout: float) -> None:
    """Download the rest of a file, or the whole file if the server does not support ranges."""
    received = _size(part)
    headers = {"User-Agent": "kd", "Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={received}-"} if received else {}
    try:
        request = urllib.request.Request(url, headers=headers)
        reply = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and received:
                return  # nothing is left to receive; the caller verifies the checksum
            if error.code in _RETRYABLE:
                raise _Retry(f"HTTP {error.code} {error.reason}") from None
            hint = _HINTS.get(error.code, "")
            raise UserError(f"{url}: HTTP {error.code} {error.reason}{hint}") from None
    except (OSError, http.client.HTTPException) as error:
        raise _Retry(_reason(error)) from error
    with reply:
        if reply.status != 206:
            received = 0
        elif not reply.headers.get("Content-Range", "").startswith(f"bytes {received}-"):
            part.unlink()
            raise _Retry("the server sent another range than requested; downloading again")
        length = reply.headers.get("Content-Length")
        total = received + int(length) if length else None
        with (
            part.open("r+b" if received else "wb") as file,
            ByteProgress(part.stem, total, received) as progress,
        ):
            file.seek(received)
            while chunk := _read(reply):
                file.write(chunk)
                progress.advance(len(chunk))
    if total is not None and progress.done < total:
        raise _Retry(f"the connection ended after {readable(progress.done)} of {readable(total)}")


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return str(reason) or type(reason).__name__


def _read(reply: http.client.HTTPResponse) -> bytes:
    # Kept apart from writing because both raise OSError, but only reading is worth a retry.
    try:
        return reply.read1(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _Retry(_reason(error)) from error


class ByteProgress:
    """Progress in bytes: a bar on a terminal, otherwise a log line every 10 %."""

    def __init__(self, title: str, total: int | None, done: int = 0) -> None:
        self.title, self.total, self.done = title, total, done
        self.tenth = 10 * done // total if total else 0
        self.bar = rich_progress.Progress(
            "{task.description}", rich_progress.BarColumn(), rich_progress.DownloadColumn(),
            rich_progress.TransferSpeedColumn(), rich_progress.TimeRemainingColumn(),
            console=Console(stderr=True), disable=not sys.stderr.isatty(),
        )  # fmt: skip
        self.task = self.bar.add_task(title, total=total, completed=done)

    def __enter__(self) -> ByteProgress:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def advance(self, count: int) -> None:
        """Report `count` more bytes as done."""
        self.done += count
        self.bar.advance(self.task, count)
        if self.bar.disable and self.total and 10 * self.done // self.total > self.tenth:
            self.tenth = 10 * self.done // self.total
            log.info("%s: %d %% of %s", self.title, 10 * self.tenth, readable(self.total))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 2 after a `UserError`, 130 if interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m kd.data.download", description="Download a public dataset."
    )
    parser.add_argument("dataset", choices=sorted(DATASETS))
    parser.add_argument("--out", type=Path, required=True, help="folder of the dataset")
    names = sorted({a.name for _, archives in DATASETS.values() for a in archives})
    parser.add_argument("--only", choices=names, action="append", help="one archive; repeatable")
    parser.add_argument("--base-url", help="address of a mirror that has the same paths")
    parser.add_argument("--keep", action="store_true", help="keep zip files after unpacking")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    published, archives = DATASETS[options.dataset]
    selected = [a for a in archives if not options.only or a.name in options.only]
    base_url = options.base_url or published
    try:
        download(selected, options.out, base_url=base_url, keep=options.keep)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to resume\n")
        return 130
    sys.stdout.write(f"{options.out}: ready\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
