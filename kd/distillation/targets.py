"""Soft targets: outputs of teachers that run in each step, or that were computed before.

All are callables from a batch to named tensors; `posterior` holds log-probabilities (K, C), a row
for each object. The engine cannot tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from kd.distillation.hooks import FeatureTaps
from kd.distillation.registry import MEAN, POSTERIOR
from kd.errors import UserError
from kd.problems.base import KNOWN, Batch, Rows, Task, named
from kd.storage.fields import PREFIX, CachedField


class SoftTargetSource(Protocol):
    """A batch to the teacher's named outputs."""

    def __call__(self, batch: Batch, rows: Rows) -> Mapping[str, Tensor]:
        """Targets of a batch; `rows` is what the student's rows are about."""
        ...


@runtime_checkable
class PartialSource(Protocol):
    """A source that may lack targets of some rows."""

    def known(self, rows: Rows) -> dict[str, Tensor]:
        """By unit, `known` or `NAME.known`, the rows that have a posterior: bool (R,)."""
        ...


def known_counts(source: object, rows: Rows) -> dict[str, Tensor]:
    """How many rows have a posterior, by unit, where some may lack one."""
    if not isinstance(source, PartialSource) or not rows.partial:
        return {}
    return {unit: known.sum().float() for unit, known in source.known(rows).items()}


class LiveTeacher:
    """Runs a teacher in each step, on the very batch the student sees.

    Args:
        model: The teacher; it is frozen and put in evaluation mode.
        task: The teacher's: its inputs, and how its outputs are decoded.
        layers: Layers whose features are needed.
        autocast: Whether it runs in bfloat16.
        posterior: Whether posteriors of hidden objects are needed.
        called: What messages call it.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        layers: Sequence[str] = (),
        *,
        autocast: bool = False,
        posterior: bool = True,
        called: str = "teacher",
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.task = task
        self._taps = FeatureTaps(model, layers, called=called) if layers else None
        self._autocast, self._posterior = autocast, posterior

    def __enter__(self) -> LiveTeacher:
        return self

    def __exit__(self, *_: object) -> None:
        """Take the hooks off the model."""
        if self._taps is not None:
            self._taps.remove()

    def __call__(self, batch: Batch, rows: Rows | None = None) -> Mapping[str, Tensor]:
        """Outputs by name, `posterior` (R, C), features of layers (R, ...); rows are its task's."""
        device = batch["images"].device.type
        with torch.autocast(device, torch.bfloat16, enabled=self._autocast):
            output = self.model(*self.task.inputs(batch))
        outputs = named(output)
        features = self._taps.collect() if self._taps else {}
        given = {name: tensor.float() for name, tensor in (outputs | features).items()}
        if self._posterior:
            given[POSTERIOR] = self.task.decode(outputs, batch)
        return given


class Teachers:
    """More than one teacher: the first one's outputs by their names, the others' as `NAME.output`.

    `mean.posterior` and `mean.logits`, where all give them in one shape, are the weighted mean of
    logits; a posterior's is normalised again.

    Args:
        first: The recipe's `teacher`; None where no term reads it.
        more: The further ones by name.
        weights: Of each in the mean, the first one's first; they need not add up to 1.
    """

    def __init__(
        self,
        first: SoftTargetSource | None,
        more: Mapping[str, SoftTargetSource],
        weights: Sequence[float],
    ) -> None:
        self.sources = ({} if first is None else {"": first}) | dict(more)
        if len(weights) != len(self.sources):
            raise UserError(f"{len(self.sources)} teachers have {len(weights)} weights")
        self.fractions = [weight / sum(weights) for weight in weights]

    def __call__(self, batch: Batch, rows: Rows) -> Mapping[str, Tensor]:
        """All outputs of each, and the means."""
        every = [source(batch, rows) for source in self.sources.values()]
        found: dict[str, Tensor] = {}
        for name, given in zip(self.sources, every, strict=True):
            found |= {_called(name, output): tensor for output, tensor in given.items()}
        for output in (POSTERIOR, "logits"):
            sides = [given[output] for given in every if output in given]
            if len({side.shape for side in sides}) == 1 and len(sides) == len(every):
                mean = torch.stack([s * w for s, w in zip(sides, self.fractions, strict=True)]).sum(
                    0
                )
                normal = mean.log_softmax(dim=1) if output == POSTERIOR else mean
                found[f"{MEAN}.{output}"] = normal
        return found

    def known(self, rows: Rows) -> dict[str, Tensor]:
        """Of each by its name; the mean has the rows that all of them have."""
        found: dict[str, Tensor] = {}
        for name, source in self.sources.items():
            if isinstance(source, PartialSource):
                found |= {_called(name, unit): known for unit, known in source.known(rows).items()}
        if len(found) == len(self.sources):
            found[_called(MEAN, KNOWN)] = torch.stack(list(found.values())).all(dim=0)
        return found


def _called(teacher: str, output: str) -> str:
    """A teacher's output by its full name."""
    return f"{teacher}.{output}" if teacher else output


class CachedPosteriors:
    """Posteriors by annotation id, computed once; costs a step a look-up.

    They belong to the object, not to pixels, so that geometric augmentation does not spoil them.

    Args:
        object_ids: Annotation ids, int64 (K,).
        log_probs: Log-probabilities, (K, C), kept in their type.
        source: What messages call them.
    """

    def __init__(
        self, object_ids: Tensor, log_probs: Tensor, *, source: str = "posteriors"
    ) -> None:
        if not len(object_ids):
            raise UserError(f"{source}: no object has a posterior")
        order = object_ids.argsort()
        self.object_ids = object_ids[order].contiguous()
        self.log_probs = log_probs[order].contiguous()
        self.source = source

    def __call__(self, batch: Batch, rows: Rows) -> Mapping[str, Tensor]:
        """`posterior`, (R, C).

        Where no object is hidden some may have no posterior (too small for the teacher, say): their
        rows are NaN.

        Raises:
            UserError: A hidden object that was not there when the posteriors were computed.
        """
        wanted, places = self._places(rows)
        log_probs = self.log_probs[places].float()
        if rows.partial:
            unknown = self.object_ids[places] != wanted
            return {POSTERIOR: log_probs.masked_fill(unknown[:, None], math.nan)}
        if wanted.device.type == "cpu":  # on a GPU the comparison would wait for the device
            self._check(wanted, places)
        return {POSTERIOR: log_probs}

    def known(self, rows: Rows) -> dict[str, Tensor]:
        """Which rows have a posterior."""
        wanted, places = self._places(rows)
        return {KNOWN: self.object_ids[places] == wanted}

    def _places(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Ids of the rows, and where they are or would be."""
        if rows.ids is None:
            raise UserError(f"{self.source}: are of objects, and this task has none")
        wanted = rows.ids
        if self.object_ids.device != wanted.device:
            self.object_ids = self.object_ids.to(wanted.device)
            self.log_probs = self.log_probs.to(wanted.device)
        places = torch.searchsorted(self.object_ids, wanted)
        return wanted, places.clamp(max=len(self.object_ids) - 1)

    def _check(self, wanted: Tensor, places: Tensor) -> None:
        missing = wanted[self.object_ids[places] != wanted]
        if len(missing):
            raise UserError(
                f"{self.source}: no posterior for {len(missing)} objects, first annotation "
                f"{int(missing[0])}; the data set is another than the one they were made for"
            )

    def check_covers(self, object_ids: Tensor) -> None:
        """Refuse posteriors that lack one of these objects."""
        places = torch.searchsorted(self.object_ids, object_ids)
        self._check(object_ids, places.clamp(max=len(self.object_ids) - 1))

    def check_knows(self, object_ids: Tensor) -> None:
        """Refuse posteriors of none of these objects."""
        if not torch.isin(object_ids, self.object_ids).any():
            raise UserError(
                f"{self.source}: no posterior for any object; the data set is another than the one "
                "they were made for"
            )

    def shuffled(self, seed: int) -> CachedPosteriors:
        """The control: each posterior given to another object, at random."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.object_ids), generator=generator)
        # A cycle through a random order leaves nobody with its own.
        shuffled = torch.empty_like(self.log_probs)
        shuffled[order] = self.log_probs[order.roll(1)]
        return CachedPosteriors(
            self.object_ids, shuffled, source=f"{self.source} (shuffled, seed {seed})"
        )

    def balanced(self, share: float) -> CachedPosteriors:
        """Posteriors with part of their own mean taken out: `q / mean(q)^share`, normalised.

        Rare classes then weigh more in what a student learns (Menon et al., 2021,
        https://arxiv.org/abs/2007.07314, after the fact). 0 changes nothing.
        """
        log_probs = self.log_probs.float()
        mean = log_probs.exp().mean(dim=0).clamp(min=1e-6).log()
        moved = (log_probs - share * mean).log_softmax(dim=1)
        moved = moved.to(self.log_probs.dtype)
        return CachedPosteriors(self.object_ids, moved, source=self.source)

    @classmethod
    def read(cls, kept: CachedField) -> CachedPosteriors:
        """All posteriors of a cache, into memory."""
        ids, log_probs = torch.from_numpy(kept.store.ids()), kept.whole()
        return cls(ids, log_probs, source=kept.store.url)


class CachedTeacher:
    """Outputs computed before training: posteriors from memory, maps that come with the batch.

    Args:
        posteriors: Of all objects; None where there are none.
        layers: Names of the maps.
        prefix: Of their names in the batch.
    """

    def __init__(
        self,
        posteriors: CachedPosteriors | None,
        layers: Sequence[str] = (),
        *,
        prefix: str = PREFIX,
    ) -> None:
        self.posteriors, self.layers, self.prefix = posteriors, tuple(layers), prefix

    def __call__(self, batch: Batch, rows: Rows) -> Mapping[str, Tensor]:
        """`posterior` (R, C) and the maps, with a row for each input of the teacher."""
        maps = {name: batch[f"{self.prefix}{name}"].float() for name in self.layers}
        return maps if self.posteriors is None else {**self.posteriors(batch, rows), **maps}

    def known(self, rows: Rows) -> dict[str, Tensor]:
        """Which rows have a posterior."""
        return {} if self.posteriors is None else self.posteriors.known(rows)
