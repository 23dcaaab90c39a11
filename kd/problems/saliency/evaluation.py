"""Results of saliency maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from matplotlib.figure import Figure
from torch import Tensor

from kd.metrics.records import Records
from kd.metrics.saliency import kld
from kd.problems.images import ImageResults
from kd.problems.results import Evaluation
from kd.problems.saliency import baselines
from kd.problems.saliency import records as saliency_records
from kd.problems.saliency.data import SaliencyDataset
from kd.problems.saliency.figures import density_figure, image_figure, images_table
from kd.report.tables import Table

# References in `summary.json`: prefix -> name.
_PREFIXES = {
    "prior": baselines.NAMES[baselines.CENTRE],
    "observers": baselines.NAMES[baselines.OBSERVERS],
}


@dataclass(frozen=True)
class SaliencyResults(ImageResults):
    """Results from the metrics of each image's saliency map."""

    things: ClassVar[str] = "images with fixations"
    our_rows: ClassVar[tuple[str, ...]] = saliency_records.ROWS
    our_bounded: ClassVar[tuple[str, ...]] = ("KLD", "CC", "NSS", "sAUC")
    image_name: ClassVar[str] = "gaze"

    check = staticmethod(saliency_records.check)
    check_same_truth = staticmethod(saliency_records.check_same_truth)
    our_value = staticmethod(saliency_records.value)
    our_interval = staticmethod(saliency_records.interval)
    our_difference = staticmethod(saliency_records.difference)
    references = staticmethod(baselines.references)
    notes = staticmethod(baselines.notes)

    def summary(self, data: SaliencyDataset, records: Records) -> dict[str, float]:
        """`prior_<metric>`: the centre prior; `observers_<metric>`: other observers."""
        known = self.references(records)
        found = {
            f"{prefix}_{name}": self.our_value(known[reference], name)
            for prefix, reference in _PREFIXES.items()
            if reference in known
            for name in self.our_rows
        }
        return {name: number for name, number in found.items() if number is not None}

    def evaluation(
        self, title: str, runs: Mapping[str, Records], section: Mapping[str, Any],
        opened: Callable[[], SaliencyDataset] | None = None,
    ) -> Evaluation:  # fmt: skip
        """Tables and figures of runs, with the references in the records."""
        known = self.references(next(iter(runs.values())))
        return SaliencyEvaluation(self, title, section, runs, (), known)

    def overlay(
        self, data: SaliencyDataset, place: int, image: Tensor, predicted: Mapping[str, Tensor]
    ) -> Figure:
        """Fixations and densities over an image; titles give the KLD."""
        size = (image.shape[1], image.shape[2])
        truth = data.val.density(place, size, size)[0]
        own = {f"{name}, KLD {kld(one[0], truth):.2f}": one[0] for name, one in predicted.items()}
        points = data.val.fixations(place, size).points
        return density_figure(image, points, {"truth": truth, **own})


@dataclass(frozen=True)
class SaliencyEvaluation(Evaluation):
    """Tables and figures of saliency maps."""

    def class_table(self) -> Table:
        """In place of classes, the images that the first run predicts worst and best."""
        return images_table(self.first)

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Distributions of metrics over images, with the references."""
        for metric in ("KLD", "NSS", "IG"):
            yield f"images_{metric}", image_figure({**self.runs, **self.references}, metric)
