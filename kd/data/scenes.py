"""Generate the embedded scenes: small images with known posteriors, as COCO JSON and PNG.

    python -m kd.data.scenes --out datasets/scenes

writes to the folder:

- `train/` and `val/`: the images, as PNG because JPEG artefacts would reveal hidden objects;
- `annotations/instances_{train,val}.json`: the objects;
- `annotations/posteriors_{train,val}.npz`: exact posteriors, `object_ids` (K,), `log_probs_pixels`
  and `log_probs_annotations` (K, C) float32 (`kd.scenes.generative_model.exact_posteriors`);
- `scenes.json`: the arguments.

The same arguments give the same bytes. A larger split begins with the scenes of a smaller one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.console import Console
from rich.progress import track

from kd.errors import UserError, at_least
from kd.scenes import generative_model, render, shapes, vocabulary
from kd.scenes.generative_model import CANVAS, WORLD, exact_posteriors, sample_scene
from kd.scenes.render import paint_scene
from kd.utils.io import new_folder

VERSION = 1  # increase when a code change makes the same arguments give other scenes
SPLITS = ("train", "val")
FIRST_VAL_IMAGE = 1_000_001  # keeps the ids of the two splits disjoint
OBJECTS_PER_IMAGE = 10  # object id = image id * 10 + position from the left

_log = logging.getLogger(__name__)
Json = dict[str, Any]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Rendered:
    """JSON entries and exact posteriors of a rendered scene."""

    image: Json
    annotations: list[Json]
    log_probs_pixels: Floats
    log_probs_annotations: Floats


def generate_scenes(
    out: str | Path,
    *,
    train: int = 4000,
    val: int = 1000,
    size: int = CANVAS,
    seed: int = 0,
    workers: int = 1,
    progress: bool = False,
) -> Path:
    """Write the embedded scenes, unless `out` already contains the same ones.

    `train` and `val` are numbers of scenes. `size` is the side of the images in pixels, a multiple
    of 64. With more than one of `workers` (processes), the calling script needs a `__main__` guard.

    Raises:
        UserError: An argument is out of range, or `out` contains other files.
    """
    out = Path(out)
    _check(train=train, val=val, size=size, seed=seed, workers=workers)
    recipe = {"train": train, "val": val, "size": size, "seed": seed}
    metadata = {"version": VERSION, **recipe, "fingerprint": _fingerprint(recipe)}
    if _is_there(out, metadata):
        _log.info("%s: already exists", out)
        return out
    try:
        with new_folder(out) as folder:
            _write_all(folder, metadata, workers=workers, progress=progress)
    except UserError:
        if not _is_there(out, metadata):  # if it is, another process wrote them first
            raise
    return out


def _write_all(folder: Path, metadata: Json, *, workers: int, progress: bool) -> None:
    with _mapper(workers) as mapper:
        for split in SPLITS:
            write = partial(_write_scene, folder, split, metadata["size"], metadata["seed"])
            scenes = track(
                mapper(write, metadata[split]), f"{split} scenes", total=metadata[split],
                console=Console(stderr=True), disable=not progress,
            )  # fmt: skip
            _write_split(folder, split, list(scenes))
    (folder / "scenes.json").write_text(json.dumps(metadata, indent=2) + "\n")


def _check(*, train: int, val: int, size: int, seed: int, workers: int) -> None:
    at_least("scenes", train=(train, 1), val=(val, 1), seed=(seed, 0), workers=(workers, 1))
    if max(train, val) >= FIRST_VAL_IMAGE:
        raise UserError(f"scenes: at most {FIRST_VAL_IMAGE - 1} fit a split, got {train} and {val}")
    if size < CANVAS or size % CANVAS:
        raise UserError(f"size: got {size}, expected a multiple of {CANVAS}")


def _fingerprint(recipe: Json) -> str:
    """Hash of the arguments and of all constants that determine the scenes."""
    constants = {
        f"{module.__name__}.{name}": repr(value)
        for module in (vocabulary, generative_model, shapes, render)
        for name, value in vars(module).items()
        # WORLD follows from the other constants; the repr of _TEXTURES has addresses of functions
        if name.isupper() and name not in ("WORLD", "_TEXTURES")
    }
    text = json.dumps([VERSION, recipe, constants], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_there(out: Path, metadata: Json) -> bool:
    """Whether `out` contains the requested scenes; raise a UserError if it has other files."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise UserError(f"{out}: is a file, expected a folder; choose another --out")
    if not any(out.iterdir()):
        return False
    try:
        found = json.loads((out / "scenes.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{out}: contains other files; choose an empty or new folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{out / 'scenes.json'}: cannot be read ({error})") from error
    if found == metadata:
        return True
    found = found if isinstance(found, dict) else {}
    differences = ", ".join(
        f"{key} is {found.get(key)}, expected {value}"
        for key, value in metadata.items()
        if found.get(key) != value
    )
    raise UserError(
        f"{out}: contains other scenes ({differences}); delete it or choose another folder"
    )


@contextmanager
def _mapper(workers: int) -> Iterator[Any]:
    """Yield a function (work, count) that returns the results of work(0), work(1), ... in order."""
    if workers == 1:
        yield lambda work, count: map(work, range(count))
        return
    # Not forked, because a fork would copy locks that threads of the caller may have acquired.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield lambda work, count: pool.imap(work, range(count), chunksize=32)


def _write_scene(folder: Path, split: str, size: int, seed: int, index: int) -> _Rendered:
    """Sample, render and save one scene, determined by seed, split and index."""
    entropy = (seed, SPLITS.index(split), index)
    scene = sample_scene(np.random.default_rng([*entropy, 0]))
    painting = paint_scene(scene, (*entropy, 1), size=size)
    name = f"{index + 1:06d}.png"
    path = folder / split / name
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(painting.image).save(path, compress_level=1)
    unit, kind = size // CANVAS, WORLD.kinds[scene.kind]
    image_id = index + (1 if split == "train" else FIRST_VAL_IMAGE)
    annotations = [
        {
            "id": image_id * OBJECTS_PER_IMAGE + i,
            "image_id": image_id,
            "category_id": int(scene.classes[i]) + 1,
            "bbox": [int(v) * unit for v in scene.boxes[i]],
            "area": painting.areas[i],
            "segmentation": painting.outlines[i],
            "iscrowd": 0,
            "place": vocabulary.PLACE_NAMES[kind][place],
        }
        for i, place in enumerate(scene.places)
    ]
    image = {
        "id": image_id,
        "file_name": name,
        "width": size,
        "height": size,
        "scene": {"kind": kind, "horizon": scene.horizon * unit},
    }
    pixels = np.log(exact_posteriors(scene, given="pixels")).astype(np.float32)
    given = np.log(exact_posteriors(scene, given="annotations")).astype(np.float32)
    return _Rendered(image, annotations, pixels, given)


def _write_split(folder: Path, split: str, rendered: list[_Rendered]) -> None:
    annotations = [annotation for scene in rendered for annotation in scene.annotations]
    content = {
        "info": {"description": f"kd embedded scenes, {split}", "version": str(VERSION)},
        "licenses": [],
        "images": [scene.image for scene in rendered],
        "annotations": annotations,
        "categories": categories(),
    }
    (folder / "annotations").mkdir(exist_ok=True)
    path = folder / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(content, separators=(",", ":")))
    np.savez(
        folder / "annotations" / f"posteriors_{split}.npz",
        object_ids=np.array([a["id"] for a in annotations], dtype=np.int64),
        log_probs_pixels=np.concatenate([s.log_probs_pixels for s in rendered]),
        log_probs_annotations=np.concatenate([s.log_probs_annotations for s in rendered]),
    )


def categories() -> list[Json]:
    """COCO categories of the scenes; only context separates classes with the same `look`."""
    return [
        {"id": i, "name": name, "supercategory": group, "look": look}
        for i, (name, (look, group)) in enumerate(vocabulary.CLASSES.items(), start=1)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m kd.data.scenes`; return the exit status, 2 after a `UserError`."""
    parser = argparse.ArgumentParser(
        prog="python -m kd.data.scenes", description="Write the embedded scenes as COCO JSON + PNG."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--train", type=int, default=4000, metavar="N", help="default 4000")
    parser.add_argument("--val", type=int, default=1000, metavar="N", help="default 1000")
    parser.add_argument("--size", type=int, default=CANVAS, help="multiple of 64; default 64 px")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    workers = min(os.cpu_count() or 1, 8)
    parser.add_argument("--workers", type=int, default=workers, help=f"default here {workers}")
    arguments = vars(parser.parse_args(argv))
    try:
        out = generate_scenes(arguments.pop("out"), progress=True, **arguments)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{out}: {arguments['train']} train and {arguments['val']} val scenes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
