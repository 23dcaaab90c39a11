"""Collects class probabilities of objects over batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from kd.errors import UserError
from kd.metrics import classification as scores
from kd.metrics.records import Array, gathered, save_records
from kd.problems.objects.records import REQUIRED, check

# Device tensors are kept until this many objects are there: one wait for the device for all.
_FLUSH_AT = 4096
# A class that the training labels lack is not impossible; without a floor its NLL is infinite.
_PRIOR_FLOOR = 1e-8


class TopN:
    """Collects class probabilities; scores how often the true class is among the first n.

    Ties count against the scorer (`kd.metrics.classification.ranks`). An object that is seen twice,
    as
    samplers repeat some to give each rank as many, counts once. Objects are held in order of their
    id, so that neither the number of ranks nor the order of batches changes a digit.

    Args:
        num_classes: C.
        prior: (C,) class shares of the training labels; adds the `prior_` metrics.
        confusable: C group names, None for none; classes of one group look alike.
        visible: Image ids (K,) -> how many other objects the image of each holds, (K,).
        where: What messages begin with: a run, a dataset.

    Raises:
        UserError: `prior` or `confusable` do not fit C.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        prior: Tensor | Array | Sequence[float] | None = None,
        confusable: Sequence[str | None] | None = None,
        visible: Callable[[Array], Array] | None = None,
        where: str = "evaluation",
    ) -> None:
        self.num_classes = num_classes
        self._where = where
        self._visible = visible
        self._extra: dict[str, Array] = {}
        if prior is not None:
            self._extra["prior"] = _checked_prior(prior, num_classes, where)
        if confusable is not None:
            if len(confusable) != num_classes:
                raise UserError(
                    f"{where}: {len(confusable)} confusable groups for {num_classes} classes"
                )
            self._extra["confusable"] = scores.confusable_groups(tuple(confusable))
        self._pending: list[dict[str, Tensor]] = []
        self._chunks: list[dict[str, Array]] = []

    def update(
        self,
        log_probs: Tensor,
        labels: Tensor,
        shares: Tensor,
        object_ids: Tensor,
        image_ids: Tensor,
    ) -> None:
        """Add K objects; those with the label -1 are not scored.

        Args:
            log_probs: (K, C), any floating type, any device.
            labels: (K,) int64, -1 where withheld.
            shares: (K,) box area / image area.
            object_ids: (K,) int64, unique in the dataset.
            image_ids: (K,) int64.
        """
        expected = (len(labels), self.num_classes)
        if tuple(log_probs.shape) != expected:
            raise ValueError(f"log_probs: {tuple(log_probs.shape)}, expected {expected}")
        batch = {
            # A copy: a compiled model may write its next output over this one.
            "log_probs": log_probs.detach().to(torch.float32, copy=True),
            "labels": labels.detach().clone(),
            "shares": shares.detach().to(torch.float32, copy=True),
            "object_ids": object_ids.detach().clone(),
            "image_ids": image_ids.detach().clone(),
        }
        if odd := {
            name: tuple(part.shape) for name, part in batch.items() if len(part) != len(labels)
        }:
            raise ValueError(f"{len(labels)} labels, but {odd}")
        self._pending.append(batch)
        if sum(len(part["labels"]) for part in self._pending) >= _FLUSH_AT:
            self._flush()

    def take(self, decoded: Tensor, batch: Mapping[str, Tensor]) -> None:
        """Add the hidden objects of a batch (docs/batch.md) by their log-probabilities (K, C)."""
        hidden = batch["hidden"]
        self.update(
            decoded,
            batch["labels"][hidden],
            batch["shares"][hidden],
            batch["object_ids"][hidden],
            batch["image_ids"][batch["image_of"][hidden]],
        )

    def gather(self, group: dist.ProcessGroup | None = None) -> None:
        """Merge what all ranks collected, so that each holds the union; alone, does nothing.

        Every rank must call it. accelerate sets torch.distributed up, so this is all it needs.
        """
        self._chunks = gathered(self._merged(), group)

    def records(self) -> dict[str, Array]:
        """Arrays as `predictions.npz` holds them, in order of object id.

        Raises:
            UserError: Nothing was scored, or something is wrong with it; the message says what.
        """
        records = {**self._merged(), **self._extra}
        if self._visible is not None:
            records["visible"] = self._visible(records["image_ids"])
        check(records, self._where)
        return records

    def compute(self) -> dict[str, float]:
        """Every metric by name, accuracies in 0..1; see `kd.metrics.classification.evaluate`."""
        return scores.evaluate(self.records())

    def save_predictions(self, path: str | Path) -> None:
        """Write the records as an .npz file: whole, or not at all.

        Raises:
            UserError: Nothing to write, or the folder cannot be written.
        """
        save_records(self.records(), Path(path))

    def _flush(self) -> None:
        if not self._pending:
            return
        names = self._pending[0]
        joined = {name: torch.cat([part[name] for part in self._pending]) for name in names}
        self._chunks.append({name: part.cpu().numpy() for name, part in joined.items()})
        self._pending = []

    def _merged(self) -> dict[str, Array]:
        """One chunk of all scored objects, each once, in order of id."""
        self._flush()
        if not self._chunks:
            empty = np.zeros(0, dtype=np.int64)
            chunk: dict[str, Array] = dict.fromkeys(REQUIRED, empty)
            chunk["log_probs"] = np.zeros((0, self.num_classes), dtype=np.float32)
            chunk["shares"] = np.zeros(0, dtype=np.float32)
            return chunk
        joined = {
            name: np.concatenate([chunk[name] for chunk in self._chunks]) for name in REQUIRED
        }
        labelled = np.flatnonzero(joined["labels"] != -1)
        _, first = np.unique(joined["object_ids"][labelled], return_index=True)
        merged = {name: part[labelled[first]] for name, part in joined.items()}
        self._chunks = [merged]
        return merged


def _checked_prior(
    prior: Tensor | Array | Sequence[float], num_classes: int, where: str
) -> NDArray[np.float64]:
    given = prior.detach().cpu().numpy() if isinstance(prior, Tensor) else prior
    array = np.asarray(given, dtype=np.float64)
    if array.shape != (num_classes,):
        raise UserError(f"{where}: prior is {array.shape}, there are {num_classes} classes")
    if not (np.isfinite(array).all() and (array >= 0).all() and array.sum() > 0):
        raise UserError(f"{where}: prior must be shares of classes: none negative, not all zero")
    floored = np.maximum(array / array.sum(), _PRIOR_FLOOR)
    return np.asarray(floored / floored.sum(), dtype=np.float64)
