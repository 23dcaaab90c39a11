"""Make a resized copy of a dataset, which loads several times as fast.

    python -m kd.data.prepare --annotations JSON --images DIR --size 384 --out DIR

DIR then contains:

- `images/`: the images as JPEGs, with a long side of at most SIZE pixels;
- `annotations.json`: the annotations scaled like the images, a COCO JSON to train on;
- `prepared.json`: the settings, which allow `ObjectSamples(prepared=DIR)` to read these images in
  place of the originals, with the original annotations.

PNGs become JPEGs of quality 95 too, because PNGs of this size take four times as long to decode.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as run_lengths
from rich.progress import track

from kd.errors import UserError
from kd.formats.coco_validate import read_coco
from kd.formats.rle import encode
from kd.utils.io import write_text

Json = dict[str, Any]
Size = tuple[int, int]

log = logging.getLogger(__name__)

_DECIMALS = 3
_QUALITY = 95
_FORMAT = 1
_DIGEST = 32  # hexadecimal digits of a JSON's SHA-256 that `CocoIndex.fingerprint` has too
_CHUNK = 16
_LISTED = 10
_JPEG = (".jpg", ".jpeg")


def scale_annotations(
    dataset: Json,
    *,
    leave_out: Container[int],
    rescale: Callable[[int, int], Size],
    rename: Callable[[str], str],
) -> Json:
    """Scale the images and annotations of a COCO JSON, without modifying it.

    `leave_out` lists ids of images to drop with their annotations. `rescale` maps an image's
    (height, width) to the new size, and `rename` its file name to the new one.
    """
    images, scales = [], {}
    for entry in dataset["images"]:
        if entry["id"] in leave_out:
            continue
        height, width = rescale(entry["height"], entry["width"])
        scales[entry["id"]] = ((height, width), (width / entry["width"], height / entry["height"]))
        name = rename(entry["file_name"])
        images.append(entry | {"height": height, "width": width, "file_name": name})
    annotations = [
        _scale_annotation(entry, *scales[entry["image_id"]])
        for entry in dataset.get("annotations", ())
        if entry.get("image_id") in scales
    ]
    return dataset | {"images": images, "annotations": annotations}


def _scale_annotation(entry: Json, size: Size, scale: tuple[float, float]) -> Json:
    changed = dict(entry)
    if "bbox" in entry:
        changed["bbox"] = _scale_pairs(entry["bbox"], scale)
    if "area" in entry:
        changed["area"] = round(entry["area"] * scale[0] * scale[1], _DECIMALS)
    segment = entry.get("segmentation")
    if isinstance(segment, list):
        changed["segmentation"] = [_scale_pairs(ring, scale) for ring in segment]
    elif isinstance(segment, dict):
        try:
            changed["segmentation"] = _scale_run_lengths(segment, size)
        except (TypeError, ValueError, KeyError):
            del changed["segmentation"]  # it is corrupt; the object keeps its box
    return changed


def _scale_pairs(values: Any, scale: tuple[float, float]) -> Any:
    if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
        return values  # an invalid polygon, which is counted when the copy is opened
    return [round(value * scale[place % 2], _DECIMALS) for place, value in enumerate(values)]


def _scale_run_lengths(segment: Json, size: Size) -> Json:
    if isinstance(segment["counts"], list):
        segment = run_lengths.frPyObjects(segment, *segment["size"])
    import torch  # not at the top, because it takes seconds and --help does not need it
    from torch.nn.functional import interpolate

    mask = torch.from_numpy(run_lengths.decode(segment))
    resized = interpolate(mask[None, None], size=size, mode="nearest-exact")[0, 0]
    return encode(resized.bool().numpy())


@dataclass(frozen=True)
class PreparedCopy:
    """Resized copy of a dataset, made by `prepare`; images have a long side up to `size` pixels."""

    folder: Path
    size: int

    @staticmethod
    def open(folder: Path, *, at_least: int, fingerprint: str) -> PreparedCopy:
        """Open a prepared copy; raise a UserError unless it is complete and matches the dataset.

        `at_least` is the smallest acceptable `size` in pixels. `fingerprint` is the dataset's
        `CocoIndex.fingerprint`.
        """
        again = f"run: python -m kd.data.prepare --size {at_least} --out {folder} ..."
        settings = _read_settings(folder)
        if settings is None:
            raise UserError(f"{folder}: is not a prepared copy; {again}")
        if not (folder / "annotations.json").is_file():
            raise UserError(f"{folder}: the prepared copy is unfinished; to resume, {again}")
        if not fingerprint.startswith(settings["annotations"]):
            raise UserError(
                f"{folder}: was prepared from other annotations; for another folder, {again}"
            )
        if settings["size"] < at_least:
            raise UserError(
                f"{folder}: prepared at {settings['size']} pixels, but {at_least} are required; "
                f"for another folder, {again}"
            )
        return PreparedCopy(folder, settings["size"])

    def path(self, file_name: str) -> Path:
        """Path of the copy of the image whose original file name is `file_name`."""
        return self.folder / "images" / _copy_name(file_name)

    def image_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the copy of an image whose original size is given."""
        return _copy_size(height, width, self.size)


def prepare(
    annotations: Path, images: Path, out: Path, *, size: int, workers: int = 0
) -> list[str]:
    """Write a resized copy of a dataset, or resume an interrupted copy.

    `size` is the long side in pixels; smaller images are not enlarged. `workers` is the number of
    processes; 0 uses this one. Returns an error message for each unreadable image; such images are
    omitted from the new annotations.
    """
    if size < 1:
        raise UserError(f"--size: got {size}, expected 1 pixel or more")
    coco, digest = read_coco(annotations)
    dataset: Json = coco.dataset
    try:
        _claim(out, size, digest)
        entries = dataset["images"]
        for entry in entries:
            target = out / "images" / _copy_name(entry["file_name"])
            if not target.resolve().is_relative_to(out.resolve()):
                raise UserError(
                    f"image {entry['id']}: file name {entry['file_name']!r} is a path outside {out}"
                )
        copies = _copy_all(entries, images, out, size, workers)
        progress = track(copies, "Resizing", len(entries), disable=not sys.stderr.isatty())
        bad = {
            entry["id"]: text
            for entry, text in zip(entries, progress, strict=True)
            if text is not None
        }
        if len(bad) == len(entries):
            raise UserError(
                f"{images}: no image could be read; the first error: {next(iter(bad.values()))}"
            )
        smaller = scale_annotations(
            dataset, leave_out=bad, rename=_copy_name,
            rescale=lambda height, width: _copy_size(height, width, size),
        )  # fmt: skip
        write_text(out / "annotations.json", json.dumps(smaller))
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot write: {error.strerror}") from None
    return list(bad.values())


def _copy_all(
    entries: Sequence[Json], images: Path, out: Path, size: int, workers: int
) -> Iterator[str | None]:
    """Copy images; yield in order None, or the error message of an unreadable image."""
    copy = functools.partial(_copy_image, images, out, size)
    if workers == 0:
        yield from map(copy, entries)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
        yield from pool.map(copy, entries, chunksize=_CHUNK)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _copy_image(images: Path, out: Path, size: int, entry: Json) -> str | None:
    source, target = images / entry["file_name"], out / "images" / _copy_name(entry["file_name"])
    with contextlib.suppress(OSError):
        if target.stat().st_mtime >= source.stat().st_mtime:
            return None  # a complete copy that is not older than its source
    expected = (entry["height"], entry["width"])
    small = max(expected) <= size
    from kd.utils.images import read_image

    try:
        pixels = read_image(source, None if small else size, expected=expected)
    except UserError as error:
        return str(error)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.part")
    if small and source.suffix.lower() in _JPEG:
        shutil.copyfile(source, unfinished)  # encoding a JPEG again would only lose quality
    else:
        array = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
        Image.fromarray(array).save(unfinished, "JPEG", quality=_QUALITY)
    unfinished.replace(target)
    return None


def _copy_name(file_name: str) -> str:
    """File name of a copy; .jpg is appended unless the image is a JPEG."""
    return file_name if Path(file_name).suffix.lower() in _JPEG else f"{file_name}.jpg"


def _copy_size(height: int, width: int, size: int) -> tuple[int, int]:
    from kd.utils.images import scaled_size

    return (height, width) if max(height, width) <= size else scaled_size(height, width, size)


def _claim(out: Path, size: int, digest: str) -> None:
    source = digest[:_DIGEST]
    settings = {"format": _FORMAT, "size": size, "quality": _QUALITY, "annotations": source}
    found = _read_settings(out)
    if found is None:
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out}: is not empty and not a prepared copy; choose a new folder")
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "prepared.json", json.dumps(settings))
    elif found != settings:
        raise UserError(
            f"{out}: is a copy of {found['size']} pixels of annotations {found['annotations']}, "
            f"not of {size} pixels of annotations {source}; choose another folder"
        )


def _read_settings(folder: Path) -> dict[str, Any] | None:
    path = folder / "prepared.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}; delete the folder") from None
    if not isinstance(settings, dict) or settings.get("format") != _FORMAT:
        raise UserError(f"{path}: was written by another version of kd; prepare a new folder")
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 1 if images were left out, 2 for a `UserError`."""
    parser = argparse.ArgumentParser(prog="python -m kd.data.prepare", description=__doc__)
    parser.add_argument("--annotations", type=Path, required=True, help="COCO instances JSON")
    parser.add_argument("--images", type=Path, required=True, help="folder of its images")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the copy to")
    parser.add_argument("--size", type=int, default=384, help="long side of copies, pixels")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes that resize"
    )
    options = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        bad = prepare(**options)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to resume\n")
        return 130
    for text in bad[:_LISTED]:
        log.warning("%s", text)
    if len(bad) > _LISTED:
        log.warning("and %d more", len(bad) - _LISTED)
    log.info("%s: finished; %d images left out as unreadable", options["out"], len(bad))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
