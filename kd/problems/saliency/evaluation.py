"""Results of saliency maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from accelerate import Accelerator
from matplotlib.figure import Figure

from kd.metrics.records import Records
from kd.problems.results import Evaluation, Predictor, Results
from kd.problems.saliency import baselines
from kd.problems.saliency import records as saliency_records
from kd.problems.saliency.data import SaliencyDataset
from kd.problems.saliency.draw import saliency_overlays
from kd.problems.saliency.figures import image_figure, images_table
from kd.report.tables import Table

# References in `summary.json`: prefix -> name.
_PREFIXES = {
    "prior": baselines.NAMES[baselines.CENTRE],
    "observers": baselines.NAMES[baselines.OBSERVERS],
}


@dataclass(frozen=True)
class SaliencyResults(Results):
    """Numbers of each image's saliency map."""

    things: ClassVar[str] = "images with fixations"
    our_rows: ClassVar[tuple[str, ...]] = saliency_records.ROWS
    our_bounded: ClassVar[tuple[str, ...]] = ("KLD", "CC", "NSS", "sAUC")
    image_name: ClassVar[str] = "gaze"
    drawn_from: ClassVar[Literal["models", "records"] | None] = "models"

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
        self,
        title: str,
        runs: Mapping[str, Records],
        section: Mapping[str, Any],
        opened: Callable[[], SaliencyDataset] | None = None,
    ) -> Evaluation:
        """Tables and figures; the records hold all that is needed."""
        known = self.references(next(iter(runs.values())))
        return SaliencyEvaluation(self, title, section, runs, (), known)

    def draw(
        self,
        data: SaliencyDataset,
        predictors: Mapping[str, Predictor],
        runs: Mapping[str, Records],
        *,
        count: int,
        accelerator: Accelerator,
    ) -> Iterator[Figure]:
        """Draw densities over their images."""
        return saliency_overlays(data, predictors, count=count, accelerator=accelerator)


@dataclass(frozen=True)
class SaliencyEvaluation(Evaluation):
    """Saliency maps, image by image."""

    def class_table(self) -> Table:
        """There are no classes: the images that the first run predicts worst and best."""
        return images_table(self.first)

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """How metrics are distributed over the images, beside the references."""
        for metric in ("KLD", "NSS", "IG"):
            yield f"images_{metric}", image_figure({**self.runs, **self.references}, metric)
