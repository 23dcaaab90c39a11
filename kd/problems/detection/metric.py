"""Collects what a detector finds on the images of a split, over batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kd.errors import UserError
from kd.metrics.coco_ap import Array, Bools, Boxes, Ints
from kd.metrics.kitti_ap import KittiTruth
from kd.metrics.records import Records, gathered, save_records
from kd.problems.detection import records as box_records
from kd.problems.detection import scores as box_scores

RESULTS = "detections.json"  # beside predictions: the same in COCO's format
_FLUSH_AT = 1024  # images whose detections stay on the device


class BoxTruth(Protocol):
    """Ground truth of a split; `kd.formats.coco_results.Truth` is one."""

    @property
    def image_ids(self) -> Ints:
        """(I,) ascending."""
        ...

    @property
    def category_ids(self) -> Ints:
        """(C,) ascending."""
        ...

    @property
    def boxes(self) -> Boxes:
        """All objects, crowds included."""
        ...


class FoundBoxes:
    """Average precision of detections, as COCO, Pascal VOC and KITTI define it.

    Detections are brought to the pixels of the files, as the truth's boxes are. The images that
    were asked about are scored, once each, however often a sampler repeats them; those without
    detections or objects count as others do.

    Args:
        truth: What is on the images, these and maybe more.
        names: C class names.
        confusable: C group names, None for none; classes of one group look alike.
        kitti: The same objects as KITTI's difficulties ask for them.
        where: What messages begin with: a run, a dataset.

    Raises:
        UserError: Not as many names or groups as the truth has categories.
    """

    def __init__(
        self,
        truth: BoxTruth,
        names: Sequence[str],
        *,
        confusable: Sequence[str | None] | None = None,
        kitti: KittiTruth | None = None,
        where: str = "evaluation",
    ) -> None:
        sides: dict[str, Sequence[str | None] | None] = {
            "class names": names,
            "confusable groups": confusable,
        }
        for what, given in sides.items():
            if given is not None and len(given) != len(truth.category_ids):
                raise UserError(
                    f"{where}: {len(given)} {what} for {len(truth.category_ids)} categories"
                )
        self._truth, self._names = truth, tuple(names)
        self._confusable, self._kitti = confusable, kitti
        self._where = where
        self._pending: list[dict[str, Tensor]] = []
        self._chunks: list[dict[str, Array]] = []
        self._records: Records | None = None

    def take(self, decoded: Tensor, batch: Mapping[str, Tensor]) -> None:
        """Add a batch's images.

        Args:
            decoded: (N, K, 6): x1, y1, x2, y2 in pixels of the padded frame, score, label; rows
                with a score of 0 are padding.
            batch: Its `image_ids`, `sizes` and `own_sizes`.
        """
        if decoded.ndim != 3 or decoded.shape[2] != 6 or len(decoded) != len(batch["image_ids"]):
            expected = f"({len(batch['image_ids'])}, K, 6)"
            raise ValueError(f"detections: {tuple(decoded.shape)}, expected {expected}")
        self._records = None
        own = {name: batch[name].detach().clone() for name in ("image_ids", "sizes", "own_sizes")}
        # A copy: a compiled model may write its next output over this one.
        own["detections"] = decoded.detach().to(torch.float32, copy=True)
        self._pending.append(own)
        if sum(len(part["image_ids"]) for part in self._pending) >= _FLUSH_AT:
            self._flush()

    def gather(self, group: dist.ProcessGroup | None = None) -> None:
        """Merge what all ranks collected, so that each holds the union; alone, does nothing."""
        self._chunks, self._records = gathered(self._merged(), group), None

    def records(self) -> Records:
        """Arrays as `predictions.npz` holds them, see `kd.problems.detection.records`.

        Raises:
            UserError: No object to find on the images seen, an image that the truth does not know,
                or detections that are no numbers.
        """
        if self._records is None:
            self._records = self._made()
            box_records.check(self._records, self._where)
        return self._records

    def compute(self) -> dict[str, float]:
        """Every number by name, in 0..1; see `box_scores.evaluate`."""
        return box_scores.evaluate(self.records())

    def save_predictions(self, path: str | Path) -> None:
        """Write the records as an .npz file, and `detections.json` beside it, in COCO's format.

        Raises:
            UserError: Nothing to write, or the folder cannot be written.
        """
        records = self.records()
        box_records.write_results(records, Path(path).with_name(RESULTS))
        save_records(records, Path(path), compressed=True)

    def _made(self) -> Records:
        merged, truth = self._merged(), self._truth
        seen = np.isin(truth.image_ids, merged["image_ids"])
        if seen.sum() < len(merged["image_ids"]):
            unknown = np.setdiff1d(merged["image_ids"], truth.image_ids)
            raise UserError(f"{self._where}: image {unknown[0]} is not among the annotated ones")
        kept = seen[truth.boxes.image]
        place = np.cumsum(seen) - 1  # of an image among those seen
        kitti = self._kitti
        return box_records.box_records(
            _rows(truth.boxes, kept, place),
            _as_boxes(merged),
            merged["found"][:, 4],
            image_ids=truth.image_ids[seen],
            names=self._names,
            category_ids=truth.category_ids,
            confusable=self._confusable,
            kitti=None if kitti is None else KittiTruth(
                _rows(kitti.boxes, kept, place), kitti.truncated[kept], kitti.occluded[kept],
                kitti.neighbour[kept], kitti.region[kept],
            ),
        )  # fmt: skip

    def _flush(self) -> None:
        """Bring what is pending to the processor, in pixels of the files."""
        for tensors in self._pending:
            part = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
            found = part["detections"]
            own = np.tile(part["own_sizes"][:, ::-1], 2)[:, None].astype(np.float64)  # w, h, w, h
            scale = own / np.tile(part["sizes"][:, ::-1], 2)[:, None]
            corners = np.clip(found[..., :4] * scale, 0.0, own)
            sides = corners[..., 2:] - corners[..., :2]
            xywh = np.concatenate([corners[..., :2], sides], axis=-1).astype(np.float32)
            # What is no number is kept, and refused by name. A box without area cannot be right.
            there = ~(found[..., 4] <= 0) & ~(xywh[..., 2:] <= 0).any(axis=-1)
            self._chunks.append(
                {
                    "image_ids": part["image_ids"],
                    "counts": there.sum(axis=1),
                    "found": np.concatenate([xywh[there], found[there][:, 4:]], axis=1),
                }
            )
        self._pending = []

    def _merged(self) -> dict[str, Array]:
        """One chunk of all images, each once, in order of id."""
        self._flush()
        none = np.zeros(0, np.int64)
        empty: dict[str, Array] = {"image_ids": none, "counts": none,
                 "found": np.zeros((0, 6), np.float32)}  # fmt: skip
        chunks = [empty, *self._chunks]
        joined = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in empty}
        ids, first = np.unique(joined["image_ids"], return_index=True)
        starts = np.cumsum(joined["counts"]) - joined["counts"]
        rows = [np.arange(starts[one], starts[one] + joined["counts"][one]) for one in first]
        order = np.concatenate([np.zeros(0, np.int64), *rows])
        merged = {"image_ids": ids, "counts": joined["counts"][first],
                  "found": joined["found"][order]}  # fmt: skip
        self._chunks = [merged]
        return merged


def _as_boxes(merged: Mapping[str, Array]) -> Boxes:
    found = merged["found"]
    return Boxes(
        image=np.repeat(np.arange(len(merged["counts"])), merged["counts"]),
        label=found[:, 5].astype(np.int64),
        xywh=found[:, :4],
        areas=found[:, 2] * found[:, 3],
        crowd=np.zeros(len(found), np.bool_),
    )


def _rows(boxes: Boxes, kept: Bools, place: Ints) -> Boxes:
    """Some of the boxes, on images that are counted anew."""
    return Boxes(
        image=place[boxes.image[kept]],
        label=boxes.label[kept],
        xywh=boxes.xywh[kept],
        areas=boxes.areas[kept],
        crowd=boxes.crowd[kept],
    )
