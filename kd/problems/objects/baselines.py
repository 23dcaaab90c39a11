"""Reference predictions: the class prior, class co-occurrence, and the exact posterior."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from numpy.typing import NDArray

from kd.errors import UserError
from kd.formats.coco import CocoIndex, visible_objects
from kd.formats.splits import objects_on
from kd.metrics.classification import prior_records
from kd.metrics.records import Records
from kd.nn.cooccurrence import NaiveBayes, Objects
from kd.problems.objects.data import ObjectsDataset
from kd.problems.objects.metric import with_predictions


def index_objects(index: CocoIndex, images: Collection[int] | None = None) -> Objects:
    """Objects of the images with the given ids (None: all), as co-occurrence model input."""
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


def cooccurrence_log_probs(data: ObjectsDataset) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Predict each usable val object's class from the other objects in its image, by naive Bayes.

    Returns annotation ids (K,), ascending, and log-probabilities (K, C).
    """
    model = NaiveBayes(data.num_classes, evidence=("company", "place", "size"))
    model.fit(index_objects(data.train))
    model.eval()
    objects = index_objects(data.val)  # all objects, so that object k is row k of the index
    rows = data.samples("val").usable_rows()
    log_probs = model(objects, torch.from_numpy(rows)).numpy()
    ids = data.val.object_ids[rows]
    order = np.argsort(ids)
    return np.asarray(ids[order], dtype=np.int64), np.asarray(log_probs[order], dtype=np.float32)


PRIOR, COOCCURRENCE = "class prior", "co-occurrence"
EXACT, EXACT_ANNOTATIONS = "exact posterior", "exact, annotations"

# Notes that explain the references below tables.
ABOUT = {
    PRIOR: "class prior: how frequent each class is among the training objects",
    COOCCURRENCE: "co-occurrence: naive Bayes over the names, places and sizes of the annotated "
    "objects around the hidden one; no pixels",
    EXACT: "exact posterior: class probabilities under the scenes' generative model, given the "
    "visible pixels; no model whose only input is pixels is better on average",
    EXACT_ANNOTATIONS: "exact, annotations: the exact posterior given the boxes and classes of the "
    "other objects instead of pixels; a model that also uses pixels can be better",
}


def references(data: ObjectsDataset, records: Records) -> dict[str, Records]:
    """All available reference predictions for the objects in a run's records, weakest first."""
    known = {
        PRIOR: prior_records(records),
        COOCCURRENCE: with_predictions(records, *cooccurrence_log_probs(data), COOCCURRENCE),
        **exact_records(data, records),
    }
    return {name: one for name, one in known.items() if one is not None}


def on_data(data: ObjectsDataset, records: Records, where: str) -> Records:
    """Check that a run's objects belong to the dataset's val split; add the array `visible`."""
    val = data.val
    order = np.argsort(val.object_ids, kind="stable")
    place = np.searchsorted(val.object_ids, records["object_ids"], sorter=order)
    rows = order[np.minimum(place, len(order) - 1)]
    same = val.object_ids[rows] == records["object_ids"]
    if wrong := int((~same | (val.labels[rows] != records["labels"])).sum()):
        raise UserError(
            f"{where}: {wrong} scored objects are not in {val.annotation_file}, or have another "
            "label there; pass the dataset of the run with --set data.root=DIR"
        )
    return {**records, "visible": visible_objects(val, records["image_ids"])}


def exact_records(data: ObjectsDataset, records: Records) -> dict[str, Records]:
    """Records of the exact posteriors by name; empty unless the data are the embedded scenes."""
    stored = data.ceiling("val")
    if stored is None:
        return {}
    ids, given = stored["object_ids"], {EXACT: "pixels", EXACT_ANNOTATIONS: "annotations"}
    return {
        name: with_predictions(records, ids, stored[f"log_probs_{what}"].astype(np.float32), name)
        for name, what in given.items()
    }
