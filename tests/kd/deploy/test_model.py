"""A trained model predicts images without its data, as its evaluation did with them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import kd
from kd.engine.checkpoint import load_model, save_model
from kd.evaluation.predict import open_run
from kd.problems.detection.inference import Detections
from kd.problems.inference import read_input
from kd.problems.objects.inference import MOST_BOXES, ObjectClasses
from kd.problems.saliency.inference import SaliencyMap
from kd.problems.segmentation.inference import LabelMap
from kd.utils.images import read_image

pytestmark = pytest.mark.slow


def boxes_of(run: Path, file: Path) -> list[list[float]]:
    """The boxes of an image, from the run's annotations."""
    [path] = (run.parent / "data" / "objects").rglob("instances_val.json")
    content = json.loads(path.read_text())
    [image] = [one["id"] for one in content["images"] if one["file_name"] == file.name]
    found = [one["bbox"] for one in content["annotations"] if one["image_id"] == image]
    return [[x, y, x + w, y + h] for x, y, w, h in found]


def stored(run: Path) -> dict[str, np.ndarray]:
    with np.load(run / "seed0" / "plain" / "predictions.npz") as file:
        return {name: file[name] for name in file.files}


def test_log_probabilities_are_those_of_the_evaluation(
    students: dict[str, Path], val_images: dict[str, Path]
) -> None:
    run = students["objects"]
    model = kd.load(run, seed=0)
    [path] = (run.parent / "data" / "objects").rglob("instances_val.json")
    content = json.loads(path.read_text())
    names = {one["id"]: one["file_name"] for one in content["images"]}
    boxes = {one["id"]: one["bbox"] for one in content["annotations"]}
    records = stored(run)
    for number in sorted(set(records["image_ids"].tolist())):
        rows = np.flatnonzero(records["image_ids"] == number)
        given = np.array([boxes[i] for i in records["object_ids"][rows].tolist()])
        given[:, 2:] += given[:, :2]
        found = model.predict(val_images["objects"] / names[number], given)
        assert isinstance(found, ObjectClasses)
        np.testing.assert_allclose(
            found.log_probs.numpy(), records["log_probs"][rows], atol=1e-4, rtol=0
        )
        assert found.names == [model.class_names[label] for label in found.labels]


def test_detections_are_those_of_the_evaluation(
    students: dict[str, Path], val_images: dict[str, Path]
) -> None:
    records = stored(students["detection"])
    found = kd.load(students["detection"]).predict(val_images["detection"])
    assert all(isinstance(one, Detections) for one in found)
    scores = torch.cat([one.scores for one in found]).sort().values
    np.testing.assert_allclose(scores, np.sort(records["found_scores"]), atol=1e-5)
    first = records["found_images"] == 0
    np.testing.assert_allclose(  # COCO's files have x, y, width and height with two decimals
        np.sort([one["bbox"][0] for one in found[0].annotations()]),
        np.sort(records["found_boxes"][first][:, 0]), atol=0.01,
    )  # fmt: skip


def test_maps_are_those_of_the_evaluation(
    students: dict[str, Path], val_images: dict[str, Path]
) -> None:
    for problem, kind in (("segmentation", LabelMap), ("saliency", SaliencyMap)):
        run = students[problem] / "seed0" / "plain"
        _, data, _network, task = open_run(run, [])
        samples = data.problem.evaluation(data)
        found = kd.load(run).predict(val_images[problem])
        assert len(found) == len(samples)
        metric = task.metric(data.class_info())
        for position, one in enumerate(found):
            assert isinstance(one, kind)
            batch = {name: value[None] for name, value in samples[0, position].items()}
            decoded = one.labels if isinstance(one, LabelMap) else one.density[None]
            metric.take(decoded[None], batch)
        summary = json.loads((run / "summary.json").read_text())
        for name, value in metric.compute().items():
            assert value == pytest.approx(summary[name], abs=1e-5, nan_ok=True), (problem, name)


def test_one_file_is_enough_in_another_process_without_data(
    students: dict[str, Path], val_images: dict[str, Path], tmp_path: Path
) -> None:
    model = kd.load(students["segmentation"])
    alone = model.save(tmp_path / "alone" / "student.safetensors")
    assert alone.stat().st_mode & 0o777 == 0o644
    image = shutil.copy(next(val_images["segmentation"].glob("*.png")), tmp_path)
    code = (
        "import kd, sys; m = kd.load(sys.argv[1]); p = m.predict(sys.argv[2]);"
        "print(p.labels.sum().item(), len(m.class_names), m.config['seed'])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(alone), str(image)],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    expected = model.predict(image).labels.sum().item()
    assert ran.stdout.split() == [str(expected), "23", "0"]


def test_the_best_seed_is_chosen_unless_one_is_named(students: dict[str, Path]) -> None:
    run = students["objects"]
    scores = {
        seed: json.loads((run / f"seed{seed}/plain/summary.json").read_text())["top1"]
        for seed in (0, 1)
    }
    best = max(scores, key=lambda seed: scores[seed])
    assert kd.load(run).config["seed"] == best
    assert kd.load(run, seed=1, variant="plain").config["seed"] == 1
    with pytest.raises(kd.UserError, match="no finished seed 5; there are 0, 1"):
        kd.load(run, seed=5)
    with pytest.raises(kd.UserError, match="only a distillation has variants and seeds"):
        kd.load(run / "seed0" / "plain", seed=0)


def test_every_kind_of_image_gives_the_same(
    students: dict[str, Path], val_images: dict[str, Path]
) -> None:
    model = kd.load(students["objects"], seed=0)
    files = sorted(val_images["objects"].glob("*.png"))[:3]
    boxes = [boxes_of(students["objects"], file) for file in files]
    paths = model.predict([str(file) for file in files], boxes)
    opened = [Image.open(file) for file in files]
    arrays = [np.array(image.convert("RGB")) for image in opened]
    tensors = [read_image(file, None) for file in files]
    for images in (opened, arrays, tensors):
        for one, other in zip(model.predict(images, boxes, batch_size=2), paths, strict=True):
            torch.testing.assert_close(one.log_probs, other.log_probs, atol=1e-5, rtol=0)
    many = torch.tensor(boxes[0]).repeat(MOST_BOXES, 1)
    found = model.predict(files[0], many)
    torch.testing.assert_close(
        found.log_probs, paths[0].log_probs.repeat(MOST_BOXES, 1), atol=1e-4, rtol=0
    )
    assert len(model.predict(files[0], torch.empty(0, 4)).names) == 0


@pytest.mark.parametrize(
    ("image", "boxes", "message"),
    [
        (np.zeros((4, 4), np.uint8), [[0, 0, 1, 1]], r"image 0: an array must be \(H, W, 3\)"),
        (torch.zeros(3, 4, 4), [[0, 0, 1, 1]], r"a tensor must be \(3, H, W\) uint8"),
        (np.zeros((8, 9, 3), np.uint8), None, r"pass boxes=\[\[x1, y1, x2, y2\]"),
        (np.zeros((8, 9, 3), np.uint8), [[0, 0, 4]], r"boxes must be \(K, 4\), got \(1, 3\)"),
        (np.zeros((8, 9, 3), np.uint8), [[4, 4, 2, 6]], r"box 0 .* no area inside .* 9 x 8 pixels"),
        (np.zeros((8, 9, 3), np.uint8), [[9, 0, 12, 6]], "no area inside the image"),
        (7, None, "expected a path, PIL image, array or tensor, got int"),
    ],
)  # fmt: skip
def test_a_wrong_input_is_named(
    students: dict[str, Path], image: object, boxes: object, message: str
) -> None:
    with pytest.raises(kd.UserError, match=message):
        kd.load(students["objects"], seed=0).predict(image, boxes)  # type: ignore[arg-type]


def test_broken_weights_do_not_predict(students: dict[str, Path], tmp_path: Path) -> None:
    model = kd.load(students["saliency"])
    for parameter in model.model.parameters():
        parameter.fill_(float("nan"))
    with pytest.raises(kd.UserError, match="its predictions are NaN"):
        model.predict(np.zeros((32, 32, 3), np.uint8))
    old = tmp_path / "old.safetensors"
    save_model(old, model.model, {})
    with pytest.raises(kd.UserError, match="not a model of this version of kd"):
        kd.load(old)
    with pytest.raises(kd.UserError, match="no such file"):
        load_model(tmp_path / "none.safetensors", model.model)


def test_predictions_can_be_drawn(students: dict[str, Path], val_images: dict[str, Path]) -> None:
    for problem, run in students.items():
        file = next(val_images[problem].glob("*.png"))
        boxes = boxes_of(students["objects"], file) if problem == "objects" else None
        found = kd.load(run).predict(file, boxes)
        figure = found.draw(read_image(file, None))
        assert figure.axes and found.size == (64, 64)


def test_import_is_light_and_the_public_names_exist() -> None:
    code = "import sys, kd; print('torch' in sys.modules); [getattr(kd, n) for n in kd.__all__]"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.strip() == "False", ran.stderr
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        kd.laod  # noqa: B018


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_of_a_file_is_that_of_its_upright_pixels(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "photo.jpg"
    Image.new("RGB", (40, 24)).save(file, exif=exif)
    for long_side in (None, 20):
        image = read_input(file, long_side)
        assert image.size == tuple(read_image(file, None, upright=True).shape[1:])
        assert (image.pixels.shape[1] < image.pixels.shape[2]) == (image.size[0] < image.size[1])
