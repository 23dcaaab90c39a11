"""Multi-label average precision: by class, its mean, and over all image-class pairs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from kd.errors import UserError
from kd.metrics.records import gathered, save_records

Array = NDArray[Any]


def average_precision(scores: Array, present: NDArray[np.bool_]) -> float:
    """Compute the area under the precision-recall curve, without interpolation.

    It is the sum over distinct scores of the gain in recall times the precision. Images with equal
    scores are ranked together, so that a constant score gets the fraction of images with the class.

    Args:
        scores: (N,), higher means more likely.
        present: (N,), whether the image contains the class; at least one True.
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.append(ranked[1:] != ranked[:-1], True)  # of each group of equal scores
    hits = np.cumsum(present[order])[last]
    precision = hits / (np.flatnonzero(last) + 1)
    gained = np.diff(hits, prepend=0)
    return float((gained * precision).sum() / hits[-1])


class MultiLabelAP:
    """Collect class log-probabilities and labels of images, and compute average precision.

    Images that occur twice, such as padding of distributed samplers, are used once; images without
    labels are excluded. `where`, such as a run's name, starts the error messages.
    """

    def __init__(self, num_classes: int, *, where: str = "evaluation") -> None:
        self.num_classes, self._where = num_classes, where
        self._chunks: list[dict[str, Array]] = []

    def take(self, decoded: Tensor, batch: Mapping[str, Tensor]) -> None:
        """Add the labelled images of a batch (see docs/batch.md), with log-probabilities (N, C)."""
        present, known = present_classes(batch, self.num_classes)
        self.update(decoded[known], present[known], batch["image_ids"][known])

    def update(self, log_probs: Tensor, present: Tensor, image_ids: Tensor) -> None:
        """Add N images: log-probabilities (N, C), presence bool (N, C), ids (N,) int64."""
        expected = (len(image_ids), self.num_classes)
        for name, part in (("log_probs", log_probs), ("present", present)):
            if tuple(part.shape) != expected:
                raise ValueError(f"{name}: {tuple(part.shape)}, expected {expected}")
        chunk = {"log_probs": log_probs.float(), "present": present, "image_ids": image_ids}
        self._chunks.append({name: part.detach().cpu().numpy() for name, part in chunk.items()})

    def gather(self, group: dist.ProcessGroup | None = None) -> None:
        """Merge the collected images of all ranks on every rank."""
        parts = gathered(self._chunks, group)
        self._chunks = [chunk for chunks in parts for chunk in chunks]

    def records(self) -> dict[str, Array]:
        """Return `log_probs` (N, C), `present` (N, C) and `image_ids` (N,), sorted by image id.

        Raises:
            UserError: No image has labels, or a score is not finite.
        """
        if not sum(len(chunk["image_ids"]) for chunk in self._chunks):
            raise UserError(f"{self._where}: no image was scored; is any of them labelled?")
        names = ("log_probs", "present", "image_ids")
        joined = {name: np.concatenate([chunk[name] for chunk in self._chunks]) for name in names}
        ids, first = np.unique(joined["image_ids"], return_index=True)
        merged = {name: part[first] for name, part in joined.items()}
        if (broken := ~np.isfinite(merged["log_probs"]).all(axis=1)).any():
            image = ids[int(np.flatnonzero(broken)[0])]
            raise UserError(f"{self._where}: image {image}: its scores are not finite")
        return merged

    def compute(self) -> dict[str, float]:
        """Compute all metrics by name, in 0..1.

        `mAP` is the mean over the classes that occur, `weighted_AP` the mean weighted by support,
        and `micro_AP` is over all image-class pairs. `chance_mAP` and `chance_micro_AP` are those
        of a constant score. `count` is the number of images and `classes` that of classes that
        occur.
        """
        records = self.records()
        scores, present = records["log_probs"], records["present"]
        occurring = present.any(axis=0)
        if not occurring.any():
            raise UserError(f"{self._where}: no image has any class")
        return {
            **mean_precisions(scores, present),
            "chance_mAP": float(present[:, occurring].mean()),
            "chance_micro_AP": float(present.mean()),
            "classes": float(occurring.sum()),
            "count": float(len(scores)),
        }

    def save_predictions(self, path: str | Path) -> None:
        """Write the records as an .npz file, atomically."""
        save_records(self.records(), Path(path))


def mean_precisions(scores: Array, present: NDArray[np.bool_]) -> dict[str, float]:
    """Compute `mAP`, `weighted_AP` and `micro_AP` of scores (N, C); empty without classes."""
    support = present.sum(axis=0)
    occurring = np.flatnonzero(support)
    if not len(occurring):
        return {}
    own = np.array([average_precision(scores[:, c], present[:, c]) for c in occurring])
    return {
        "mAP": float(own.mean()),
        "weighted_AP": float(np.average(own, weights=support[occurring])),
        "micro_AP": average_precision(scores.ravel(), present.ravel()),
    }


def present_classes(batch: Mapping[str, Tensor], num_classes: int) -> tuple[Tensor, Tensor]:
    """Return which classes the images contain, bool (N, C), and which images have labels, (N,)."""
    labels = batch["labels"]
    pairs = labels.new_zeros(len(batch["images"]) * num_classes, dtype=torch.float32)
    place = batch["image_of"] * num_classes + labels.clamp(min=0)
    # A sum, because indexing with a mask would synchronise with the GPU.
    present = pairs.index_add(0, place, (labels >= 0).float()).view(-1, num_classes) > 0
    return present, present.any(dim=1)
