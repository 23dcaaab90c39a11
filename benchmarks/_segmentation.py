"""Photographs with label maps and two networks, shared by the segmentation benchmarks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.formats.coco import CocoIndex, load_coco
from kd.nn.freeze import evaluating
from kd.nn.trunk import build_trunk
from kd.problems.base import Batch, Classes, Evaluator, Mean, Output, Rows, Task
from kd.transforms.hide import normalise
from kd.utils.images import read_image, resize

SIDE, STRIDE, CHANNELS, BATCH, EPOCH = 128, 4, 32, 8, 100  # EPOCH is a number of steps


@dataclass
class Photos:
    """A split in memory: images (I, 3, S, S) uint8 and label maps (I, s, s) int64."""

    ids: list[int]
    images: Tensor
    maps: Tensor
    names: list[str]

    def batch(self, rows: Tensor, flips: Tensor | None = None) -> dict[str, Tensor]:
        """Some images, each a row of its own; mirrored where `flips` says so."""
        flips = torch.zeros(len(rows), dtype=torch.bool) if flips is None else flips
        images, maps = (
            torch.where(flips.view(-1, *[1] * (kind.ndim - 1)), kind[rows].flip(-1), kind[rows])
            for kind in (self.images, self.maps)
        )
        own = torch.arange(len(rows))
        return {
            "images": images, "maps": maps, "labels": own * 0,
            "rows": rows + len(self.ids) * flips,
        }  # fmt: skip


def read_photos(root: Path, split: str) -> Photos:
    """Read the central squares of a split's images; smaller objects are drawn over larger ones."""
    file = root / "annotations" / f"instances_{split}2017.json"
    index = load_coco(file, root / f"{split}2017")
    groups = {c["id"]: c["supercategory"] for c in json.loads(file.read_text())["categories"]}
    names = list(dict.fromkeys(groups[number] for number in index.category_ids))
    group_of = [1 + names.index(groups[number]) for number in index.category_ids]
    pairs = [_square(index, image, group_of) for image in range(len(index))]
    images, maps = (torch.stack(side) for side in zip(*pairs, strict=True))
    return Photos(index.image_ids.tolist(), images, maps, ["background", *names])


def _square(index: CocoIndex, image: int, group_of: Sequence[int]) -> tuple[Tensor, Tensor]:
    height, width = int(index.heights[image]), int(index.widths[image])
    scale = SIDE / min(height, width)
    size = round(height * scale), round(width * scale)
    top, left = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    window = slice(top, top + SIDE), slice(left, left + SIDE)
    painted = np.zeros(size, np.int64)
    rows = np.arange(index.first[image], index.first[image + 1])
    for row in rows[np.argsort(-index.areas[rows], kind="stable")].tolist():
        painted[index.mask_of(row, size)] = group_of[index.labels[row]]
    # The label of a grid cell is that of its central pixel.
    places = torch.from_numpy(painted[window].copy())[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE]
    return resize(read_image(index.path(image), None), size)[:, *window].clone(), places.clone()


class Order:
    """Batches whose order and mirroring depend only on the epoch."""

    def __init__(self, photos: Photos) -> None:
        self.photos, self.epoch, self.start = photos, 0, 0

    def __len__(self) -> int:
        return EPOCH

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self.epoch, self.start = epoch, start_batch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        random = torch.Generator().manual_seed(self.epoch)
        count = len(self.photos.ids)
        rounds = -(-EPOCH * BATCH // count)
        rows = torch.cat([torch.randperm(count, generator=random) for _ in range(rounds)])
        flips = torch.rand(len(rows), generator=random) < 0.5
        for step in range(self.start, EPOCH):
            part = slice(step * BATCH, (step + 1) * BATCH)
            yield self.photos.batch(rows[part], flips[part])


class Segmentation(Task):
    """Segmentation task with label maps on the grid of the score maps; each image is a row."""

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        return (normalise(batch["images"]),)

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        loss = F.cross_entropy(output["logits"], batch["maps"])
        return {"cross_entropy": Mean(loss, "images")}

    def decode(self, output: Output, batch: Batch) -> Tensor:
        return output["logits"].mean(dim=(2, 3)).log_softmax(dim=1)

    def metric(self, classes: Classes) -> Evaluator:
        """Raise an error: nothing is evaluated here."""
        raise NotImplementedError


def block(inner: int, outer: int, stride: int = 1, dilation: int = 1) -> nn.Module:
    convolution = nn.Conv2d(
        inner, outer, 3, stride=stride, padding=dilation, dilation=dilation, bias=False
    )
    return nn.Sequential(convolution, nn.BatchNorm2d(outer), nn.ReLU())


class Segmenter(nn.Module):
    """Sum of a trunk's levels on the finest grid: features, then score maps."""

    def __init__(self, trunk: nn.Module, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.sides = nn.ModuleList(nn.Conv2d(width, CHANNELS, 1) for width in channels)
        self.fuse = block(CHANNELS, CHANNELS)
        self.classify = nn.Conv2d(CHANNELS, num_classes, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        grid = images.shape[2] // STRIDE, images.shape[3] // STRIDE
        levels = self.trunk(images)
        parts = [
            F.interpolate(side(level), grid, mode="bilinear", align_corners=False)
            for side, level in zip(self.sides, levels, strict=True)
        ]
        features = self.fuse(torch.stack(parts).sum(dim=0))
        return {"features": features, "logits": self.classify(features)}


class Levels(nn.Module):
    """MobileNetV2's maps at strides 4 to 32, with ImageNet's batch norm statistics."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.trunk = build_trunk("mobilenet_v2", weights=str(weights))
        self.channels = self.trunk.level_channels[1:]

    def train(self, mode: bool = True) -> Levels:
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.trunk.forward_levels(images)[1:]


class Small(nn.Module):
    """Seven convolutions, with maps at strides 4 and 8."""

    channels = (32, 64)

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(block(3, 16, 2), block(16, 32, 2), block(32, 32))
        deep = (block(32, 64, 2), *(block(64, 64, dilation=wide) for wide in (1, 2, 4)))
        self.deep = nn.Sequential(*deep)

    def forward(self, images: Tensor) -> list[Tensor]:
        fine = self.fine(images)
        return [fine, self.deep(fine)]


class Answers:
    """A frozen teacher's outputs for every image and its mirror image, computed once."""

    def __init__(self, teacher: nn.Module, photos: Photos) -> None:
        rows = torch.arange(len(photos.ids))
        outputs: dict[str, list[Tensor]] = {"features": [], "logits": []}
        with evaluating(teacher), torch.no_grad():
            for flipped in (False, True):
                for part in rows.split(32):
                    batch = photos.batch(part, torch.full((len(part),), flipped))
                    output = teacher(normalise(batch["images"]))
                    for name, parts in outputs.items():
                        parts.append(output[name])
        self.outputs = {name: torch.cat(parts) for name, parts in outputs.items()}

    def __call__(self, batch: Batch, rows: Rows | None = None) -> Mapping[str, Tensor]:
        """Return features and logits of each image in a batch."""
        return {name: known[batch["rows"]] for name, known in self.outputs.items()}


def iou(model: nn.Module, photos: Photos) -> str:
    """Return the mean IoU over the classes that occur, and the pixel accuracy."""
    classes = len(photos.names)
    counts = torch.zeros(classes, classes)
    with evaluating(model), torch.no_grad():
        for rows in torch.arange(len(photos.ids)).split(32):
            batch = photos.batch(rows)
            output = model(normalise(batch["images"]))
            logits = (output[0] if isinstance(output, tuple) else output)["logits"]
            pairs = batch["maps"] * classes + logits.argmax(1)
            counts += pairs.flatten().bincount(minlength=classes**2).view(classes, classes)
    right = counts.diag()
    union = counts.sum(0) + counts.sum(1) - right
    mean = (right / union.clamp(min=1))[counts.sum(1) > 0].mean()
    return f"mIoU {mean:.3f}, pixel accuracy {right.sum() / counts.sum():.3f}"
