"""Samples for detectors: boxes lie on what was painted, whatever happens to the image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from kd.data.loader import Sample, SampleLoader, collate
from kd.data.prepare import prepare
from kd.distillation.targets import CachedPosteriors
from kd.errors import UserError
from kd.formats.coco import CocoIndex, load_coco
from kd.problems.detection.data import DetectionSamples
from kd.problems.objects.batch import chosen, object_counts, object_rows
from kd.storage.fields import CachedField
from kd.storage.store import Store

SIZE = (60, 80)  # height and width of the files
# Each object and the crowd (the last) painted in a channel of its own.
BOXES = ([8, 10, 20, 30], [40, 20, 30, 30], [30, 2, 44, 14])
STILL: dict[str, Any] = dict.fromkeys(
    ("flip", "shift", "rotate", "rgb_shift", "shuffle", "grey", "blur", "jitter"), 0.0
)
SHAPES = {
    "images": ((3, 3, 64, 64), torch.uint8),
    "sizes": ((3, 2), torch.int64),
    "own_sizes": ((3, 2), torch.int64),
    "image_ids": ((3,), torch.int64),
    "labelled": ((3,), torch.bool),
    "boxes": ((4, 4), torch.float32),
    "labels": ((4,), torch.int64),
    "object_ids": ((4,), torch.int64),
    "area_fractions": ((4,), torch.float32),
    "image_of": ((4,), torch.int64),
    "crowds": ((2, 4), torch.float32),
    "crowd_of": ((2,), torch.int64),
}


def annotation(number: int, image: int, box: Sequence[float], **fields: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": 3 + number % 2, "bbox": list(box),
            "area": box[2] * box[3], "iscrowd": 0, **fields}  # fmt: skip


def painted(root: Path, *, change: Any = None) -> CocoIndex:
    """Images 5, 6 and 7: two objects and a crowd, nothing at all, the same as the first."""
    pixels = np.zeros((*SIZE, 3), np.uint8)
    for channel, (x, y, w, h) in enumerate(BOXES):
        pixels[y : y + h, x : x + w, channel] = 255
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": 3, "name": "cup"}, {"id": 4, "name": "bed"}]
    for image in (5, 6, 7):
        picture = np.zeros_like(pixels) if image == 6 else pixels
        Image.fromarray(picture).save(root / f"{image}.png")
        entry = {"id": image, "file_name": f"{image}.png", "height": SIZE[0], "width": SIZE[1]}
        content["images"].append(entry)
        if image != 6:
            content["annotations"] += [
                annotation(10 * image + place, image, box, iscrowd=int(place == 2))
                for place, box in enumerate(BOXES)
            ]
    if change is not None:
        change(content)
    path = root / "instances.json"
    path.write_text(json.dumps(content))
    return load_coco(path, root)


@pytest.fixture
def index(tmp_path: Path) -> CocoIndex:
    return painted(tmp_path)


def bounds(channel: Tensor) -> Tensor:
    """The box around what is brighter than half."""
    rows, columns = (channel > 127).nonzero().unbind(1)
    return torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


def same(first: Sample, second: Sample) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_batch_is_what_the_design_says(index: CocoIndex) -> None:
    dataset = DetectionSamples(index, size=64, train=False)
    batch = collate([dataset[0, place] for place in range(len(dataset))])
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == SHAPES
    assert batch["image_ids"].tolist() == [5, 6, 7]
    assert batch["sizes"].tolist() == [[48, 64]] * 3
    assert batch["own_sizes"].tolist() == [[60, 80]] * 3
    assert batch["object_ids"].tolist() == [50, 51, 70, 71]
    assert batch["labels"].tolist() == [0, 1, 0, 1]
    assert batch["image_of"].tolist() == [0, 0, 2, 2] and batch["crowd_of"].tolist() == [0, 2]
    assert batch["area_fractions"][:2].tolist() == pytest.approx([600 / 4800, 900 / 4800])
    assert not batch["images"][:, :, 48:].any()


@pytest.mark.parametrize("size", [31, 64, 97])
def test_evaluation_leads_back_to_the_file_and_keeps_every_box(index: CocoIndex, size: int) -> None:
    dataset = DetectionSamples(
        index, size=size, train=False, augment={"shift": 1.0}, scales=(0.1, 0.2)
    )
    batch = collate([dataset[3, place] for place in range(3)])
    scale = (batch["own_sizes"] / batch["sizes"]).flip(1).repeat(1, 2)
    back = batch["boxes"] * scale[batch["image_of"]]
    torch.testing.assert_close(back, torch.tensor(np.array(index.boxes)), rtol=1e-5, atol=1e-4)
    assert index.crowds is not None
    crowds = batch["crowds"] * scale[batch["crowd_of"]]
    torch.testing.assert_close(crowds, torch.tensor(np.array(index.crowds.boxes)))
    assert (batch["sizes"].amax(dim=1) == size).all()


@pytest.mark.parametrize(
    ("augment", "scales", "tolerance"),
    [
        (STILL, (1.0, 1.0), 1.0),
        (None, (0.4, 0.9), 1.0),
        (STILL, (1.1, 2.5), 1.0),
        (STILL | {"flip": 1.0}, (0.5, 1.5), 1.0),
        (STILL | {"shift": 1.0, "max_shift": 0.3}, (0.5, 1.5), 1.0),
        (STILL | {"flip": 0.5, "shift": 1.0, "crop": 0.5}, (0.5, 2.0), 1.0),
        (STILL | {"rotate": 1.0, "flip": 0.5, "min_visible": 1.0}, (0.5, 1.0), 2.0),
        (STILL | {"jitter": 1.0, "max_hue": 0.0, "blur": 1.0}, (0.8, 1.6), 2.0),
        (STILL | {"rotate": 1.0, "shift": 1.0, "max_angle": 3.0}, (1.2, 2.0), 2.5),
    ],
)
def test_boxes_and_crowds_lie_on_what_was_painted(
    index: CocoIndex, augment: dict[str, Any] | None, scales: tuple[float, float], tolerance: float
) -> None:
    dataset = DetectionSamples(index, size=64, augment=augment, scales=scales)
    found = 0
    for epoch in range(25):
        sample = dataset[epoch, 0]
        height, width = sample["sizes"].tolist()
        assert max(height, width) <= 64
        assert not sample["images"][:, height:].any() and not sample["images"][:, :, width:].any()
        channels = [number - 50 for number in sample["object_ids"].tolist()]
        channels += [2] * len(sample["crowds"])
        assert sample["labels"].tolist() == [channel % 2 for channel in channels if channel < 2]
        for box, channel in zip(torch.cat([sample["boxes"], sample["crowds"]]), channels,
                                strict=True):  # fmt: skip
            if (box[2:] - box[:2]).min() < 8:
                continue  # too little to be found again by its pixels
            found += 1
            assert (bounds(sample["images"][channel]) - box).abs().max() <= tolerance
    assert found > 15


def test_colours_change_and_boxes_do_not(index: CocoIndex) -> None:
    loud = STILL | {"jitter": 1.0, "grey": 0.5, "shuffle": 1.0, "rgb_shift": 1.0}
    plain, coloured = (
        DetectionSamples(index, size=64, augment=augment) for augment in (STILL, loud)
    )
    for epoch in range(4):
        first, second = plain[epoch, 0], coloured[epoch, 0]
        assert not torch.equal(first["images"], second["images"])
        assert torch.equal(first["boxes"], second["boxes"])


def test_scales_are_drawn_from_the_whole_range_and_windows_from_the_whole_image(
    index: CocoIndex,
) -> None:
    small = DetectionSamples(index, size=64, scales=(0.5, 1.5))
    widths = [int(small[epoch, 0]["sizes"][1]) for epoch in range(60)]
    assert min(widths) < 36 and max(widths) == 64 and len(set(widths)) > 15
    assert 15 < widths.count(64) < 45  # half of the scales are above 1: cut to the frame
    large = DetectionSamples(
        index, size=32, scales=(2.0, 2.0), augment=STILL | {"min_visible": 0.0}
    )
    shown = [set(large[epoch, 0]["object_ids"].tolist()) for epoch in range(60)]
    assert {50} in shown and {51} in shown and {50, 51} in shown
    assert all(large[epoch, 0]["sizes"].tolist() == [32, 32] for epoch in range(5))


def test_a_box_of_which_too_little_stays_is_dropped_and_a_crowd_is_not(index: CocoIndex) -> None:
    options: dict[str, Any] = {"size": 64, "scales": (1.5, 2.5)}
    strict = DetectionSamples(index, augment=STILL | {"min_visible": 0.8}, **options)
    lax = DetectionSamples(index, augment=STILL | {"min_visible": 0.0}, **options)
    dropped = 0
    for epoch in range(20):
        few, many = strict[epoch, 0], lax[epoch, 0]
        assert torch.equal(few["images"], many["images"])
        assert torch.equal(few["crowds"], many["crowds"])
        kept = set(few["object_ids"].tolist())
        assert kept <= set(many["object_ids"].tolist())
        dropped += len(many["boxes"]) - len(kept)
        whole = many["boxes"][:, 2:] - many["boxes"][:, :2]
        assert (whole >= 1).all()
    assert dropped > 5


def test_what_is_below_a_pixel_is_dropped_in_training_and_kept_in_evaluation(
    tmp_path: Path,
) -> None:
    def thin(content: dict[str, Any]) -> None:
        content["annotations"][0]["bbox"] = [8, 10, 2, 30]

    index = painted(tmp_path, change=thin)
    training = DetectionSamples(index, size=64, scales=(0.25, 0.25))
    assert training[0, 0]["object_ids"].tolist() == [51]
    evaluated = DetectionSamples(index, size=16, train=False)
    assert evaluated[0, 0]["object_ids"].tolist() == [50, 51]


def test_a_sample_depends_only_on_seed_epoch_and_position(index: CocoIndex) -> None:
    options: dict[str, Any] = {"size": 48, "augment": {}, "scales": (0.5, 1.5)}
    dataset = DetectionSamples(index, seed=3, **options)
    sample, state = dataset[1, 0], torch.get_rng_state()
    torch.rand(7), np.random.rand(7)
    assert same(sample, DetectionSamples(index, seed=3, **options)[1, 0])
    assert not same(sample, dataset[2, 0])
    assert not same(sample, dataset[1, 2])
    assert not same(sample, DetectionSamples(index, seed=4, **options)[1, 0])
    torch.set_rng_state(state)
    assert same(sample, dataset[1, 0]) and torch.equal(state, torch.get_rng_state())


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(index: CocoIndex) -> None:
    dataset = DetectionSamples(index, size=48, augment={}, scales=(0.5, 1.5))
    batches = []
    for workers in (0, 2):
        loader = SampleLoader(dataset, batch_size=2, seed=7, shuffle=True, workers=workers)
        first = list(loader)
        loader.set_epoch(1)
        batches.append(first + list(loader))
    assert len(batches[0]) == 4
    assert all(same(one, other) for one, other in zip(*batches, strict=True))
    assert sum(len(batch["crowds"]) for batch in batches[0]) > 0


def test_a_batch_without_a_box_works_everywhere(index: CocoIndex) -> None:
    for dataset in (
        DetectionSamples(index, size=64, augment={"rotate": 1.0}, scales=(0.5, 1.5), only=[6]),
        DetectionSamples(index, size=64, train=False, only=[6]),
    ):
        assert len(dataset) == 1
        batch = collate([dataset[0, 0], dataset[1, 0]])
        for key in ("boxes", "crowds"):
            assert batch[key].shape == (0, 4) and batch[key].dtype == torch.float32
        for key in ("labels", "object_ids", "image_of", "crowd_of"):
            assert batch[key].shape == (0,) and batch[key].dtype == torch.int64
        counts = {name: float(count) for name, count in object_counts(batch, {"ring"}).items()}
        assert counts == {"boxes": 0, "images": 2, "labelled": 0, "labelled_images": 2, "ring": 0}
        posteriors = CachedPosteriors(torch.tensor([50]), torch.zeros(1, 2))
        assert posteriors({}, object_rows(batch))["posterior"].shape == (0, 2)


def test_an_annotated_dataset_may_have_no_crowd(tmp_path: Path) -> None:
    def without(content: dict[str, Any]) -> None:
        content["annotations"] = [one for one in content["annotations"] if not one["iscrowd"]]

    dataset = DetectionSamples(painted(tmp_path, change=without), size=64)
    assert dataset.index.crowds is None
    assert collate([dataset[0, 0], dataset[0, 2]])["crowds"].shape == (0, 4)


def test_labels_that_are_withheld_leave_regions_and_an_image_that_says_so(
    index: CocoIndex,
) -> None:
    dataset = DetectionSamples(index, size=64, augment=STILL, labelled=[6, 7], repeat_labelled=2)
    assert [int(dataset[0, place]["image_ids"]) for place in range(5)] == [5, 6, 7, 6, 7]
    batch = collate([dataset[0, place] for place in range(3)])
    assert batch["labels"].tolist() == [-1, -1, 0, 1] and len(batch["boxes"]) == 4
    assert batch["labelled"].tolist() == [False, True, True]
    counts = {name: float(count) for name, count in object_counts(batch).items()}
    assert counts == {"boxes": 4, "images": 3, "labelled": 2, "labelled_images": 2}
    with pytest.raises(UserError, match="has no image 99"):
        DetectionSamples(index, size=64, labelled=[99])


def test_every_object_is_asked_about_where_none_is_hidden(index: CocoIndex) -> None:
    dataset = DetectionSamples(index, size=64, train=False)
    batch = collate([dataset[0, place] for place in range(3)])
    rows = object_rows(batch)
    assert rows.unit == "boxes" and rows.partial
    assert chosen(batch).tolist() == [0, 1, 2, 3]
    hidden = {**batch, "hidden": torch.tensor([2])}
    assert chosen(hidden).tolist() == [2] and not object_rows(hidden).partial
    logits = torch.eye(4)[:, :2].log_softmax(1)
    posteriors = CachedPosteriors(torch.tensor([71, 50, 70, 51]), logits)
    torch.testing.assert_close(posteriors({}, rows)["posterior"], logits[[1, 3, 2, 0]])
    torch.testing.assert_close(posteriors({}, object_rows(hidden))["posterior"], logits[[2]])
    some = CachedPosteriors(torch.tensor([50, 51]), logits[:2])
    found = some({}, rows)["posterior"]  # a detector's boxes may have no posterior
    assert torch.equal(found[[0, 1]], logits[:2]) and found[[2, 3]].isnan().all()
    with pytest.raises(UserError, match="1 objects have no posterior, such as annotation 70"):
        some({}, object_rows(hidden))


class Kept:
    """A store of one map for each image id, in memory."""

    def __init__(self, values: Tensor, ids: Sequence[int]) -> None:
        self.values, self.ids = values.numpy(), list(ids)
        self.fields = {"values": self.values}

    def read(self, ids: NDArray[np.int64], names: Sequence[str]) -> dict[str, NDArray[Any]]:
        return {name: self.values[[self.ids.index(one) for one in ids]] for name in names}


def test_stored_maps_show_what_the_image_shows(index: CocoIndex) -> None:
    """The stored map of an image is the image itself, so each must move as the other does."""
    plain = DetectionSamples(index, size=64, train=False)
    maps = torch.stack([plain[0, place]["images"] for place in range(3)]).float()
    field = CachedField(cast(Store, Kept(maps, [5, 6, 7])), "pixels")
    augment = STILL | {"flip": 0.5, "shift": 0.5}
    for scales in ((1.0, 1.0), (0.6, 0.6), (0.5, 1.6)):
        dataset = DetectionSamples(index, size=64, augment=augment, scales=scales, cached=[field])
        samples = [dataset[epoch, 2] for epoch in range(6)]
        batch = collate(samples)
        assert batch["stored.pixels"].shape == (6, 3, 64, 64)
        for sample in samples:
            height, width = sample["sizes"].tolist()
            moved = sample["stored.pixels"][0, :, :height, :width]
            away = (moved - sample["images"][:, :height, :width]).abs()
            assert (away > 130).float().mean() < 0.02  # all but the edges, which are sampled twice


def test_a_prepared_copy_shows_the_same_and_leads_back_to_the_original(
    index: CocoIndex, tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    assert prepare(index.annotation_file, index.image_folder, out, size=48) == []
    first = DetectionSamples(index, size=32, train=False)[0, 0]
    second = DetectionSamples(index, size=32, train=False, prepared=out)[0, 0]
    assert second["own_sizes"].tolist() == [60, 80]
    assert torch.equal(first["boxes"], second["boxes"])
    assert (
        first["images"].int() - second["images"].int()
    ).abs().float().mean() < 8  # of pure colours, which JPEG blurs
    DetectionSamples(index, size=32, prepared=out, scales=(0.5, 1.5))
    with pytest.raises(UserError, match="prepared at 48 pixels, but 51 are required"):
        DetectionSamples(index, size=32, prepared=out, scales=(0.5, 1.6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": (0.0, 1.0)}, "^scales: .*expected 0 < smallest <= largest"),
        ({"scales": (1.5, 0.5)}, "^scales: "),
        ({"scales": (float("nan"), 1.0)}, "^scales: "),
        ({"augment": {"flap": 1.0}}, "augment: unknown option 'flap'"),
        ({"only": []}, r"instances\.json: none of the selected images is in this file"),
        ({"only": [99]}, "none of the selected images"),
    ],
)
def test_wrong_options_are_named(index: CocoIndex, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DetectionSamples(index, **({"size": 32} | options))


def test_bad_images_are_named(index: CocoIndex) -> None:
    dataset = DetectionSamples(index, size=32)
    cut = index.path(0)
    cut.write_bytes(cut.read_bytes()[:100])
    Image.new("RGB", (40, 40)).save(index.path(1))
    index.path(2).unlink()
    for position, message in enumerate(["cannot read", "is 40 x 40 pixels", "not found"]):
        with pytest.raises(UserError, match=rf"{index.path(position).name}.*{message}"):
            dataset[0, position]


def test_boxes_that_are_none_are_left_out_and_counted(tmp_path: Path) -> None:
    """Of five bad boxes none reaches a sample; one that sticks out is cut."""

    def spoil(content: dict[str, Any]) -> None:
        bad: tuple[list[float], ...]
        bad = ([8, 10, 0, 5], [8, 10, -3, 5], [90, 10, 5, 5], [-9, -9, 5, 5], [3, 3, 0.5, 9])
        content["annotations"] += [annotation(90 + n, 6, box) for n, box in enumerate(bad)]
        content["annotations"].append(annotation(99, 6, [70, 50, 30, 30]))

    index = painted(tmp_path, change=spoil)
    assert index.skipped == {"crowd": 2, "zero_area": 2, "outside_image": 2, "tiny": 1}
    sample = DetectionSamples(index, size=80, train=False)[0, 1]
    assert sample["object_ids"].tolist() == [99]
    assert sample["boxes"].tolist() == [[70, 50, 80, 60]]


def test_corners_in_place_of_sides_are_suspected(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def as_corners(content: dict[str, Any]) -> None:
        for entry in content["annotations"]:
            x, y, w, h = entry["bbox"]
            entry["bbox"] = [x + 30, y + 20, x + w + 30, y + h + 20]

    painted(tmp_path)
    assert "most boxes" not in caplog.text
    painted(tmp_path, change=as_corners)
    assert "most boxes reach beyond their images; is 'bbox' x, y, width, height" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bbox": [1, 2, float("nan"), 4]}, "annotation 99: 'bbox' is .*nan.*expected 4 finite"),
        ({"bbox": [1, 2, float("inf"), 4]}, "annotation 99: 'bbox' is .*inf"),
        ({"bbox": [1, 2, 3]}, "annotation 99: 'bbox' is"),
        ({"bbox": [1, 2, "3", 4]}, "annotation 99: 'bbox' is"),
        ({"category_id": 5}, "annotation 99: category 5 is not in 'categories'"),
        ({"image_id": 8}, "annotation 99: image 8 is not in 'images'"),
        ({"id": 50}, "annotation id 50 is used 2 times"),
    ],
)
def test_annotations_that_mean_nothing_are_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    def spoil(content: dict[str, Any]) -> None:
        content["annotations"].append(annotation(99, 6, [1, 2, 9, 9]) | fields)

    with pytest.raises(UserError, match=message):
        painted(tmp_path, change=spoil)
