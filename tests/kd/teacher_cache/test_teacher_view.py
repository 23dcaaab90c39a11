"""A teacher's outputs for whole images, kept, and given to crops: the live ones where exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from kd.config.recipes import Model, TaskSection, TeacherRecipe
from kd.distillation.targets import CachedTeacher, LiveTeacher
from kd.errors import UserError
from kd.problems.base import Rows
from kd.problems.images import ImagesView
from kd.problems.segmentation.data import SegmentationDataset, open_maps
from kd.problems.segmentation.schema import SegmentationSection
from kd.problems.segmentation.task import Segmentation
from kd.runs.build import make_accelerator, make_loader
from kd.runs.load_teacher import TrainedTeacher
from kd.storage.fields import CachedField
from kd.storage.store import Store
from kd.teacher_cache import cache as teacher_cache
from kd.teacher_cache.cache import CacheOptions, open_cache
from kd.transforms.crops import Crop
from kd.utils.images import read_image

SIZE, FRAME, STRIDE = (48, 64), (24, 40), 8
BOTH = ("logits", "features")


class Grid(nn.Module):
    """A teacher that sees each square of 8 pixels alone: it moves with its image by whole ones.

    `sided` looks at left and right differently, so that it has something else to say of a mirror's.
    """

    def __init__(self, *, sided: bool) -> None:
        super().__init__()
        pooled = nn.Sequential(nn.AvgPool2d(STRIDE), nn.Conv2d(3, 6, 1))
        self.features = nn.Conv2d(3, 6, STRIDE, stride=STRIDE) if sided else pooled
        self.head = nn.Conv2d(6, 11, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images).relu())
        return logits


def write_split(root: Path, split: str, sizes: list[tuple[int, int]]) -> None:
    random = np.random.default_rng(len(split))
    for folder, depth in ((split, (3,)), (f"{split}annot", ())):
        (root / folder).mkdir(parents=True)
        for number, size in enumerate(sizes):
            pixels = random.integers(0, 11 if not depth else 256, (*size, *depth))
            Image.fromarray(pixels.astype(np.uint8)).save(root / folder / f"{number}.png")


@pytest.fixture
def data(tmp_path: Path) -> SegmentationDataset:
    for split, count in (("train", 5), ("val", 2)):
        write_split(tmp_path / "maps", split, [SIZE] * count)
    return open_maps(section(tmp_path / "maps"))


def section(root: Path, **changes: Any) -> SegmentationSection:
    values = {"name": "maps", "root": str(root), "layout": "camvid", "crop": FRAME, "workers": 0}
    return SegmentationSection.model_validate(values | changes)


def teacher_of(data: SegmentationDataset, folder: Path, *, sided: bool = False) -> TrainedTeacher:
    recipe = TeacherRecipe(
        data=data.section,
        task=TaskSection(name="segmentation", weights={"cross_entropy": 1.0}),
        teacher=Model(name="pspnet"),
    )
    torch.manual_seed(4)
    model = Grid(sided=sided).eval().requires_grad_(False)
    return TrainedTeacher(folder, recipe, model, Segmentation(num_classes=11))


def test_every_image_is_shown_whole_under_its_place(
    data: SegmentationDataset, tmp_path: Path
) -> None:
    teacher = teacher_of(data, tmp_path)
    shown = data.problem.teacher_view(teacher, data, "train")
    assert isinstance(shown, ImagesView)
    assert shown.image_ids.tolist() == [0, 1, 2, 3, 4] and shown.records_per_image == 1
    assert shown.samples()[0, 3]["images"].shape == (3, *SIZE)
    some = shown.samples(np.array([4, 2]))
    assert [int(some[0, place]["image_ids"]) for place in range(2)] == [4, 2]
    assert len(data.problem.teacher_view(teacher, data, "val").samples()) == 2


def test_a_teacher_may_see_larger_images_than_in_training(
    data: SegmentationDataset, tmp_path: Path
) -> None:
    teacher, accelerator = teacher_of(data, tmp_path), make_accelerator("fp32")
    large = CacheOptions(outputs=("logits",), dtype="float32", size=2 * max(SIZE))
    kept = open_cache(teacher, data, accelerator, large)["logits"]
    crop = Crop(window=(0, 0, *SIZE), size=SIZE)
    view = data.problem.teacher_view(teacher, data, "train", size=large.size)
    picture = view.samples()[0, 1]["images"]
    assert picture.shape == (3, 2 * SIZE[0], 2 * SIZE[1])
    with LiveTeacher(teacher.model, teacher.task, posterior=False) as source:
        live = source({"images": picture[None]})["logits"]
    finer = CachedField(kept.store, "logits", stride=STRIDE // 2)
    torch.testing.assert_close(finer.cropped(1, crop, SIZE, SIZE), live)
    own = open_cache(teacher, data, accelerator, CacheOptions(outputs=("logits",), dtype="float32"))
    assert own["logits"].store.url != kept.store.url  # each is kept by itself


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("sided", [False, True])
def test_a_crop_on_the_grid_gets_what_the_teacher_says_of_it(
    data: SegmentationDataset, tmp_path: Path, sided: bool, flip: bool
) -> None:
    teacher = teacher_of(data, tmp_path, sided=sided)
    options = CacheOptions(outputs=BOTH, dtype="float32", mirrored=sided)
    kept = open_cache(teacher, data, make_accelerator("fp32"), options)
    for image, top, left in ((0, 0, 0), (3, 16, 8), (4, 24, 24)):
        crop = Crop(window=(top, left, *FRAME), size=FRAME, flip=flip)
        picture = crop.image(read_image(data.train.images[image], None), FRAME)[None]
        with LiveTeacher(teacher.model, teacher.task, ["features"], posterior=False) as source:
            live = source({"images": picture})
        for name in BOTH:
            found = kept[name].cropped(image, crop, SIZE, FRAME)
            torch.testing.assert_close(found, live[name], rtol=1e-4, atol=1e-4)
            if sided and flip:  # what was said of the image itself does not do
                plain = Crop(window=(top, left, *FRAME), size=FRAME)
                moved = kept[name].cropped(image, plain, SIZE, FRAME).flip(3)
                assert (moved - live[name]).abs().max() > 0.05


def test_stored_outputs_come_with_the_batch_as_live_ones_do(tmp_path: Path) -> None:
    """Crops of whole images lie on the grid, wherever they are flipped."""
    for split, count in (("train", 5), ("val", 1)):
        write_split(tmp_path / "maps", split, [SIZE] * count)
    still = {"scale": (1.0, 1.0), "flip": 0.5, "jitter": 0.0}
    data = open_maps(section(tmp_path / "maps", crop=SIZE, augment=still))
    teacher = teacher_of(data, tmp_path, sided=True)
    accelerator = make_accelerator("fp32")
    options = CacheOptions(outputs=BOTH, dtype="float32", mirrored=True)
    kept = open_cache(teacher, data, accelerator, options)
    samples = data.training(0, cached=list(kept.values()))
    loader = make_loader(samples, accelerator, batch_size=5, workers=0, train=True)
    batch = next(iter(loader))
    stored = CachedTeacher(None, BOTH)(batch, Rows())
    with LiveTeacher(teacher.model, teacher.task, ["features"], posterior=False) as source:
        live = source(batch)
    for name in BOTH:
        torch.testing.assert_close(stored[name], live[name], rtol=1e-4, atol=1e-4)
    finer = data.training(0, cached=[CachedField(kept["logits"].store, "logits", stride=4)])[0, 0]
    assert finer["stored.logits"].shape == (1, 11, 12, 16)


def test_only_the_likeliest_classes_are_kept_of_each_place(
    data: SegmentationDataset, tmp_path: Path
) -> None:
    teacher = teacher_of(data, tmp_path)
    accelerator = make_accelerator("fp32")
    exact, kept = (
        open_cache(teacher, data, accelerator, CacheOptions(outputs=("logits",), top_k=top_k))[
            "logits"
        ]
        for top_k in (0, 3)
    )
    crop = Crop(window=(0, 0, *SIZE), size=SIZE)
    first = exact.cropped(2, crop, SIZE, SIZE).float().log_softmax(dim=1)
    second = kept.cropped(2, crop, SIZE, SIZE).float()
    values, indices = first.topk(3, dim=1)
    torch.testing.assert_close(second.gather(1, indices), values, rtol=0.01, atol=0.01)
    assert kept.store.bytes < exact.store.bytes


def test_an_interrupted_pass_over_images_goes_on(
    data: SegmentationDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_cache, "MOST_IMAGES", 2)  # 5 images: three shards
    monkeypatch.setattr(teacher_cache, "IMAGES_A_BATCH", 2)
    accelerator, options = make_accelerator("fp32"), CacheOptions(outputs=("logits",))
    expected = open_cache(teacher_of(data, tmp_path / "whole"), data, accelerator, options)
    teacher, write = teacher_of(data, tmp_path / "cut"), Store.write_shard
    with monkeypatch.context() as patch:

        def cut_off(self: Store, number: int, fields: Any) -> None:
            if number == 2:
                raise KeyboardInterrupt
            write(self, number, fields)

        patch.setattr(Store, "write_shard", cut_off)
        with pytest.raises(KeyboardInterrupt):
            open_cache(teacher, data, accelerator, options)
    shown: list[list[int]] = []
    call = LiveTeacher.__call__

    def counted(self: LiveTeacher, batch: dict[str, Tensor]) -> Any:
        shown.append(batch["image_ids"].tolist())
        return call(self, batch)

    monkeypatch.setattr(LiveTeacher, "__call__", counted)
    found = open_cache(teacher, data, accelerator, options)
    assert shown == [[4]]
    assert found["logits"].store.ids().tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(found["logits"].whole(), expected["logits"].whole())


def test_other_images_another_size_or_split_are_refused(
    data: SegmentationDataset, tmp_path: Path
) -> None:
    teacher, accelerator = teacher_of(data, tmp_path), make_accelerator("fp32")
    options = CacheOptions(outputs=("logits",), location=str(tmp_path / "kept"))
    open_cache(teacher, data, accelerator, options)
    smaller = open_maps(data.section.model_copy(update={"size": 32}))
    with pytest.raises(UserError, match=r"transform is 'size None, .*' there, 'size 32, "):
        open_cache(teacher_of(smaller, tmp_path), data, accelerator, options)
    other = open_maps(data.section.model_copy(update={"train": "val"}))
    with pytest.raises(UserError, match=r"images is '\w+' there, '\w+' here"):
        open_cache(teacher, other, accelerator, options)
    Image.new("RGB", SIZE[::-1], (7, 7, 7)).save(data.train.images[1])
    with pytest.raises(UserError, match=r"kept/maps-train-logits: .*images is '\w+' there"):
        open_cache(teacher, data, accelerator, options)


def test_images_of_different_sizes_want_a_live_teacher(tmp_path: Path) -> None:
    write_split(tmp_path / "maps", "train", [SIZE, (40, 64)])
    write_split(tmp_path / "maps", "val", [SIZE])
    data = open_maps(section(tmp_path / "maps"))
    with pytest.raises(UserError, match=r"^maps: the images have different sizes.*kind=live$"):
        open_cache(
            teacher_of(data, tmp_path),
            data,
            make_accelerator("fp32"),
            CacheOptions(outputs=("logits",)),
        )
