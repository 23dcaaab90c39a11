"""Images with label maps as samples: crops for training, whole images for evaluation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kd.data.loader import Sample, SampleLoader, collate
from kd.errors import UserError
from kd.formats.segmentation import LabelMapSplit, open_label_maps
from kd.problems.segmentation.data import SegmentationSamples, open_maps
from kd.problems.segmentation.schema import SegmentationSection
from kd.runs.build import make_accelerator
from kd.runs.train import val_loader
from kd.utils.images import VOID

CLASSES = 11
Written = Callable[..., Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """A function that writes a dataset in CamVid's layout; classes are seen by their colours."""

    def write(sizes: list[tuple[int, int]], split: str = "train") -> Path:
        random = np.random.default_rng(len(split))
        images, maps = tmp_path / "maps" / split, tmp_path / "maps" / f"{split}annot"
        for folder in (images, maps):
            folder.mkdir(parents=True)
        for number, size in enumerate(sizes):
            blocks = random.integers(0, CLASSES, (-(-size[0] // 12), -(-size[1] // 12)))
            labels = np.kron(blocks, np.ones((12, 12)))[: size[0], : size[1]].astype(np.uint8)
            colours = np.stack([20 * labels, 250 - 20 * labels, labels], axis=2).astype(np.uint8)
            Image.fromarray(colours).save(images / f"{number}.png")
            Image.fromarray(labels).save(maps / f"{number}.png")
        return tmp_path / "maps"

    return write


@pytest.fixture
def split(written: Written) -> LabelMapSplit:
    return open_label_maps("camvid", written([(36, 48)] * 5), "train")


def same(first: Sample, second: Sample) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_training_batch_is_of_crops(split: LabelMapSplit) -> None:
    dataset = SegmentationSamples(split, size=None, crop=(24, 32), augment={})
    batch = collate([dataset[0, place] for place in range(3)])
    expected = {
        "images": ((3, 3, 24, 32), torch.uint8),
        "sizes": ((3, 2), torch.int64),
        "image_ids": ((3,), torch.int64),
        "label_maps": ((3, 24, 32), torch.uint8),
    }
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == expected
    assert batch["sizes"].tolist() == [[24, 32]] * 3
    assert batch["image_ids"].tolist() == [0, 1, 2]


def test_colours_lie_on_their_classes_in_any_crop(split: LabelMapSplit) -> None:
    dataset = SegmentationSamples(
        split, size=40, crop=(48, 40), augment={"jitter": 0.0, "scale": (0.6, 2)}
    )
    filled = 0
    for epoch in range(6):
        sample = dataset[epoch, epoch % 5]
        labels, red = sample["label_maps"].long(), sample["images"][0].long()
        known = labels != VOID
        filled += int((~known).sum())
        assert not sample["images"][:, ~known].any()
        assert ((red - 20 * labels).abs() <= 10)[known].float().mean() > 0.7
    assert filled  # at the smaller scales images do not fill the frame


def test_a_sample_depends_only_on_seed_epoch_and_position(split: LabelMapSplit) -> None:
    options: dict[str, Any] = {"size": 48, "crop": (24, 32), "augment": {}}
    dataset = SegmentationSamples(split, seed=3, **options)
    sample, before = dataset[1, 4], torch.get_rng_state()
    torch.rand(7), np.random.rand(7)
    assert same(sample, SegmentationSamples(split, seed=3, **options)[1, 4])
    assert not same(sample, dataset[2, 4])
    assert not same(sample, SegmentationSamples(split, seed=4, **options)[1, 4])
    torch.set_rng_state(before)
    assert dataset[0, 0] and torch.equal(before, torch.get_rng_state())


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(split: LabelMapSplit) -> None:
    dataset = SegmentationSamples(split, size=48, crop=(24, 32), augment={}, seed=1)
    first, second = (
        list(SampleLoader(dataset, batch_size=2, seed=7, shuffle=True, workers=workers))
        for workers in (0, 2)
    )
    assert len(first) == len(second) == 3
    assert all(same(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("size", "seen"), [(None, (32, 48)), (24, (16, 32)), (72, (48, 64)), (10, (16, 16))]
)
def test_evaluation_sees_whole_images_and_keeps_the_maps(
    split: LabelMapSplit, size: int | None, seen: tuple[int, int]
) -> None:
    dataset = SegmentationSamples(
        split, size=size, crop=(24, 32), train=False, augment={"flip": 1.0}
    )
    sample = dataset[0, 2]
    assert sample["images"].shape == (3, *seen)
    assert sample["sizes"].tolist() == list(seen)
    assert torch.equal(sample["label_maps"], split.label_map(2, (36, 48)))
    assert same(sample, dataset[9, 2])
    if size == 24:
        small = sample["images"][0].float().mean()
        assert small == pytest.approx(20 * sample["label_maps"].float().mean(), abs=4)


def test_only_the_places_asked_for_are_kept_under_their_numbers(split: LabelMapSplit) -> None:
    dataset = SegmentationSamples(
        split, size=None, crop=(24, 32), train=False, only=np.array([3, 1])
    )
    whole = SegmentationSamples(split, size=None, crop=(24, 32), train=False)
    assert len(dataset) == 2
    assert [int(dataset[0, place]["image_ids"]) for place in range(2)] == [3, 1]
    assert same(dataset[0, 0], whole[0, 3])


def test_images_of_different_sizes_go_one_by_one(written: Written) -> None:
    root = written([(36, 48)] * 3)
    written([(36, 48), (48, 36), (24, 40)], "val")
    section = SegmentationSection(
        name="maps", root=str(root), layout="camvid", crop=(24, 32), workers=0
    )
    data = open_maps(section)
    assert not data.whole("val", size=data.section.size).alike and data.training(0).alike
    batches = list(val_loader(data, 4, make_accelerator("fp32")))
    assert [tuple(batch["images"].shape) for batch in batches] == [
        (1, 3, 32, 48), (1, 3, 48, 32), (1, 3, 32, 32)
    ]  # fmt: skip
    assert [tuple(batch["label_maps"].shape[1:]) for batch in batches] == [
        (36, 48), (48, 36), (24, 40)
    ]  # fmt: skip
    alike = data.whole("train", size=None)
    assert alike.alike
    assert data.whole("val", size=None, only=np.array([1])).alike


def test_an_opened_dataset_says_what_it_has(written: Written) -> None:
    root = written([(36, 48)] * 3)
    written([(36, 48)] * 2, "val")
    section = SegmentationSection(
        name="maps", root=str(root), layout="camvid", crop=(24, 32), size=24
    )
    data = open_maps(section)
    assert data.num_classes == CLASSES and data.class_info().names == data.class_names
    assert (len(data.training(0)), len(data.problem.evaluation(data))) == (3, 2)
    assert data.problem.evaluation(data)[0, 0]["images"].shape == (3, 16, 32)
    assert data.whole("val", size=None)[0, 0]["images"].shape == (3, 32, 48)
    assert not same(data.training(0)[0, 0], data.training(1)[0, 0])


@pytest.mark.parametrize("crop", [(20, 32), (24, 0), (24, -8)])
def test_a_crop_that_is_no_multiple_of_8_is_refused(
    split: LabelMapSplit, crop: tuple[int, int]
) -> None:
    wrong = next(side for side in crop if side not in (24, 32))
    with pytest.raises(UserError, match=rf"^data.crop: {wrong} is not a multiple of 8 pixels"):
        SegmentationSamples(split, size=None, crop=crop)


def test_wrong_options_are_named_before_files_are_read(written: Written) -> None:
    root = written([(36, 48)])
    written([(36, 48)], "val")
    (root / "train" / "0.png").write_bytes(b"")
    section = SegmentationSection(name="maps", root=str(root), layout="camvid", crop=(24, 32),
                        augment={"scale": "large"})  # fmt: skip
    with pytest.raises(UserError, match=r"^augment: option 'scale' must "):
        open_maps(section)


def test_a_file_that_broke_later_is_named_in_training_too(split: LabelMapSplit) -> None:
    dataset = SegmentationSamples(split, size=None, crop=(24, 32))
    split.images[1].write_bytes(b"no picture")
    assert isinstance(split.label_map, partial)
    path = split.label_map.args[0][2]
    path.unlink()
    with pytest.raises(UserError, match=rf"^{split.images[1]}: cannot read this image"):
        dataset[0, 1]
    with pytest.raises(UserError, match=rf"^{path}: the label map is missing"):
        dataset[0, 2]
    with pytest.raises(UserError, match=rf"^{split.images[1]}: cannot read this image"):
        SegmentationSamples(split, size=None, crop=(24, 32), train=False)


def test_as_many_whole_images_at_once_as_the_pixels_of_a_batch_of_crops(written: Written) -> None:
    root = written([(32, 64)] * 3)
    section = SegmentationSection(
        name="maps", root=str(root), layout="camvid", crop=(16, 32), val="train", workers=0
    )
    data = open_maps(section)
    assert data.training(0).together(8) == 8
    assert data.problem.evaluation(data).together(8) == 2
    assert data.problem.evaluation(data).together(1) == 1
    assert data.whole("train", size=32).together(8) == 8
