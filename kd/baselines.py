"""What needs no network: class shares and co-occurrence, counted on a data set's train images."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from numpy.typing import NDArray

from kd.data.coco import CocoIndex
from kd.data.splits import objects_on
from kd.nn.cooccurrence import NaiveBayes, Objects
from kd.opened import OpenData, make_dataset


def index_objects(index: CocoIndex, images: Collection[int] | None = None) -> Objects:
    """The objects of an index end to end, images counted on from 0.

    Args:
        index: The data set.
        images: Only those of images with these ids; all where not given.
    """
    rows, owners = objects_on(index, images)
    sides = np.stack([index.widths, index.heights], axis=1)[owners].astype(np.float32)
    boxes = index.boxes[rows] / np.tile(sides, 2)
    return Objects(
        torch.from_numpy(index.labels[rows].astype(np.int64)),
        torch.ones(len(rows), dtype=torch.bool),
        torch.from_numpy(boxes).clamp(0.0, 1.0),
        torch.from_numpy(sides[:, 0] / sides[:, 1]),
        torch.from_numpy(np.unique(owners, return_inverse=True)[1].astype(np.int64)),
    )


def fit_cooccurrence(index: CocoIndex) -> NaiveBayes:
    """Naive Bayes over the other objects, place and size, of all objects of the train images.

    Args:
        index: The train split.
    """
    model = NaiveBayes(index.num_classes, evidence=("company", "place", "size"))
    model.fit(index_objects(index))
    return model.eval()


def cooccurrence_log_probs(data: OpenData) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """What co-occurrence says of every usable val object, given all the others of its image.

    Returns:
        Annotation ids (K,) ascending, and log-probabilities (K, C).
    """
    model = fit_cooccurrence(data.train)
    objects = index_objects(data.val)  # all of them, so that an object's place is its row
    rows = make_dataset(data, "val", train=False).usable_rows()
    log_probs = model(objects, torch.from_numpy(rows)).numpy()
    ids = data.val.object_ids[rows]
    order = np.argsort(ids)
    return np.asarray(ids[order], dtype=np.int64), np.asarray(log_probs[order], dtype=np.float32)
