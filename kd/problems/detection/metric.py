"""The detection metric: collects each image's detections over batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kd.errors import UserError
from kd.formats.coco_results import Truth
from kd.metrics.coco_ap import Array, Bools, Boxes, Ints
from kd.metrics.kitti_ap import KittiTruth
from kd.metrics.records import Records, save_records
from kd.problems.detection import scores
from kd.problems.images import PerImage

RESULTS = "detections.json"  # in COCO's format, written beside `predictions.npz`
_FLUSH_AT = 1024  # number of images whose detections are copied to the CPU together


class FoundBoxes(PerImage[Array]):
    """COCO, Pascal VOC and KITTI average precision of detections.

    Every image passed to `take` is scored once, even without detections or objects.

    Args:
        truth: Ground truth; images never passed to `take` are ignored.
        confusable: For each class, its group of confusable classes, or None.
        kitti: KITTI only: ground-truth objects with their difficulties.
        where: Prefix of error messages, such as the name of a run or dataset.
    """

    def __init__(
        self, truth: Truth, names: Sequence[str], *,
        confusable: Sequence[str | None] | None = None, kitti: KittiTruth | None = None,
        where: str = "evaluation",
    ) -> None:  # fmt: skip
        super().__init__(where=where)
        for what, given in (("class names", names), ("confusable groups", confusable)):
            if given is not None and len(given) != len(truth.category_ids):
                raise UserError(
                    f"{where}: {len(given)} {what} for {len(truth.category_ids)} categories"
                )
        self._truth, self._names = truth, tuple(names)
        self._confusable, self._kitti = confusable, kitti
        self._pending: list[dict[str, Tensor]] = []
        self._records: Records | None = None

    def take(self, decoded: Tensor, batch: Mapping[str, Tensor]) -> None:
        """Add a batch of detections, (N, K, 6): x1, y1, x2, y2, score, class.

        Coordinates are pixels of the padded frame; rows with score 0 are padding.
        """
        if decoded.ndim != 3 or decoded.shape[2] != 6 or len(decoded) != len(batch["image_ids"]):
            expected = f"({len(batch['image_ids'])}, K, 6)"
            raise ValueError(f"detections: {tuple(decoded.shape)}, expected {expected}")
        self._records = None
        own = {name: batch[name].detach().clone() for name in ("image_ids", "sizes", "own_sizes")}
        # Copied, because a compiled model may write its next output over this one.
        own["detections"] = decoded.detach().to(torch.float32, copy=True)
        self._pending.append(own)
        if sum(len(part["image_ids"]) for part in self._pending) >= _FLUSH_AT:
            self._flush()

    def gather(self, group: dist.ProcessGroup | None = None) -> None:
        self._flush()
        super().gather(group)
        self._records = None

    def records(self) -> Records:
        """Build and check the arrays of `predictions.npz`; see `kd.problems.detection.scores`."""
        if self._records is None:
            self._records = self._computed_records()
            scores.check(self._records, self._where)
        return self._records

    def compute(self) -> dict[str, float]:
        """Metrics in 0..1 by name, from `kd.problems.detection.scores.evaluate`."""
        return scores.evaluate(self.records())

    def save_predictions(self, path: str | Path) -> None:
        """Write the records to `path` (.npz) and `detections.json`, in COCO's format, beside it."""
        records = self.records()
        scores.write_results(records, Path(path).with_name(RESULTS))
        save_records(records, Path(path), compressed=True)

    def _computed_records(self) -> Records:
        self._flush()
        truth, kitti = self._truth, self._kitti
        ids = np.array(sorted(self._images), np.int64)
        seen = np.isin(truth.image_ids, ids)
        if seen.sum() < len(ids):
            unknown = np.setdiff1d(ids, truth.image_ids)
            raise UserError(f"{self._where}: image {unknown[0]} has no annotations")
        rows = [self._images[number] for number in ids.tolist()]
        found = np.concatenate([np.zeros((0, 6), np.float32), *rows])
        image = np.repeat(np.arange(len(ids)), np.array([len(part) for part in rows], np.int64))
        chosen = seen[truth.boxes.image]
        position = np.cumsum(seen) - 1  # ground-truth image index -> index among scored images
        if kitti is not None:
            own = {name: getattr(kitti, name)[chosen]
                   for name in ("truncated", "occluded", "neighbour", "region")}  # fmt: skip
            kitti = KittiTruth(_rows(kitti.boxes, chosen, position), **own)
        return scores.box_records(
            _rows(truth.boxes, chosen, position),
            scores.detections(image, found[:, 5].astype(np.int64), found[:, :4]),
            found[:, 4],
            image_ids=truth.image_ids[seen],
            names=self._names,
            category_ids=truth.category_ids,
            confusable=self._confusable,
            kitti=kitti,
        )

    def _flush(self) -> None:
        """Move pending detections to the CPU, with boxes as x, y, width, height in file pixels."""
        for tensors in self._pending:
            part = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
            found = part["detections"]
            own = np.tile(part["own_sizes"][:, ::-1], 2)[:, None].astype(np.float64)  # w, h, w, h
            scale = own / np.tile(part["sizes"][:, ::-1], 2)[:, None]
            corners = np.clip(found[..., :4] * scale, 0.0, own)
            sides = corners[..., 2:] - corners[..., :2]
            xywh = np.concatenate([corners[..., :2], sides], axis=-1).astype(np.float32)
            # Keep NaN, so that `check` reports it. Drop boxes without area, which match no object.
            there = ~(found[..., 4] <= 0) & ~(xywh[..., 2:] <= 0).any(axis=-1)
            boxes = np.concatenate([xywh, found[..., 4:]], axis=-1)
            for number, own_boxes, chosen in zip(
                part["image_ids"].tolist(), boxes, there, strict=True
            ):
                self._images.setdefault(number, own_boxes[chosen])
        self._pending = []


def _rows(boxes: Boxes, chosen: Bools, position: Ints) -> Boxes:
    """Select the boxes where `chosen` is True; replace their image index i by `position[i]`."""
    own = {name: part[chosen] for name, part in vars(boxes).items()}
    return replace(boxes, **{**own, "image": position[own["image"]]})
