"""Soft targets: outputs of teachers that run in each step, or that were cached before training.

Each source maps a batch to named tensors, so that the training loop treats live and cached teachers
alike. The tensor `posterior` has the class log-probabilities of each object, (K, C).
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
    """A callable that returns a teacher's outputs for a batch, by name."""

    def __call__(self, batch: Batch, rows: Rows) -> Mapping[str, Tensor]:
        """Return the teacher's outputs; `rows` describes the rows of the student's outputs."""
        ...


@runtime_checkable
class PartialSource(Protocol):
    """A source that may lack the posteriors of some rows."""

    def known(self, rows: Rows) -> dict[str, Tensor]:
        """Return whether each row has a posterior, bool (R,).

        The key is the unit of these rows: `known`, or `NAME.known` for a teacher of
        `more_teachers`.
        """
        ...


def known_counts(source: object, rows: Rows) -> dict[str, Tensor]:
    """Return the number of rows that have a posterior, by unit; empty if every row has one."""
    if not isinstance(source, PartialSource) or not rows.partial:
        return {}
    return {unit: known.sum().float() for unit, known in source.known(rows).items()}


class LiveTeacher:
    """Run a teacher in each step, on the student's batch.

    Args:
        model: The teacher, which is frozen and put in evaluation mode.
        task: The teacher's task, which prepares the inputs and decodes the posterior.
        layers: Layers to collect.
        autocast: Whether the teacher runs in bfloat16 autocast.
        posterior: Whether posteriors of hidden objects are decoded.
        called: Name of the teacher in error messages.
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
        """Remove the hooks from the model."""
        if self._taps is not None:
            self._taps.remove()

    def __call__(self, batch: Batch, rows: Rows | None = None) -> Mapping[str, Tensor]:
        """Return the teacher's outputs and features (R, ...) and its `posterior` (R, C) by name."""
        device = batch["images"].device.type
        with torch.autocast(device, torch.bfloat16, enabled=self._autocast):
            outputs = named(self.model(*self.task.inputs(batch)))
        features = self._taps.collect() if self._taps else {}
        given = {name: tensor.float() for name, tensor in (outputs | features).items()}
        if self._posterior:
            given[POSTERIOR] = self.task.decode(outputs, batch)
        return given


class Teachers:
    """Combine the outputs of several teachers.

    Outputs of the recipe's `teacher` keep their names; an output of a teacher of `more_teachers` is
    called `NAME.output`. If all teachers have posteriors or logits of the same shape, weighted
    means are added as `mean.posterior` (mean log-probabilities, renormalised) and `mean.logits`.

    Args:
        first: The recipe's main `teacher`; None if no term reads it.
        more: The other teachers by name.
        weights: Weights in the means, in the order of the teachers; they need not sum to 1.
    """

    def __init__(
        self,
        first: SoftTargetSource | None,
        more: Mapping[str, SoftTargetSource],
        weights: Sequence[float],
    ) -> None:
        self.sources = ({} if first is None else {"": first}) | dict(more)
        if len(weights) != len(self.sources):
            raise UserError(f"got {len(weights)} weights for {len(self.sources)} teachers")
        self.fractions = [weight / sum(weights) for weight in weights]

    def __call__(self, batch: Batch, rows: Rows) -> Mapping[str, Tensor]:
        every = [source(batch, rows) for source in self.sources.values()]
        found: dict[str, Tensor] = {}
        for name, given in zip(self.sources, every, strict=True):
            found |= {_full_name(name, output): tensor for output, tensor in given.items()}
        for output in (POSTERIOR, "logits"):
            sides = [given[output] for given in every if output in given]
            if len({side.shape for side in sides}) == 1 and len(sides) == len(every):
                parts = [side * part for side, part in zip(sides, self.fractions, strict=True)]
                mean = torch.stack(parts).sum(0)
                found[f"{MEAN}.{output}"] = mean.log_softmax(1) if output == POSTERIOR else mean
        return found

    def known(self, rows: Rows) -> dict[str, Tensor]:
        """Return by unit whether each row has a posterior, bool (R,); the mean needs them all."""
        found: dict[str, Tensor] = {}
        for name, source in self.sources.items():
            if isinstance(source, PartialSource):
                found |= {
                    _full_name(name, unit): known for unit, known in source.known(rows).items()
                }
        if len(found) == len(self.sources):
            found[_full_name(MEAN, KNOWN)] = torch.stack(list(found.values())).all(dim=0)
        return found


def _full_name(teacher: str, output: str) -> str:
    return f"{teacher}.{output}" if teacher else output


class CachedPosteriors:
    """Cached posteriors of objects, looked up by annotation id.

    Args:
        object_ids: Annotation ids, int64 (K,).
        log_probs: Log-probabilities of these objects, (K, C), stored in their dtype.
        source: Where the posteriors come from, as a prefix of error messages.
    """

    def __init__(
        self, object_ids: Tensor, log_probs: Tensor, *, source: str = "posteriors"
    ) -> None:
        if not len(object_ids):
            raise UserError(f"{source}: no posterior is cached")
        order = object_ids.argsort()
        self.object_ids = object_ids[order].contiguous()
        self.log_probs = log_probs[order].contiguous()
        self.source = source

    def __call__(self, batch: Batch, rows: Rows) -> Mapping[str, Tensor]:
        """Return `posterior`, (R, C).

        If the student sees all objects at once, rows of objects without a posterior (for example,
        objects too small for the teacher) are NaN. If objects are hidden, a missing posterior is a
        UserError, checked on a CPU only.
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
        wanted, places = self._places(rows)
        return {KNOWN: self.object_ids[places] == wanted}

    def _places(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return the rows' annotation ids, and their cache indices (arbitrary for missing ids)."""
        if rows.ids is None:
            raise UserError(
                f"{self.source}: has posteriors of objects, but this task's batches have no objects"
            )
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
                f"{self.source}: {len(missing)} objects have no posterior, such as annotation "
                f"{int(missing[0])}; the cache is of another dataset"
            )

    def check_covers(self, object_ids: Tensor) -> None:
        """Raise a UserError if one of these objects has no posterior."""
        places = torch.searchsorted(self.object_ids, object_ids)
        self._check(object_ids, places.clamp(max=len(self.object_ids) - 1))

    def check_knows(self, object_ids: Tensor) -> None:
        """Raise a UserError if none of these objects has a posterior."""
        if not torch.isin(object_ids, self.object_ids).any():
            raise UserError(
                f"{self.source}: no object has a posterior; the cache is of another dataset"
            )

    def shuffled(self, seed: int) -> CachedPosteriors:
        """Return a copy in which each posterior is assigned to another object, as a control."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.object_ids), generator=generator)
        # A cycle through a random order assigns no posterior to its object.
        shuffled = torch.empty_like(self.log_probs)
        shuffled[order] = self.log_probs[order.roll(1)]
        return CachedPosteriors(
            self.object_ids, shuffled, source=f"{self.source} (shuffled, seed {seed})"
        )

    def balanced(self, fraction: float) -> CachedPosteriors:
        """Return a copy divided by a power of the mean posterior: `q / mean(q)^fraction`.

        The quotient is renormalised. Rare classes become more probable: post-hoc logit adjustment,
        Menon et al., 2021, https://arxiv.org/abs/2007.07314. A `fraction` of 0 changes nothing.
        """
        log_probs = self.log_probs.float()
        mean = log_probs.exp().mean(dim=0).clamp(min=1e-6).log()
        balanced = (log_probs - fraction * mean).log_softmax(dim=1).to(self.log_probs.dtype)
        return CachedPosteriors(self.object_ids, balanced, source=self.source)

    @classmethod
    def read(cls, cached: CachedField) -> CachedPosteriors:
        """Read all posteriors of a cache into memory."""
        ids = torch.from_numpy(cached.store.ids())
        return cls(ids, cached.whole(), source=cached.store.url)


class CachedTeacher:
    """A source of cached outputs: posteriors in memory, and maps that are loaded with the batch.

    Args:
        posteriors: The cached posteriors; None if no term reads them.
        layers: Names of the cached maps.
        prefix: Prefix of the maps' keys in the batch.
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
        """Return `posterior` (R, C), and maps (R, ...) with one row per teacher input."""
        maps = {name: batch[f"{self.prefix}{name}"].float() for name in self.layers}
        return maps if self.posteriors is None else {**self.posteriors(batch, rows), **maps}

    def known(self, rows: Rows) -> dict[str, Tensor]:
        return {} if self.posteriors is None else self.posteriors.known(rows)
