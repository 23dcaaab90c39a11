"""Samples and batches: what is hidden, what follows it, what is left out, bad images."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kd.data.loader import Sample, collate
from kd.errors import UserError
from kd.formats.coco import CocoIndex, load_coco
from kd.problems.objects.data import ObjectSamples
from kd.transforms.hide import hidden_regions

EVERYTHING = {
    "shift": 0.5,
    "rotate": 0.5,
    "crop": 0.7,
    "crop_scale": (0.2, 0.9),
    "blur": 0.3,
    "jitter": 0.5,
    "grey": 0.2,
    "shuffle": 0.3,
    "rgb_shift": 0.3,
}


@pytest.fixture
def index(tiny_coco: Callable[..., Path]) -> CocoIndex:
    root = tiny_coco(images=6, size=(48, 64), splits=("train2017",))
    return load_coco(root / "annotations" / "instances_train2017.json", root / "train2017")


def edited(index: CocoIndex, change: Callable[[dict[str, Any]], None], name: str) -> CocoIndex:
    """The dataset of another JSON, which differs by `change`."""
    content = copy.deepcopy(json.loads(index.annotation_file.read_text()))
    change(content)
    path = index.annotation_file.with_name(name)
    path.write_text(json.dumps(content))
    return load_coco(path, index.image_folder)


def same(first: Sample, second: Sample) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_batch_is_what_the_design_says(index: CocoIndex) -> None:
    dataset = ObjectSamples(index, size=32, mode="all", shape="segment")
    batch = collate([dataset[0, place] for place in range(3)])
    objects, hidden = len(batch["labels"]), len(batch["hidden"])
    expected = {
        "images": ((3, 3, 32, 32), torch.uint8),
        "sizes": ((3, 2), torch.int64),
        "image_ids": ((3,), torch.int64),
        "boxes": ((objects, 4), torch.float32),
        "labels": ((objects,), torch.int64),
        "image_of": ((objects,), torch.int64),
        "object_ids": ((objects,), torch.int64),
        "area_fractions": ((objects,), torch.float32),
        "usable": ((objects,), torch.bool),
        "hidden": ((hidden,), torch.int64),
        "hide_fraction": ((hidden,), torch.float32),
        "segments": ((hidden, 32, 32), torch.bool),
    }
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == expected
    assert batch["sizes"].tolist() == [[24, 32]] * 3
    assert torch.equal(batch["hidden"], batch["usable"].nonzero()[:, 0])
    assert batch["image_of"].tolist() == sorted(batch["image_of"].tolist())
    assert not batch["images"][:, :, 24:].any()


def test_segments_travel_only_where_asked_for(index: CocoIndex) -> None:
    assert "segments" not in collate([ObjectSamples(index, size=32)[0, 0]])


def test_validation_only_rescales_and_pads(index: CocoIndex) -> None:
    dataset = ObjectSamples(index, size=32, mode="all", train=False, augment=EVERYTHING)
    sample = dataset[0, 2]
    first, last = index.first[2], index.first[3]
    torch.testing.assert_close(sample["boxes"], torch.tensor(index.boxes[first:last]) / 2)
    assert sample["labels"].tolist() == index.labels[first:last].tolist()
    assert sample["object_ids"].tolist() == index.object_ids[first:last].tolist()
    sides = index.boxes[first:last, 2:] - index.boxes[first:last, :2]
    np.testing.assert_allclose(sample["area_fractions"], sides.prod(1) / (48 * 64), rtol=1e-5)
    assert same(sample, dataset[7, 2])


def test_one_usable_object_is_hidden_and_another_in_other_epochs(index: CocoIndex) -> None:
    dataset = ObjectSamples(index, size=32)
    position = int(np.argmax(np.diff(index.first)))
    drawn = [int(dataset[epoch, position]["hidden"].item()) for epoch in range(30)]
    assert set(drawn) == set(range(int(np.diff(index.first).max())))


def test_a_sample_depends_only_on_seed_epoch_and_position(index: CocoIndex) -> None:
    dataset = ObjectSamples(index, size=32, augment=EVERYTHING, seed=3)
    sample = dataset[1, 4]
    torch.rand(7), np.random.rand(7)
    assert same(sample, ObjectSamples(index, size=32, augment=EVERYTHING, seed=3)[1, 4])
    assert not same(sample, dataset[2, 4])
    assert not same(sample, ObjectSamples(index, size=32, augment=EVERYTHING, seed=4)[1, 4])


def test_making_a_sample_leaves_the_global_random_state_alone(index: CocoIndex) -> None:
    before = torch.get_rng_state()
    ObjectSamples(index, size=32, augment=EVERYTHING)[0, 0]
    assert torch.equal(before, torch.get_rng_state())


def test_objects_dropped_by_augmentation_take_everything_with_them(index: CocoIndex) -> None:
    dataset = ObjectSamples(index, size=64, mode="all", augment=EVERYTHING, shape="segment")
    label_of = dict(zip(index.object_ids.tolist(), index.labels.tolist(), strict=True))
    dropped = 0
    for epoch in range(12):
        for position in range(len(dataset)):
            sample = dataset[epoch, position]
            ids = sample["object_ids"].tolist()
            dropped += int(np.diff(index.first)[position]) - len(ids)
            assert sample["labels"].tolist() == [label_of[key] for key in ids]
            assert {len(sample[key]) for key in ("boxes", "area_fractions", "usable")} == {len(ids)}
            assert (sample["boxes"] >= 0).all()
            assert (sample["boxes"][:, 2:] <= sample["sizes"].flip(0)).all()
            assert len(sample["segments"]) == len(sample["hidden"]) > 0
            grown = sample["boxes"][sample["hidden"]] + torch.tensor([-1.0, -1.0, 1.0, 1.0])
            assert (hidden_regions(grown, (64, 64)) >= sample["segments"]).all()
    assert dropped > 10


def test_the_painted_object_lies_under_its_moved_segment(index: CocoIndex) -> None:
    plain = {"rgb_shift": 0, "shuffle": 0, "grey": 0, "blur": 0, "jitter": 0}
    moving = EVERYTHING | plain | {"rotate": 1.0, "shift": 1.0}
    dataset = ObjectSamples(index, size=64, mode="all", augment=moving, shape="segment")
    colours = torch.tensor(
        [[214, 60, 48], [52, 120, 200], [60, 160, 80], [232, 196, 60]], dtype=torch.float32
    )
    for epoch in range(4):
        sample = dataset[epoch, 0]
        for row, segment in zip(sample["hidden"].tolist(), sample["segments"], strict=True):
            if segment.sum() < 30:
                continue
            colour = sample["images"].float()[:, segment].median(dim=1).values
            nearest = (colours - colour).abs().sum(dim=1).argmin()
            assert nearest == sample["labels"][row]


def test_the_plain_image_stands_in_where_nothing_usable_is_left(index: CocoIndex) -> None:
    away = {"shift": 1.0, "max_shift": 1.0, "flip": 0.0, "min_visible": 1.0}
    dataset = ObjectSamples(index, size=64, augment=away)
    plain = ObjectSamples(index, size=64)
    kept = [
        (epoch, place)
        for epoch in range(5)
        for place in range(len(dataset))
        if torch.equal(dataset[epoch, place]["images"], plain[epoch, place]["images"])
    ]
    assert kept
    assert all(dataset[key]["usable"].any() for key in kept)


def test_images_without_a_usable_object_are_left_out_and_counted(
    index: CocoIndex, caplog: pytest.LogCaptureFixture
) -> None:
    def shrink(content: dict[str, Any]) -> None:
        image = content["images"][1]["id"]
        for entry in content["annotations"]:
            if entry["image_id"] == image:
                entry["bbox"] = [5, 5, 2, 2]

    with caplog.at_level(logging.INFO, logger="kd.problems.objects.data"):
        dataset = ObjectSamples(edited(index, shrink, "shrunk.json"), size=32, min_fraction=0.01)
    assert dataset.images.tolist() == [0, 2, 3, 4, 5]
    assert "1 of 6 images left out" in caplog.text


def test_no_usable_object_at_all_is_an_error(index: CocoIndex) -> None:
    with pytest.raises(UserError, match=r"no image has an object between 90.00% and 95.00%"):
        ObjectSamples(index, size=32, min_fraction=0.9, max_fraction=0.95)


def test_a_fraction_on_the_limit_is_usable_at_any_size(index: CocoIndex) -> None:
    """The choice of images and the samples must round alike, or nothing could be hidden."""
    first, last = index.first[0], index.first[1]
    sides = index.boxes[first:last, 2:] - index.boxes[first:last, :2]
    fraction = float(sides.astype(np.float64).prod(axis=1).max() / (48 * 64))
    for size in (31, 32, 57):
        sample = ObjectSamples(index, size=size, min_fraction=fraction, max_fraction=1.0)[0, 0]
        assert sample["usable"].sum() == 1


def test_labels_outside_the_labelled_share_are_withheld(index: CocoIndex) -> None:
    known = {int(index.image_ids[1]), int(index.image_ids[4])}
    dataset = ObjectSamples(index, size=32, labelled=known)
    withheld = [bool((dataset[0, place]["labels"] == -1).all()) for place in range(6)]
    assert withheld == [True, False, True, True, False, True]
    assert not (dataset[0, 1]["labels"] == -1).any()
    assert (
        ObjectSamples(index, size=32, labelled=np.array([], np.int64))[0, 1]["labels"] < 0
    ).all()


def test_only_the_images_asked_for_are_kept(index: CocoIndex) -> None:
    ids = [int(index.image_ids[place]) for place in (4, 1)]
    dataset = ObjectSamples(index, size=32, only=ids)
    assert [int(dataset[0, place]["image_ids"]) for place in range(len(dataset))] == ids[::-1]


def test_unknown_labelled_images_are_an_error(index: CocoIndex) -> None:
    with pytest.raises(UserError, match="has no image 987654"):
        ObjectSamples(index, size=32, labelled=[987654])


def test_partial_masking_follows_the_epochs_in_training_only(index: CocoIndex) -> None:
    options: dict[str, Any] = {"size": 32, "partial": (0.2, 0.5), "epochs": 10}
    training = ObjectSamples(index, **options)
    fractions = [training[epoch, 0]["hide_fraction"].item() for epoch in (0, 1, 5, 9)]
    assert fractions == pytest.approx([0.2, 0.36, 1.0, 1.0])
    assert ObjectSamples(index, train=False, **options)[0, 0]["hide_fraction"].item() == 1.0


def test_a_segment_without_a_pixel_becomes_its_box(index: CocoIndex) -> None:
    def flatten(content: dict[str, Any]) -> None:
        for entry in content["annotations"]:
            x, y, w, _ = entry["bbox"]
            entry["segmentation"] = [[x, y, x + w, y, x, y]]

    dataset = ObjectSamples(
        edited(index, flatten, "flat.json"), size=64, mode="all", shape="segment"
    )
    sample = dataset[0, 0]
    boxes = hidden_regions(sample["boxes"][sample["hidden"]], (64, 64))
    assert torch.equal(sample["segments"], boxes)


def test_an_unknown_augmentation_is_named(index: CocoIndex) -> None:
    with pytest.raises(UserError, match=r"^augment"):
        ObjectSamples(index, size=32, augment={"turn": 1})


def test_bad_images_are_named(index: CocoIndex) -> None:
    dataset = ObjectSamples(index, size=32)
    cut = index.path(0)
    cut.write_bytes(cut.read_bytes()[:400])
    Image.new("RGB", (40, 40)).save(index.path(1))
    index.path(2).unlink()
    for position, message in enumerate(["cannot read", "is 40 x 40 pixels", "not found"]):
        with pytest.raises(UserError, match=rf"{index.path(position).name}.*{message}"):
            dataset[0, position]


def test_objects_are_withheld_by_a_schedule_in_training_only(index: CocoIndex) -> None:
    options: dict[str, Any] = {"size": 32, "hide_several": (0.0, 0.6), "epochs": 11}
    dataset = ObjectSamples(index, train=True, **options)
    fractions = []
    for epoch in (0, 5, 10):
        withheld = [dataset[epoch, place]["also_hidden"] for place in range(len(dataset))]
        again = [dataset[epoch, place]["also_hidden"] for place in range(len(dataset))]
        assert all(torch.equal(a, b) for a, b in zip(withheld, again, strict=True))
        fractions.append(float(torch.cat(withheld).float().mean()))
    assert fractions[0] == 0 and fractions[2] > 0.3
    assert "withheld" not in ObjectSamples(index, train=False, **options)[0, 0]


def test_without_images_only_the_pixels_change(index: CocoIndex) -> None:
    seen = ObjectSamples(index, size=32, train=False)
    blind = ObjectSamples(index, size=32, train=False, read_images=False)
    for place in range(len(seen)):
        first, second = seen[0, place], blind[0, place]
        assert set(second["images"].unique().tolist()) <= {0, 128}
        assert all(torch.equal(first[key], second[key]) for key in first if key != "images")
