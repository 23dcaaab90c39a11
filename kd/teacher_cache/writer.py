"""Write teacher outputs to the shards of a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd.errors import UserError
from kd.problems.base import Batch, TeacherView
from kd.storage.fields import MIRRORED, top_k_log_probs
from kd.storage.store import IDS, Store

Rows = dict[str, NDArray[Any]]


class ShardWriter:
    """Collects one output and writes each shard once all its images have been added.

    Only the `top_k` largest channels are stored; 0 stores all.
    """

    def __init__(self, name: str, store: Store, view: TeacherView, dtype: str, top_k: int) -> None:
        self.name, self.store, self.view, self.top_k = name, store, view, top_k
        self.dtype = torch.float16 if dtype == "float16" else torch.float32
        self._shard_of: dict[int, int] = {}
        self._left: dict[int, int] = {}
        self._rows: dict[int, list[Rows]] = {}

    @property
    def images(self) -> set[int]:
        """Ids of the images that have not been added yet."""
        return set(self._shard_of)

    def expect(self, images: Sequence[NDArray[np.int64]], shards: Sequence[int]) -> None:
        """Set the shards to write; `images` are the store's image ids, grouped by model."""
        manifest = self.store.manifest()
        assert manifest is not None
        each = int(manifest["images_per_shard"])
        plan = [part[at : at + each] for part in images for at in range(0, len(part), each)]
        for number in shards:
            self._shard_of |= dict.fromkeys(plan[number].tolist(), number)
            self._left[number] = len(plan[number])

    def record_bytes(self, given: Mapping[str, Tensor]) -> int:
        """Compute the bytes of one stored record, given example outputs."""
        return sum(part[0].nbytes for part in self._compact(self._output(given)).values())

    def take(
        self,
        batch: Batch,
        given: Mapping[str, Tensor],
        mirrored: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add a batch, with outputs of the mirrored batch if these are stored.

        Raises:
            UserError: A value is not finite, or a shard cannot be written.
        """
        wanted = [self._shard_of.get(image, -1) for image in batch["image_ids"].tolist()]
        ids, images = (part.cpu().numpy() for part in self.view.records(batch))
        owners = np.asarray(wanted)[images]
        if (owners < 0).all():
            return
        compact = self._compact(self._output(given))
        if mirrored is not None:
            again = self._compact(self._output(mirrored))
            compact |= {f"{MIRRORED}{name}": part for name, part in again.items()}
        rows = {name: part.cpu().numpy() for name, part in compact.items()}
        for name in rows:
            if name.endswith("values"):
                self._check(rows[name], ids)
        for number in np.unique(owners[owners >= 0]).tolist():
            here = owners == number
            part = {IDS: ids[here], **{name: value[here] for name, value in rows.items()}}
            self._rows.setdefault(number, []).append(part)
        for number in wanted:
            if number >= 0:
                self._left[number] -= 1
                if not self._left[number]:
                    self._write(number)

    def _write(self, number: int) -> None:
        parts = self._rows.pop(number)
        self.store.write_shard(
            number, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        )

    def _output(self, given: Mapping[str, Tensor]) -> Tensor:
        if self.name not in given:
            raise UserError(
                f"the teacher has no output {self.name!r} to cache; it has: {', '.join(given)}"
            )
        return given[self.name]

    def _compact(self, output: Tensor) -> dict[str, Tensor]:
        if not self.top_k:
            return {"values": output.to(self.dtype)}
        if self.top_k >= output.shape[1]:
            raise UserError(
                f"top_k {self.top_k}: {self.name} has {output.shape[1]} channels; store fewer, or "
                "all with 0"
            )
        values, indices = top_k_log_probs(output, self.top_k)
        return {"values": values.to(self.dtype), "indices": indices}

    def _check(self, values: NDArray[Any], ids: NDArray[np.int64]) -> None:
        finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if not finite.all():
            raise UserError(
                f"{self.name} of {self.view.unit[:-1]} {ids[~finite][0]} is not finite as "
                f"{values.dtype}; store it as float32, or train the teacher again if that is not "
                "finite either"
            )
