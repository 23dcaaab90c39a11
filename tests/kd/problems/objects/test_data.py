"""A dataset of objects as detectors are shown it: the section's settings reach the samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd.data.prepare import prepare
from kd.errors import UserError
from kd.problems.base import Split
from kd.problems.detection.data import DetectionDataset, DetectionSamples, open_detection
from kd.problems.objects.batch import object_counts, object_rows
from kd.problems.objects.data import ObjectsDataset, open_objects
from kd.problems.recipes import data_config
from kd.runs.build import make_accelerator, make_loader


@pytest.fixture(scope="module")
def data(small_data: list[str]) -> ObjectsDataset:
    return open_objects(data_config("scenes", [text for text in small_data if text != "--set"]))


def changed(data: ObjectsDataset, **changes: object) -> ObjectsDataset:
    return ObjectsDataset(data.section.model_copy(update=changes), data.train, data.val)


def boxes(data: ObjectsDataset, seed: int, **options: Any) -> DetectionSamples:
    """The train split as detectors learn from it."""
    return open_detection(data.section).samples("train", train=True, seed=seed, **options)


def evaluated(data: ObjectsDataset, split: Split = "val", **options: Any) -> DetectionSamples:
    """A split as detectors are scored on it."""
    return open_detection(data.section).samples(split, **options)


def test_detectors_train_and_are_scored_on_every_image(data: ObjectsDataset) -> None:
    accelerator = make_accelerator("fp32")
    train = make_loader(boxes(data, 0), accelerator, batch_size=7, workers=0, train=True)
    assert [len(batch["images"]) for batch in train] == [7, 7, 7]
    val = make_loader(evaluated(data), accelerator, batch_size=3, workers=0)
    batches = list(val)
    assert sum(len(batch["images"]) for batch in batches) == 8
    found = torch.cat([batch["object_ids"] for batch in batches])
    assert sorted(found.tolist()) == sorted(data.val.object_ids.tolist())
    assert all(
        object_rows(batch).partial and object_counts(batch)["boxes"] > 0 for batch in batches
    )
    assert len(evaluated(data, "train")) == 24
    assert len(evaluated(data, only=[int(data.val.image_ids[2])])) == 1


def test_the_sections_settings_are_those_of_the_samples(data: ObjectsDataset) -> None:
    other = changed(data, scales=(0.5, 0.5), repeat_labelled=3)
    known = data.train.image_ids[:4]
    dataset = boxes(other, 5, labelled=known)
    assert len(dataset) == 24 + 2 * 4 and len(boxes(other, 5)) == 24
    assert dataset[0, 0]["sizes"].tolist() == [16, 16]
    assert int(dataset.known.sum()) == 12
    assert evaluated(other)[0, 0]["sizes"].tolist() == [32, 32]
    same, another = boxes(data, 5)[2, 1], boxes(data, 6)[2, 1]
    assert torch.equal(same["images"], boxes(data, 5)[2, 1]["images"])
    flips = [torch.equal(boxes(data, n)[2, 1]["images"], same["images"]) for n in range(6, 16)]
    assert 0 < sum(flips) < 10 and torch.equal(another["labels"], same["labels"])


def test_objects_too_small_to_be_hidden_are_boxes_all_the_same(data: ObjectsDataset) -> None:
    other = changed(data, min_fraction=0.2, max_fraction=0.9)
    counts = np.diff(data.val.first)
    found = [len(evaluated(other)[0, place]["boxes"]) for place in range(len(data.val))]
    assert found == counts.tolist()


def test_detectors_classes_are_counted_on_objects_of_all_sizes(
    data: ObjectsDataset, caplog: pytest.LogCaptureFixture
) -> None:
    # None of the objects could be hidden.
    section = changed(data, min_fraction=0.98, max_fraction=0.99).section
    detected = DetectionDataset(section, data.train, data.val)
    with caplog.at_level("INFO"):
        prior = detected.class_info().prior
    assert prior is not None and not caplog.records  # nor is any image left out
    counts = np.bincount(data.train.labels, minlength=data.num_classes) + 1.0
    np.testing.assert_allclose(prior, counts / counts.sum())
    some = data.train.image_ids[1:3]
    first, last = data.train.first[1], data.train.first[3]
    counts = np.bincount(data.train.labels[first:last], minlength=data.num_classes) + 1.0
    np.testing.assert_allclose(detected.prior(some), counts / counts.sum())


def test_prepared_copies_are_found_by_split(data: ObjectsDataset, tmp_path: Path) -> None:
    for split, index in (("train", data.train), ("val", data.val)):
        out = tmp_path / split
        assert prepare(index.annotation_file, index.image_folder, out, size=40) == []
    other = changed(data, prepared=str(tmp_path))
    assert evaluated(other).image_file(0)[0].parent == tmp_path / "val" / "images"
    assert boxes(other, 0).image_file(0)[0].parent == tmp_path / "train" / "images"
    with pytest.raises(UserError, match="prepared at 40 pixels, but 48 are required"):
        boxes(changed(other, scales=(0.5, 1.5)), 0)


def test_a_detector_needs_images(data: ObjectsDataset) -> None:
    with pytest.raises(
        UserError, match=r"scenes: detectors need images, but data\.images is false"
    ):
        boxes(changed(data, images=False), 0)
