"""The metric of saliency maps: scores per image, merged over batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from kd.errors import UserError
from kd.metrics.records import Array
from kd.metrics.saliency import SaliencyTruth
from kd.problems.images import PerImage
from kd.problems.saliency import records as saliency_scores


class SaliencyMaps(PerImage[dict[str, float]]):
    """Metrics of saliency maps, means over images.

    Args:
        truth: Image id -> ground truth, in the pixels in which the image is scored.
        where: Start of messages: a run, a dataset.
        references: Gives the references of `kd.problems.saliency.baselines`, arrays with a row for
            each image id 0, 1, ...; called for records.
    """

    def __init__(
        self,
        truth: Callable[[int], SaliencyTruth],
        *,
        where: str = "evaluation",
        references: Callable[[], Mapping[str, Array]] = dict,
    ) -> None:
        super().__init__(where=where)
        self._truth, self._references = truth, references

    def take(self, decoded: Tensor | Sequence[Tensor], batch: Mapping[str, Tensor]) -> None:
        """Add a batch.

        Args:
            decoded: A map per image, not negative, of any scale, of the ground truth's size:
                (N, 1, H, W), (N, H, W), or a sequence if sizes differ.
            batch: `image_ids` (N,).

        Raises:
            UserError: A map cannot be scored; names the image.
        """
        for predicted, number in zip(decoded, batch["image_ids"].tolist(), strict=True):
            if number in self._images:
                continue
            flat = predicted[0] if predicted.ndim == 3 and len(predicted) == 1 else predicted
            try:
                row = saliency_scores.image(flat.detach().cpu(), self._truth(number))
            except UserError as error:
                raise UserError(f"{self._where}: image {number}: {error}") from None
            self._images[number] = row

    def compute(self) -> dict[str, float]:
        """Metrics that are defined by name, means over images, and the `count` of images."""
        records = self._own()
        found = {name: saliency_scores.value(records, name) for name in saliency_scores.ROWS}
        numbers = {name: number for name, number in found.items() if number is not None}
        return {**numbers, "count": float(len(self._images))}

    def records(self) -> dict[str, Array]:
        """Arrays of `kd.problems.saliency.records`, and the references.

        Raises:
            UserError: Not one fixation was scored.
        """
        own = self._own()
        known = self._references().items()
        return {**own, **{name: rows[own["image_ids"]] for name, rows in known}}

    def _own(self) -> dict[str, Array]:
        records = saliency_scores.records_of(self._images)
        saliency_scores.check(records, self._where)
        return records
