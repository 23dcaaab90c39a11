"""Convert a COCO JSON to an index: flat arrays that `kd.formats.coco` opens in seconds.

Large JSONs are converted in a separate process, which frees its memory when it ends.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
from array import array
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock
from pycocotools.coco import COCO

from kd.errors import UserError
from kd.formats.coco_validate import Json, is_number, read_coco
from kd.formats.rle import pixels_of
from kd.utils.io import cache_path, may_write

log = logging.getLogger(__name__)

READER_VERSION = 2
IN_PROCESS_BYTES = 8 << 20  # JSONs up to this size are converted in this process
CROWD_PREFIX = "crowd_"  # prefix of the names of arrays of crowds
USER_ERROR_EXIT = 3
_LISTED = 5
_BOX_TOLERANCE = 0.01  # boxes that exceed the image by fewer pixels are not noted as clipped
_SMALLEST_SIDE = 1.0  # pixels; in a thinner box there is nothing to hide or to recognise
_SKIP_CROWD, _SKIP_ZERO, _SKIP_OUTSIDE, _SKIP_TINY = "crowd", "zero_area", "outside_image", "tiny"

Array = npt.NDArray[Any]


def build_index(annotation_file: Path, folder: Path) -> None:
    """Read a COCO JSON and write its arrays and `meta.json` to the empty folder `folder`."""
    coco, digest = read_coco(annotation_file)
    reader, crowds = _ObjectReader(coco), _ObjectReader(coco, crowds=True)
    for image_id in coco.imgs:
        reader.read_image(image_id)
        crowds.read_image(image_id)
    if not reader.ids:
        reasons = ", ".join(f"{count} {reason}" for reason, count in reader.skipped.items())
        raise UserError(f"{annotation_file}: empty dataset: no usable object (skipped: {reasons})")
    arrays = _image_arrays(list(coco.imgs.values())) | reader.arrays(annotation_file)
    if crowds.ids:
        found = crowds.arrays(annotation_file)
        arrays |= {f"{CROWD_PREFIX}{name}": values for name, values in found.items()}
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    meta = {
        "sha256": digest,
        "reader_version": READER_VERSION,
        "arrays": {name: list(values.shape) for name, values in arrays.items()},
        "categories": [
            {"id": key, "name": coco.cats[key]["name"], "look": coco.cats[key].get("look")}
            for key in sorted(coco.cats)
        ],
        "skipped": dict(reader.skipped),
        "notes": dict(reader.notes),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _offsets(lengths: Iterable[int]) -> npt.NDArray[np.int64]:
    counts = np.fromiter(lengths, dtype=np.int64)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _image_arrays(images: list[Json]) -> dict[str, Array]:
    names = [entry["file_name"].encode("utf-8", "surrogateescape") for entry in images]
    return {
        "image_ids": np.array([entry["id"] for entry in images], np.int64),
        "heights": np.array([entry["height"] for entry in images], np.int32),
        "widths": np.array([entry["width"] for entry in images], np.int32),
        "name_bytes": np.frombuffer(b"".join(names), np.uint8),
        "name_first": _offsets(map(len, names)),
    }


class _ObjectReader:
    """Append the usable objects (or the crowds, if `crowds`) of each image to typed arrays."""

    def __init__(self, coco: COCO, *, crowds: bool = False) -> None:
        self.coco, self.crowds = coco, crowds
        self.label_of = {key: label for label, key in enumerate(sorted(coco.cats))}
        self.skipped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.counts = array("q")  # objects of each image
        self.ids, self.labels = array("q"), array("h")
        self.boxes, self.areas = array("f"), array("f")
        self.coordinates = array("f")
        self.ring_lengths, self.rings_of = array("q"), array("q")
        self.rle, self.rle_lengths = bytearray(), array("q")
        self.scored = bytearray()

    def read_image(self, image_id: int) -> None:
        before = len(self.ids)
        image = self.coco.imgs[image_id]
        for entry in self.coco.imgToAnns.get(image_id, ()):
            if bool(entry.get("iscrowd")) != self.crowds:
                self.skipped[_SKIP_CROWD] += 1
                continue
            box = self._usable_box(entry, image["width"], image["height"])
            if box is None:
                continue
            self.ids.append(entry["id"])
            self.labels.append(self.label_of[entry["category_id"]])
            self.boxes.extend(box)
            area = entry.get("area")
            size = (box[2] - box[0]) * (box[3] - box[1])
            self.areas.append(area if is_number(area) and area > 0 else size)
            self.scored.append(entry.get("scored") is not False)
            self._read_segment(entry, image)
        self.counts.append(len(self.ids) - before)
        if len(self.ids) == before:
            self.notes["images_without_object"] += 1

    def _usable_box(
        self, entry: Json, width: int, height: int
    ) -> tuple[float, float, float, float] | None:
        x, y, w, h = entry["bbox"]
        x1, y1, x2, y2 = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
        reason = None
        if w <= 0 or h <= 0:
            reason = _SKIP_ZERO
        elif x1 >= x2 or y1 >= y2:
            reason = _SKIP_OUTSIDE
        elif x2 - x1 < _SMALLEST_SIDE or y2 - y1 < _SMALLEST_SIDE:
            reason = _SKIP_TINY
        if reason is not None:
            self.skipped[reason] += 1
            return None
        if max(x1 - x, y1 - y, x + w - x2, y + h - y2) > _BOX_TOLERANCE:
            self.notes["clipped"] += 1
        return x1, y1, x2, y2

    def _read_segment(self, entry: Json, image: Json) -> None:
        segment = entry.get("segmentation")
        rings, rle = 0, b""
        if isinstance(segment, list):
            rings = sum(self._read_ring(ring) for ring in segment)
        elif isinstance(segment, dict):
            rle = self._compressed(entry, image)
        if not rings and not rle:
            self.notes["without_segment"] += 1
        self.rings_of.append(rings)
        self.rle += rle
        self.rle_lengths.append(len(rle))

    def _read_ring(self, ring: Any) -> bool:
        start = len(self.coordinates)
        valid = isinstance(ring, list) and len(ring) >= 6 and len(ring) % 2 == 0
        if valid:
            try:
                self.coordinates.extend(ring)
                self.ring_lengths.append(len(ring) // 2)
                return True
            except (TypeError, OverflowError):
                del self.coordinates[start:]
        self.notes["bad_ring"] += 1
        return False

    def _compressed(self, entry: Json, image: Json) -> bytes:
        segment, size = entry["segmentation"], [image["height"], image["width"]]
        counts = segment.get("counts") if segment.get("size") == size else None
        packed = b""
        try:
            if isinstance(counts, list):
                packed = self.coco.annToRLE(entry)["counts"]
            elif isinstance(counts, str):
                packed = counts.encode("ascii")
        except (TypeError, ValueError, OverflowError):
            pass  # counts are not numbers, or not ASCII: UnicodeEncodeError is a ValueError
        if pixels_of(packed) == size[0] * size[1]:
            return packed
        self.notes["bad_run_lengths"] += 1
        return b""

    def arrays(self, path: Path) -> dict[str, Array]:
        points = np.frombuffer(self.coordinates, np.float32).reshape(-1, 2)
        if not np.isfinite(points).all():
            raise UserError(self._infinite_polygon(path, points))
        scored = np.frombuffer(self.scored, np.bool_)
        return {
            **({} if scored.all() else {"scored": scored}),  # omitted if all objects are scored
            "first": _offsets(self.counts),
            "object_ids": np.frombuffer(self.ids, np.int64),
            "labels": np.frombuffer(self.labels, np.int16),
            "boxes": np.frombuffer(self.boxes, np.float32).reshape(-1, 4),
            "areas": np.frombuffer(self.areas, np.float32),
            "points": points,
            "ring_first": _offsets(self.ring_lengths),
            "rings_of": _offsets(self.rings_of),
            "rle_bytes": np.frombuffer(self.rle, np.uint8),
            "rle_first": _offsets(self.rle_lengths),
        }

    def _infinite_polygon(self, path: Path, points: Array) -> str:
        point = int(np.flatnonzero(~np.isfinite(points).all(axis=1))[0])
        ring = int(np.searchsorted(_offsets(self.ring_lengths), point, side="right")) - 1
        row = int(np.searchsorted(_offsets(self.rings_of), ring, side="right")) - 1
        return f"{path}: annotation {self.ids[row]}: 'segmentation' has a number that is not finite"


def up_to_date_index(annotation_file: Path) -> Path:
    """Return the index folder of a JSON, beside it or in the cache; build the index if outdated."""
    if not annotation_file.is_file():
        raise UserError(
            f"{annotation_file}: annotation file not found; check the dataset's root, or fetch "
            "COCO with: python -m kd.data.download coco2017 --out DIR"
        )
    name = f"{annotation_file.stem}.kdindex"
    folders = [annotation_file.parent / name, cache_path("coco", annotation_file, name)]
    for folder in folders:
        if _is_fresh(folder, annotation_file):
            return folder
    failures = []
    for folder in folders:
        try:
            _build(annotation_file, folder)
        except OSError as error:
            failures.append(f"{folder.parent}: {error.strerror or error}")
            continue
        if failures:
            log.warning("%s: the index is stored in %s (%s)", annotation_file, folder, failures[-1])
        return folder
    raise UserError(
        f"{annotation_file}: cannot write an index ({'; '.join(failures)}); "
        "set KD_CACHE to a writable folder with enough space"
    )


def _is_fresh(folder: Path, annotation_file: Path) -> bool:
    try:
        _, meta = open_arrays(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return False  # the index is missing, or incomplete because the disk was full
    stat = annotation_file.stat()
    if meta["reader_version"] != READER_VERSION or meta["json_bytes"] != stat.st_size:
        return False
    if meta["json_mtime_ns"] == stat.st_mtime_ns:
        return True
    with annotation_file.open("rb") as file:  # another time may only mean that the file was copied
        if hashlib.file_digest(file, "sha256").hexdigest() != meta["sha256"]:
            return False
    try:
        _write_meta(folder, meta | {"json_mtime_ns": stat.st_mtime_ns})
    except OSError:
        pass  # a read-only index is valid too, but its JSON is hashed at each start
    return True


def _write_meta(folder: Path, meta: dict[str, Any]) -> None:
    partial = folder / f"meta.json.{secrets.token_hex(4)}"
    partial.write_text(json.dumps(meta, indent=1), encoding="utf-8")
    partial.replace(folder / "meta.json")


def open_arrays(folder: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Memory-map an index read-only; return its arrays by name, and its `meta.json`.

    Raises OSError if a file is missing, ValueError if a file is corrupt.
    """
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    arrays = {}
    for name, shape in meta["arrays"].items():
        # Views as plain arrays are faster to slice than np.memmap; the file stays mapped.
        arrays[name] = np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
        if list(arrays[name].shape) != shape:
            raise ValueError(f"{folder / name}.npy: shape {arrays[name].shape}, expected {shape}")
    return arrays, meta


def _build(annotation_file: Path, folder: Path) -> None:
    parent = folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    if not may_write(parent):
        raise PermissionError(0, "read-only folder")
    with FileLock(parent / f"{folder.name}.lock"):
        if _is_fresh(folder, annotation_file):  # another process has built it meanwhile
            return
        for leftover in parent.glob(f".{folder.name}.*"):  # from a build that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        partial = parent / f".{folder.name}.{secrets.token_hex(4)}"
        partial.mkdir()
        try:
            _build_into(annotation_file, partial)
            if folder.exists():  # outdated, but still readable for processes that have mapped it
                folder.rename(partial / "replaced")
            partial.rename(folder)
            shutil.rmtree(folder / "replaced", ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _build_into(annotation_file: Path, partial: Path) -> None:
    stat = annotation_file.stat()
    if stat.st_size <= IN_PROCESS_BYTES:
        build_index(annotation_file, partial)
    else:
        size = stat.st_size / 1e6
        log.info(
            "%s: indexing %.0f MB; this happens only once and may take a minute",
            annotation_file, size,
        )  # fmt: skip
        _build_in_child(annotation_file, partial)
    meta = json.loads((partial / "meta.json").read_text(encoding="utf-8"))
    # Size and time from before reading, so that a change meanwhile makes the index outdated.
    _write_meta(partial, meta | {"json_bytes": stat.st_size, "json_mtime_ns": stat.st_mtime_ns})


def _build_in_child(annotation_file: Path, partial: Path) -> None:
    # Not multiprocessing, because its spawn method would run the caller's main module again.
    source = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "kd.formats.coco_index", str(annotation_file), str(partial)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, check=False
    )
    if done.returncode == USER_ERROR_EXIT:
        raise UserError(done.stdout.decode())
    if done.returncode == -signal.SIGKILL:
        need = 7 * annotation_file.stat().st_size / 1e9
        raise UserError(
            f"{annotation_file}: the process reading it was killed, most likely out of memory; "
            f"the first reading needs about {need:.0f} GB"
        )
    if done.returncode != 0:
        text = done.stderr.decode(errors="replace")
        if "No space left on device" in text:
            raise OSError(0, "no space left on device")
        raise RuntimeError(f"{annotation_file}: the reader failed:\n{text}")


def check_images_exist(file_names: Iterable[str], folder: Path, annotation_file: Path) -> None:
    """Check that all images exist, by listing each folder once."""
    if not folder.is_dir():
        raise UserError(f"{folder}: image folder not found (for {annotation_file})")
    names = [name.rpartition("/") for name in file_names]
    listings = {inner: _listing(folder / inner) for inner in {inner for inner, _, _ in names}}
    missing = ["".join(name) for name in names if name[2] not in listings[name[0]]]
    if not missing:
        return
    listed = ", ".join(missing[:_LISTED]) + (", ..." if len(missing) > _LISTED else "")
    if len(missing) == len(names):
        raise UserError(
            f"{folder}: wrong image folder: none of the {len(names)} images of {annotation_file} "
            f"is here ({listed}){_hint(folder, missing[0])}"
        )
    raise UserError(
        f"{folder}: {len(missing)} of the {len(names)} images of {annotation_file} are missing: "
        f"{listed}; fetch them again, or remove them from the JSON"
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


def main(arguments: list[str]) -> int:
    """Build an index; print the message of a `UserError` to stdout for the parent process."""
    gc.disable()  # collection takes half the time, though millions of objects have no cycles
    annotation_file, folder = map(Path, arguments)
    try:
        build_index(annotation_file, folder)
    except UserError as error:
        sys.stdout.buffer.write(str(error).encode())
        return USER_ERROR_EXIT
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
