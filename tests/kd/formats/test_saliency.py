"""Datasets of fixations as they lie when unpacked, each made small here, and their mistakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from kd.errors import UserError
from kd.formats.fixations import UNKNOWN, GazeSplit
from kd.formats.saliency import SplitOptions, open_gaze
from kd.formats.splits import random_split

HEIGHT, WIDTH = 24, 32
SIZE = (HEIGHT, WIDTH)
WANTED = SplitOptions(degree=3.0, val_fraction=0.4)


def stems(split: GazeSplit) -> tuple[str, ...]:
    """Names of the images, without suffix."""
    return tuple(path.stem for path in split.images)


def picture(path: Path, size: tuple[int, int] = SIZE, value: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def grey(path: Path, values: np.ndarray[Any, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path, quality=95)


def mat(path: Path, **content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, content)


def gaze_of(*observers: list[list[int]]) -> np.ndarray[Any, Any]:
    """SALICON's struct array, one entry an observer."""
    kind = [("location", object), ("timestamp", object), ("fixations", object)]
    rows = np.zeros((len(observers), 1), dtype=kind)
    for row, points in zip(rows[:, 0], observers, strict=True):
        row["fixations"] = np.array(points, np.uint16).reshape(-1, 2)
        row["location"], row["timestamp"] = np.zeros((1, 2)), np.zeros((1, 1))
    return rows


@pytest.fixture
def salicon(tmp_path: Path) -> Path:
    root = tmp_path / "salicon"
    for part, names in (("train", ("COCO_1", "COCO_2")), ("val", ("COCO_3",))):
        for name in names:
            picture(root / "images" / part / f"{name}.jpg")
            gaze = gaze_of([[1, 1], [20, 10]], [[32, 24]])
            mat(root / "fixations" / part / f"{name}.mat", gaze=gaze, resolution=[HEIGHT, WIDTH])
            values = np.zeros(SIZE)
            values[4, 6] = 200
            grey(root / "maps" / part / f"{name}.png", values)
    return root


@pytest.fixture
def mit1003(tmp_path: Path) -> Path:
    root = tmp_path / "mit1003"
    for number in range(5):
        picture(root / "ALLSTIMULI" / f"i{number}.jpeg")
        points = np.zeros(SIZE)
        points[8, 8 + number], points[16, 20] = 255, 255
        grey(root / "ALLFIXATIONMAPS" / f"i{number}_fixPts.jpg", points)
        grey(root / "ALLFIXATIONMAPS" / f"i{number}_fixMap.jpg", points // 2 + 1)
    return root


@pytest.fixture
def cat2000(tmp_path: Path) -> Path:
    root = tmp_path / "cat2000" / "trainSet"
    for category in ("Action", "Art"):
        for number in ("001", "002", "003"):
            picture(root / "Stimuli" / category / f"{number}.jpg")
            picture(root / "Stimuli" / category / "Output" / f"{number}_out.jpg")
            points = np.zeros(SIZE, np.uint8)
            points[5, 7] = 1
            mat(root / "FIXATIONLOCS" / category / f"{number}.mat", fixLocs=points)
            grey(root / "FIXATIONMAPS" / category / f"{number}.jpg", points * 255)
    return root.parent


@pytest.fixture
def osie(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes OSIE as our copy has it, of rows image, subject, x, y."""

    def write(
        rows: list[list[float]] | None = None,
        *,
        columns: tuple[str, ...] = ("image", "subject", "x", "y", "duration"),
        names: tuple[str, ...] = ("1001", "1002", "1003", "1004", "1005"),
    ) -> Path:
        root = tmp_path / "osie"
        for name in names:
            picture(root / "stimuli" / f"{name}.jpg")
        if rows is None:
            rows = [
                [float(name), subject, 2.5 + subject, 3.5, 200.0]
                for subject in range(3)
                for name in reversed(names)
            ]
        data = np.array(rows, np.float32).reshape(-1, len(columns))
        np.savez(root / "fixations.npz", columns=np.array(columns), data=data)
        return root

    return write


def test_salicon_has_observers_and_one_based_pixels(salicon: Path) -> None:
    train = open_gaze("salicon", salicon, "train", WANTED)
    assert stems(train) == ("COCO_1", "COCO_2")
    found = train.fixations(0, SIZE)
    # MATLAB's pixel 1 is the first: its middle is half a pixel from the corner.
    assert found.points.tolist() == [[0.5, 0.5], [19.5, 9.5], [31.5, 23.5]]
    assert found.observers.tolist() == [0, 0, 1]
    assert stems(open_gaze("salicon", salicon, "val", WANTED)) == ("COCO_3",)


def test_published_maps_are_used_if_requested(salicon: Path) -> None:
    wanted = SplitOptions(degree=3.0, published=True)
    density = open_gaze("salicon", salicon, "train", wanted).density(0, SIZE, SIZE)[0]
    assert density[4, 6] == 1
    drawn = open_gaze("salicon", salicon, "train", WANTED).density(0, SIZE, SIZE)[0]
    assert drawn[4, 6] < 0.1
    (salicon / "maps" / "train" / "COCO_2.png").unlink()
    with pytest.raises(UserError, match=r"COCO_2\.png: this density map is missing \(1 of 2"):
        open_gaze("salicon", salicon, "train", wanted)


def test_salicon_of_another_resolution_is_rejected(salicon: Path) -> None:
    path = salicon / "fixations" / "val" / "COCO_3.mat"
    mat(path, gaze=gaze_of([[1, 1]]), resolution=[480, 640])
    val = open_gaze("salicon", salicon, "val", WANTED)
    with pytest.raises(UserError, match=r"COCO_3\.mat: .* of 640 x 480 pixels, but it is 32 x 24"):
        val.fixations(0, SIZE)


def test_a_salicon_image_without_fixations_is_rejected(salicon: Path) -> None:
    mat(salicon / "fixations" / "val" / "COCO_3.mat", gaze=gaze_of([], []))
    with pytest.raises(UserError, match=r"COCO_3\.jpg: no fixations on this image"):
        open_gaze("salicon", salicon, "val", WANTED).fixations(0, SIZE)


def test_broken_fixation_files_are_reported(salicon: Path) -> None:
    path = salicon / "fixations" / "val" / "COCO_3.mat"
    wrong: dict[str, Callable[[], Any]] = {
        "this .mat file cannot be read": lambda: path.write_bytes(b"no MATLAB at all" * 20),
        "no 'gaze' in it; it has looks": lambda: mat(path, looks=[1]),
        "gaze 1 has no fixations": lambda: mat(path, gaze=np.zeros(1, [("points", object)])),
    }
    for message, write in wrong.items():
        write()
        val = open_gaze("salicon", salicon, "val", WANTED)
        with pytest.raises(UserError, match=rf"COCO_3\.mat: {message}"):
            val.fixations(0, SIZE)
    path.unlink()
    with pytest.raises(UserError, match=r"COCO_3\.mat: this file of fixations is missing"):
        open_gaze("salicon", salicon, "val", WANTED)


def test_mit1003_has_no_observers_and_a_random_split(mit1003: Path) -> None:
    train, val = (open_gaze("mit1003", mit1003, part, WANTED) for part in ("train", "val"))
    assert len(train.images) == 3 and len(val.images) == 2
    assert sorted(stems(train) + stems(val)) == [f"i{number}" for number in range(5)]
    found = train.fixations(0, SIZE)
    first = 8 + int(stems(train)[0][1:])
    # A JPEG blurs points: each is found, perhaps with a neighbour, and none elsewhere.
    near = {(float(x) - 0.5, float(y) - 0.5) for x, y in found.points}
    assert {(first, 8.0), (20.0, 16.0)} <= near
    assert all(min(abs(x - first) + abs(y - 8), abs(x - 20) + abs(y - 16)) <= 2 for x, y in near)
    assert (found.observers == UNKNOWN).all()


def test_cat2000_has_categories_and_no_output_folders(cat2000: Path) -> None:
    train, val = (open_gaze("cat2000", cat2000, part, WANTED) for part in ("train", "val"))
    assert len(train.images) + len(val.images) == 6
    assert set(stems(train) + stems(val)) == {"001", "002", "003"}
    assert train.fixations(0, SIZE).points.tolist() == [[7.5, 5.5]]
    path = (
        cat2000
        / "trainSet"
        / "FIXATIONLOCS"
        / train.images[1].parent.name
        / f"{stems(train)[1]}.mat"
    )
    mat(path, fixLocs=np.ones((10, 12)))
    with pytest.raises(UserError, match=r"\.mat: fixations on an image of 12 x 10 pixels, but"):
        train.fixations(1, SIZE)
    mat(path, fixLocs=np.zeros(SIZE))
    with pytest.raises(UserError, match="no fixations on this image"):
        train.fixations(1, SIZE)


def test_osie_rows_are_matched_by_image(osie: Callable[..., Path]) -> None:
    train = open_gaze("osie", osie(), "train", WANTED)
    for number in range(len(train.images)):
        found = train.fixations(number, SIZE)
        assert found.points.tolist() == [[2.5, 3.5], [3.5, 3.5], [4.5, 3.5]]
        assert found.observers.tolist() == [0, 1, 2]


def test_an_image_without_rows_is_rejected(osie: Callable[..., Path]) -> None:
    root = osie([[1001, 0, 1, 1, 1], [1002, 0, 1, 1, 1]], names=("1001", "1002", "1003"))
    for part in ("train", "val"):
        split = open_gaze("osie", root, part, WANTED)
        if "1003" in stems(split):
            with pytest.raises(UserError, match=r"1003\.jpg: no fixations on this image"):
                split.fixations(stems(split).index("1003"), SIZE)


def test_bad_tables_are_rejected(osie: Callable[..., Path]) -> None:
    root = osie([[1001, 0, 1]], columns=("image", "subject", "x"))
    with pytest.raises(UserError, match=r"fixations\.npz: no column y; it has image, subject, x"):
        open_gaze("osie", root, "train", WANTED)
    root = osie([[1001, 0, 1, float("nan"), 1]])
    with pytest.raises(
        UserError, match=r"fixations\.npz: the table has values that are not finite"
    ):
        open_gaze("osie", root, "train", WANTED)
    (root / "fixations.npz").write_bytes(b"PK nothing")
    with pytest.raises(UserError, match=r"fixations\.npz: not a table of fixations"):
        open_gaze("osie", root, "train", WANTED)
    root = osie(names=("1001", "1002", "lake"), rows=[[1001, 0, 1, 1, 1]])
    with pytest.raises(UserError, match="the image name 'lake' is not a number"):
        for part in ("train", "val"):
            open_gaze("osie", root, part, WANTED)
    with pytest.raises(UserError, match="osie has no density maps"):
        open_gaze("osie", root, "train", SplitOptions(degree=3.0, published=True))


def test_bad_folders_and_unknown_splits_are_rejected(
    salicon: Path, mit1003: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"has no split 'test' there; it has train, val"):
        open_gaze("salicon", salicon, "test", WANTED)
    with pytest.raises(UserError, match=r"mit1003 has no split 'test' there; it has train, val"):
        open_gaze("mit1003", mit1003, "test", WANTED)
    with pytest.raises(UserError, match=r"no fixations in it, so it is not the folder of salicon"):
        open_gaze("salicon", tmp_path, "train", WANTED)
    for path in (salicon / "images" / "val").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="empty split: no images"):
        open_gaze("salicon", salicon, "val", WANTED)


def test_a_random_split_depends_on_names_and_seed_only() -> None:
    names = [f"picture{number}" for number in range(200)]
    val = random_split(names, 0.2, 0)
    assert len(val) == 40 and val == random_split(names[::-1], 0.2, 0)
    assert val != random_split(names, 0.2, 1)
    # A new image moves at most one other to the other side.
    assert len(val - random_split([*names, "new"], 0.2, 0)) <= 1
    assert len(random_split(["a", "b"], 0.01, 0)) == 1 == len(random_split(["a", "b"], 0.99, 0))


def test_the_real_osie_is_read(shared_data: Path) -> None:
    root = shared_data / "osie"
    if not root.is_dir():
        pytest.skip(f"no osie in {shared_data}")
    train, val = (
        open_gaze("osie", root, part, SplitOptions(degree=12.0)) for part in ("train", "val")
    )
    assert (len(train.images), len(val.images)) == (480, 120)
    assert not set(train.images) & set(val.images)
    found = [val.fixations(number, (300, 400)) for number in range(len(val.images))]
    assert all(len(np.unique(one.observers)) == 15 for one in found)
    assert np.mean([len(one.points) for one in found]) == pytest.approx(140, abs=5)
