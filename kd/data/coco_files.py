"""Where a COCO index lies on disk, when it is stale, and how it is built and opened."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import kd
from kd.data.coco_index import ERROR_FILE, READER_VERSION, USER_ERROR_EXIT, build_index
from kd.data.lock import folder_lock
from kd.errors import UserError
from kd.files import in_cache

log = logging.getLogger(__name__)

IN_PROCESS_BYTES = 8 << 20  # a smaller JSON is read here: it needs little memory
_SHOWN = 5


def up_to_date_index(annotation_file: Path, index_dir: Path | None) -> Path:
    """Find the index of a JSON, or build it.

    Args:
        annotation_file: COCO instances JSON.
        index_dir: Folder for the index; by default beside the JSON, else in the cache.

    Returns:
        The index folder.

    Raises:
        UserError: The JSON is missing or broken, or no folder can be written.
    """
    if not annotation_file.is_file():
        raise UserError(
            f"{annotation_file}: annotation file not found; check the data set's root, or fetch "
            "COCO with: python -m kd.data.download coco2017 --out DIR"
        )
    places = list(_places(annotation_file, index_dir))
    for folder in places:
        if _is_fresh(folder, annotation_file):
            return folder
    failures = []
    for folder in places:
        try:
            _build(annotation_file, folder)
        except OSError as error:
            failures.append(f"{folder.parent}: {error.strerror or error}")
            continue
        if failures:
            log.warning("%s: the index is kept in %s (%s)", annotation_file, folder, failures[-1])
        return folder
    raise UserError(
        f"{annotation_file}: cannot write an index ({'; '.join(failures)}); "
        "set KD_CACHE to a folder with space that can be written"
    )


def _places(annotation_file: Path, index_dir: Path | None) -> Iterator[Path]:
    name = f"{annotation_file.stem}.kdindex"
    if index_dir is not None:
        yield index_dir / name
        return
    yield annotation_file.parent / name
    yield in_cache("coco", annotation_file, name)


def _is_fresh(folder: Path, annotation_file: Path) -> bool:
    try:
        _, meta = open_arrays(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return False  # none, or left damaged by a full disk: built again
    stat = annotation_file.stat()
    if meta["reader_version"] != READER_VERSION or meta["json_bytes"] != stat.st_size:
        return False
    if meta["json_mtime_ns"] == stat.st_mtime_ns:
        return True
    with annotation_file.open("rb") as file:  # copied or touched: the content decides
        if hashlib.file_digest(file, "sha256").hexdigest() != meta["sha256"]:
            return False
    try:
        _write_meta(folder, meta | {"json_mtime_ns": stat.st_mtime_ns})
    except OSError:
        pass  # a read-only index is as good, only hashed at each start
    return True


def _write_meta(folder: Path, meta: dict[str, Any]) -> None:
    draft = folder / f"meta.json.{secrets.token_hex(4)}"
    draft.write_text(json.dumps(meta, indent=1), encoding="utf-8")
    draft.replace(folder / "meta.json")


def open_arrays(folder: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Map the arrays of an index, read-only, without reading them.

    Args:
        folder: The index.

    Returns:
        The arrays by name, and the content of `meta.json`.

    Raises:
        OSError: Something is missing.
        ValueError: Something is damaged.
    """
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    arrays = {}
    for name, shape in meta["arrays"].items():
        # asarray drops the memmap subclass, whose indexing is slow; the pages stay mapped.
        arrays[name] = np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
        if list(arrays[name].shape) != shape:
            raise ValueError(f"{folder / name}.npy: shape {arrays[name].shape}, expected {shape}")
    return arrays, meta


def _build(annotation_file: Path, folder: Path) -> None:
    parent = folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    if not parent.stat().st_mode & 0o222:  # root could write; it was made read-only on purpose
        raise PermissionError(0, "read-only folder")
    with folder_lock(parent) as locked:
        if _is_fresh(folder, annotation_file):  # another rank built it meanwhile
            return
        if locked:
            for orphan in parent.glob(f".{folder.name}.*"):  # of a killed build
                shutil.rmtree(orphan, ignore_errors=True)
        draft = parent / f".{folder.name}.{secrets.token_hex(4)}"
        draft.mkdir()
        try:
            _fill(annotation_file, draft)
            if folder.exists():  # stale; processes that have it mapped keep their pages
                folder.rename(draft / "replaced")
            draft.rename(folder)
            shutil.rmtree(folder / "replaced", ignore_errors=True)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _fill(annotation_file: Path, draft: Path) -> None:
    stat = annotation_file.stat()
    if stat.st_size <= IN_PROCESS_BYTES:
        build_index(annotation_file, draft)
    else:
        size = stat.st_size / 1e6
        log.info("%s: indexing %.0f MB; once, up to a minute", annotation_file, size)
        _build_in_child(annotation_file, draft)
    meta = json.loads((draft / "meta.json").read_text(encoding="utf-8"))
    # The stamp from before the reading: a change during it makes the index stale, not wrong.
    _write_meta(draft, meta | {"json_bytes": stat.st_size, "json_mtime_ns": stat.st_mtime_ns})


def _build_in_child(annotation_file: Path, draft: Path) -> None:
    # A plain subprocess: multiprocessing's spawn would run the caller's main module again.
    source = str(Path(kd.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "kd.data.coco_index", str(annotation_file), str(draft)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, check=False
    )
    if done.returncode == USER_ERROR_EXIT:
        raise UserError((draft / ERROR_FILE).read_text(encoding="utf-8"))
    if done.returncode == -signal.SIGKILL:
        need = 7 * annotation_file.stat().st_size / 1e9
        raise UserError(
            f"{annotation_file}: the process reading it was killed, most likely for memory; "
            f"it needs about {need:.0f} GB once"
        )
    if done.returncode != 0:
        text = done.stderr.decode(errors="replace")
        if "No space left on device" in text:
            raise OSError(0, "no space left on device")
        raise RuntimeError(f"{annotation_file}: the reader failed:\n{text}")


def check_images_exist(names: Iterable[str], folder: Path, annotation_file: Path) -> None:
    """Compare image names with folder listings: one listing a folder, not a look-up an image.

    Args:
        names: File names relative to `folder`.
        folder: Where the images should lie.
        annotation_file: Named in messages.

    Raises:
        UserError: The folder or images are missing; the first few names and the count.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: image folder not found (for {annotation_file})")
    listings: dict[str, set[str]] = {}
    missing = []
    count = 0
    for name in names:
        count += 1
        inner, _, base = name.rpartition("/")
        if inner not in listings:
            listings[inner] = _listing(folder / inner)
        if base not in listings[inner]:
            missing.append(name)
    if not missing:
        return
    shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
    if len(missing) == count:
        raise UserError(
            f"{folder}: wrong image folder: none of the {count} images of {annotation_file} "
            f"is here ({shown}){_hint(folder, missing[0])}"
        )
    raise UserError(
        f"{folder}: {len(missing)} of the {count} images of {annotation_file} are missing: "
        f"{shown}; fetch them again, or remove them from the JSON"
    )


def _listing(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except OSError:
        return set()


def _hint(folder: Path, name: str) -> str:
    for parent in (folder, folder.parent):
        for other in sorted(_listing(parent)):
            if (parent / other / name).is_file():
                return f"; did you mean {parent / other}?"
    return ""
