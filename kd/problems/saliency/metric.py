"""Collects the metrics of saliency maps, image by image, over batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from kd.errors import UserError
from kd.metrics.records import Array, gathered, save_records
from kd.metrics.saliency import SaliencyTruth
from kd.problems.saliency import records as saliency_scores

_Row = dict[str, float]


class SaliencyMaps:
    """Scores each image's map once, however often a sampler repeats it.

    Args:
        truth: Image id -> where people looked on it, in the pixels in which it is scored.
        where: What messages begin with: a run, a dataset.
        references: Gives what maps are held against, `kd.problems.saliency.baselines`: arrays with
            a row for each image id 0, 1, ...; asked when records are.
    """

    def __init__(
        self,
        truth: Callable[[int], SaliencyTruth],
        *,
        where: str = "evaluation",
        references: Callable[[], Mapping[str, Array]] = dict,
    ) -> None:
        self._truth, self._where, self._references = truth, where, references
        self._images: dict[int, _Row] = {}

    def take(self, decoded: Tensor | Sequence[Tensor], batch: Mapping[str, Tensor]) -> None:
        """Add a batch.

        Args:
            decoded: For each image a map (H, W) or (1, H, W), not negative, of any scale, of the
                truth's size: (N, 1, H, W), (N, H, W), or a sequence where sizes differ.
            batch: Its `image_ids` (N,).

        Raises:
            UserError: A map that cannot be scored, with its image.
        """
        for said, number in zip(decoded, batch["image_ids"].tolist(), strict=True):
            if number in self._images:
                continue
            flat = said[0] if said.ndim == 3 and len(said) == 1 else said
            try:
                row = saliency_scores.image(flat.detach().cpu(), self._truth(number))
            except UserError as error:
                raise UserError(f"{self._where}: image {number}: {error}") from None
            self._images[number] = row

    def gather(self, group: dist.ProcessGroup | None = None) -> None:
        """Merge what all ranks collected; alone, does nothing."""
        parts = gathered(self._images, group)
        self._images = {number: one for part in parts for number, one in part.items()}

    def compute(self) -> dict[str, float]:
        """Every number that can be had by name, means over images, and the `count` of these."""
        records = self._own()
        found = {name: saliency_scores.value(records, name) for name in saliency_scores.ROWS}
        numbers = {name: number for name, number in found.items() if number is not None}
        return {**numbers, "count": float(len(self._images))}

    def records(self) -> dict[str, Array]:
        """As `kd.problems.saliency.records` describes, and the references.

        Raises:
            UserError: Not one fixation was scored.
        """
        own = self._own()
        known = self._references()
        return {**own, **{name: rows[own["image_ids"]] for name, rows in known.items()}}

    def _own(self) -> dict[str, Array]:
        records = saliency_scores.records_of(self._images)
        saliency_scores.check(records, self._where)
        return records

    def save_predictions(self, path: Path) -> None:
        """Write `records`."""
        save_records(self.records(), path)
