"""What a model is held against: the same objects as somebody answers who sees less, or all."""

from __future__ import annotations

import numpy as np

from kd.baselines import cooccurrence_log_probs
from kd.data.coco import visible_objects
from kd.errors import UserError
from kd.metrics.records import Records, answered, prior_records
from kd.opened import OpenData

PRIOR, COMPANY = "class prior", "co-occurrence"
EXACT, TOLD = "exact posterior", "exact, annotations"

# What each of them knows, for the notes below a table.
ABOUT = {
    PRIOR: "class prior: the classes' shares of the training objects",
    COMPANY: "co-occurrence: naive Bayes over the names, places and sizes of the annotated objects "
    "around the hidden one; no pixels",
    EXACT: "exact posterior: of the scenes' own generative model, given what can be seen; who sees "
    "pixels alone is not better on average",
    TOLD: "exact, annotations: the same model's given the boxes and classes of the other objects "
    "and no pixel; who reads annotations alone is not better on average, who has both may be",
}


def references(data: OpenData, records: Records) -> dict[str, Records]:
    """Everything that is known for these val objects, the weakest first.

    Args:
        data: Their data set.
        records: A run's predictions.

    Raises:
        UserError: The objects are not those of the data set.
    """
    known = {
        PRIOR: prior_records(records),
        COMPANY: answered(records, *cooccurrence_log_probs(data), COMPANY),
        **exact_records(data, records),
    }
    return {name: one for name, one in known.items() if one is not None}


def on_data(data: OpenData, records: Records, where: str) -> Records:
    """Stored predictions with the number of visible objects, which older ones lack.

    Raises:
        UserError: The objects or their labels are not those of the data set's val split.
    """
    val = data.val
    order = np.argsort(val.object_ids, kind="stable")
    place = np.searchsorted(val.object_ids, records["object_ids"], sorter=order)
    rows = order[np.minimum(place, len(order) - 1)]
    same = val.object_ids[rows] == records["object_ids"]
    if wrong := int((~same | (val.labels[rows] != records["labels"])).sum()):
        raise UserError(
            f"{where}: {wrong} of its objects are not in {val.annotation_file}, or have another "
            "label there; name the run's own data set with --set data.root=DIR"
        )
    return {**records, "visible": visible_objects(val, records["image_ids"])}


def exact_records(data: OpenData, records: Records) -> dict[str, Records]:
    """The objects as the exact posteriors answer them; empty for other data than the scenes."""
    stored = data.ceiling("val")
    if stored is None:
        return {}
    ids, given = stored["object_ids"], {EXACT: "pixels", TOLD: "annotations"}
    return {
        name: answered(records, ids, stored[f"log_probs_{what}"].astype(np.float32), name)
        for name, what in given.items()
    }
