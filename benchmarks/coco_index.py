"""Measure time and memory of a COCO index of the size of the training set.

Generate a JSON file of COCO train2017's size, build its index, open the index in a new process, and
measure the memory of that process and of two workers. Linux only (proportional set size); needs
about 1 GB of disk space.

    python benchmarks/coco_index.py [--images 118287] [--objects 860001] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil

WIDTH, HEIGHT, CATEGORIES, SHAPES = 640, 480, 80, 4096
MEAN_CORNERS = 22  # gives a JSON of COCO's size, 448 MB


def write_json(path: Path, images: int, objects: int) -> None:
    """Write a COCO JSON file with random star-shaped polygons, drawn from a pool of shapes."""
    rng = np.random.default_rng(0)
    pool = [_shape(rng) for _ in range(SHAPES)]
    of_image = np.sort(rng.integers(images, size=objects))
    shapes, classes = rng.integers(SHAPES, size=objects), rng.integers(CATEGORIES, size=objects)
    with path.open("w") as file:
        file.write('{"info": {}, "licenses": [], "categories": ')
        json.dump([{"id": i + 1, "name": f"class {i}"} for i in range(CATEGORIES)], file)
        file.write(', "images": [')
        for i in range(images):
            file.write(
                f'{", " if i else ""}{{"license": 3, "file_name": "{i:012d}.jpg", "coco_url": '
                f'"http://images.cocodataset.org/train2017/{i:012d}.jpg", "height": {HEIGHT}, '
                f'"width": {WIDTH}, "date_captured": "2013-11-14 11:18:45", "flickr_url": '
                f'"http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg", "id": {i}}}'
            )
        file.write('], "annotations": [')
        for i, (image, shape, label) in enumerate(zip(of_image, shapes, classes, strict=True)):
            file.write(
                f'{", " if i else ""}{{{pool[shape]}, "iscrowd": 0, "image_id": {image}, '
                f'"category_id": {label + 1}, "id": {i}}}'
            )
        file.write("]}")


def _shape(rng: np.random.Generator) -> str:
    corners = max(4, int(rng.exponential(MEAN_CORNERS)))
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    radii = rng.uniform(5, 120) * rng.uniform(0.6, 1.0, corners)
    x = np.clip(rng.uniform(0, WIDTH) + radii * np.cos(angles), 0, WIDTH)
    y = np.clip(rng.uniform(0, HEIGHT) + radii * np.sin(angles), 0, HEIGHT)
    ring = ", ".join(f"{value:.2f}" for value in np.stack([x, y], 1).ravel())
    box = [round(float(v), 2) for v in (x.min(), y.min(), np.ptp(x) + 2, np.ptp(y) + 2)]
    area = box[2] * box[3] / 2
    return f'"segmentation": [[{ring}]], "area": {area:.4f}, "bbox": {box}'


def open_once(json_file: Path, images: Path) -> None:
    """Open the index in this separate process; print its time and memory."""
    from kd.formats.coco import load_coco

    before = _megabytes()
    start = time.perf_counter()
    index = load_coco(json_file, images)
    seconds = time.perf_counter() - start
    after = _megabytes()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"  load_coco {seconds:6.1f} s: {len(index)} images, {len(index.object_ids)} objects")
    print(f"  this process before: {_line(before)}")
    print(f"  this process after:  {_line(after)}")
    if used.ru_maxrss:
        processor = used.ru_utime + used.ru_stime
        print(f"  the child that read the JSON: {processor:.1f} s of processor time, ", end="")
        print(f"peak {used.ru_maxrss / 1e3:.0f} MB, given back")
        return
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(2)]
    workers = [context.Process(target=_work, args=(index, end)) for _, end in pipes]
    for worker in workers:
        worker.start()
    for ours, _ in pipes:
        ours.recv()  # both have read every page by now
    for number, (ours, _) in enumerate(pipes):
        ours.send("measure")
        print(f"  worker {number}, all pages read: {_line(ours.recv())}")
    print(f"  this process beside them:   {_line(_megabytes())}")
    for (ours, _), worker in zip(pipes, workers, strict=True):
        ours.send("end")
        worker.join()


def _work(index: object, pipe: Connection) -> None:
    for value in vars(index).values():
        if isinstance(value, np.ndarray):
            value.view(np.uint8).max(initial=0)
    pipe.send("ready")
    pipe.recv()
    pipe.send(_megabytes())
    pipe.recv()


def _megabytes() -> tuple[float, float, float]:
    info = psutil.Process().memory_full_info()
    return info.rss / 1e6, info.pss / 1e6, info.uss / 1e6


def _line(megabytes: tuple[float, float, float]) -> str:
    return "RSS {:.0f} MB, PSS {:.0f} MB, USS {:.0f} MB".format(*megabytes)


def main() -> None:
    """Generate the file, build the index and open it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--objects", type=int, default=860_001)
    parser.add_argument("--folder", type=Path, help="keep the files here (default: temporary)")
    parser.add_argument("--open", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open:
        open_once(arguments.folder / "instances.json", arguments.folder / "images")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        json_file, images = folder / "instances.json", folder / "images"
        images.mkdir(parents=True, exist_ok=True)
        for i in range(arguments.images):
            (images / f"{i:012d}.jpg").touch()
        start = time.perf_counter()
        write_json(json_file, arguments.images, arguments.objects)
        size, seconds = json_file.stat().st_size / 1e6, time.perf_counter() - start
        print(f"generated {size:.0f} MB of JSON in {seconds:.0f} s", flush=True)
        for title in ("first start: builds the index", "second start"):
            print(title, flush=True)
            command = [sys.executable, __file__, "--open", "--folder", str(folder)]
            subprocess.run(command, check=True)
        built = sum(file.stat().st_size for file in (folder / "instances.kdindex").iterdir())
        print(f"the index on disk: {built / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
