"""What a run's `summary.json` says: its numbers, and those that they are held against."""

from __future__ import annotations

from typing import Any

from torch import nn

from kd.launch import parameters
from kd.metrics import scores
from kd.metrics.kinds import SALIENCY
from kd.metrics.saliency_maps import SaliencyMaps
from kd.metrics.saliency_references import CENTRE, NAMES, OBSERVERS
from kd.metrics.top_n import TopN
from kd.opened import OpenData, Opened
from kd.references import EXACT, exact_records
from kd.tasks.base import Metric

_CEILING = ("top1", "top5", "nll", "lookalike_top1", "lookalike_pair_top1", "mean_class_top1",
            "area")  # fmt: skip


def summary_of(data: Opened, metric: Metric, model: nn.Module, steps: int) -> dict[str, Any]:
    """What `summary.json` says of a model's answers; of saliency with what they are held against.

    Args:
        data: Its val split was asked about.
        metric: Holds the answers.
        model: As it is used, without adapters.
        steps: Of training.
    """
    return {
        **metric.compute(),
        **_of_exact_posterior(data, metric),
        **_of_references(metric),
        "parameters": parameters(model),
        "steps": steps,
    }


def _of_exact_posterior(data: Opened, metric: Metric) -> dict[str, float]:
    """What the exact posterior of the embedded scenes scores on the same objects."""
    if not (isinstance(metric, TopN) and isinstance(data, OpenData)):
        return {}
    exact = exact_records(data, metric.records())
    if EXACT not in exact:
        return {}
    values = scores.evaluate(exact[EXACT])
    return {f"ceiling_{name}": values[name] for name in _CEILING if name in values}


def _of_references(metric: Metric) -> dict[str, float]:
    """What the centre prior and other observers reach on the same pictures, of saliency maps."""
    if not isinstance(metric, SaliencyMaps):
        return {}
    found = SALIENCY.references(metric.records())
    columns = {"prior": NAMES[CENTRE], "observers": NAMES[OBSERVERS]}
    known = {
        f"{column}_{name}": SALIENCY.value(found[reference], name)
        for column, reference in columns.items()
        if reference in found
        for name in SALIENCY.rows
    }
    return {name: number for name, number in known.items() if number is not None}
