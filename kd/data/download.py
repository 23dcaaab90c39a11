"""Download public datasets: `python -m kd.data.download coco2017 --out DIR`.

Archives are downloaded (resumable, with checksum), unpacked and deleted; complete ones are skipped.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import shutil
import stat
import sys
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kd.errors import UserError
from kd.utils.download import ByteProgress, fetch, readable

__all__ = ["DATASETS", "Archive", "download", "fetch", "main", "unpack"]

log = logging.getLogger(__name__)

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Archive:
    """One zip file of a dataset.

    Attributes:
        name: Name for `--only`.
        location: Path relative to the base URL.
        md5: Checksum of the zip file.
        packed: Bytes of the zip file.
        unpacked: Bytes of its files, approximately.
        folder: Folder of its files, relative to the dataset's folder.
        files: Number of files.
    """

    name: str
    location: str
    md5: str
    packed: int
    unpacked: int
    folder: str
    files: int


@dataclass(frozen=True)
class Source:
    """The archives of a dataset and where they are published."""

    base_url: str
    archives: tuple[Archive, ...]


DATASETS = {
    "coco2017": Source(
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
    """Download and unpack archives into the dataset's folder, except those that are complete.

    `base_url` is the prefix of the archives' locations; `keep` keeps the zip files.

    Raises:
        UserError: Too little space, or a failure of `fetch` or `unpack`.
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
    # Counting is enough: `unpack` names a file only once it is complete.
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
    # An archive is deleted once unpacked, so at most one exists at a time.
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
    """Unpack a zip file; existing files of the right size are skipped.

    Raises:
        UserError: The archive is corrupt, an entry points outside `folder` or is a link, or the
            disk is full.
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
    return folder.joinpath(*path.parts)  # may pass through links, but only the user's own


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
            while chunk := packed.read(_CHUNK):  # verifies the entry's CRC at the end
                file.write(chunk)
                progress.advance(len(chunk))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status, 2 after a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m kd.data.download", description="Download a public dataset."
    )
    parser.add_argument("dataset", choices=sorted(DATASETS))
    parser.add_argument("--out", type=Path, required=True, help="folder of the dataset")
    names = sorted({a.name for dataset in DATASETS.values() for a in dataset.archives})
    parser.add_argument("--only", choices=names, action="append", help="only this part; repeatable")
    parser.add_argument("--base-url", help="mirror with the same paths")
    parser.add_argument("--keep", action="store_true", help="keep the zip files")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    dataset = DATASETS[options.dataset]
    selected = [a for a in dataset.archives if not options.only or a.name in options.only]
    base_url = options.base_url or dataset.base_url
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
