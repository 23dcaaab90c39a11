"""Cache teacher outputs: compute, resume, repair and check their stores.

Each output has a separate store, so that recipes with different outputs can share them. All missing
outputs are computed in one pass over the images.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor, nn

from kd.data.loader import SampleLoader, collate, to_device
from kd.distillation.registry import POSTERIOR
from kd.distillation.targets import LiveTeacher
from kd.distillation.terms import layers_among
from kd.engine.checkpoint import Progress
from kd.engine.progress import ProgressBar
from kd.errors import UserError
from kd.formats.splits import fold_of
from kd.nn.weights import weights_hash
from kd.problems.base import Dataset, Task, TeacherView
from kd.runs.load_teacher import TrainedTeacher, fast_teacher, fold_models
from kd.storage.fields import CachedField
from kd.storage.store import Store
from kd.teacher_cache.writer import ShardWriter

_log = logging.getLogger("kd")
IMAGES_A_BATCH = 16
SHARD_BYTES = 64 << 20
MOST_IMAGES = 4096


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Which teacher outputs to cache, and how."""

    outputs: Sequence[str] = (POSTERIOR,)  # names of outputs or layers
    split: Literal["train", "val"] = "train"
    # Predict posteriors with the fold model that was not trained on the image. Other outputs always
    # come from the teacher itself.
    out_of_fold: bool = False
    dtype: Literal["float16", "float32"] = "float16"
    top_k: int = 0  # number of most probable classes to store of posteriors and logits; 0 for all
    mirrored: bool = False  # also store outputs of the mirrored image, except posteriors
    location: str | None = None  # folder or URL of the stores; default: in the teacher's run folder
    int8: bool = False  # compute posteriors in 8-bit integers on a CPU; no other outputs allowed
    # Long side of the teacher's input for label maps or saliency; None for its training size.
    size: int | None = None

    @property
    def settings(self) -> str:
        """Recipe settings that read this cache, for messages."""
        names = ("out_of_fold", "dtype", "top_k", "mirrored", "int8", "size")
        values = {**{name: getattr(self, name) for name in names}, "cache": self.location}
        return " ".join(f"--set soft_targets.{k}={json.dumps(v)}" for k, v in values.items())


def open_cache(
    teacher: TrainedTeacher, data: Dataset, accelerator: Accelerator, options: CacheOptions
) -> dict[str, CachedField]:
    """Open the stores of a teacher's outputs, by output name, and compute missing shards.

    Raises:
        UserError: The cache belongs to another teacher, dataset or transform; a layer or the fold
            models are missing; or an output is not finite.
    """
    if options.int8 and tuple(options.outputs) != (POSTERIOR,):
        raise UserError("int8: posteriors only; cache layers in float32, separately")
    view = data.problem.teacher_view(teacher, data, options.split, size=options.size)
    own = [name for name in options.outputs if name != POSTERIOR or not options.out_of_fold]
    found: dict[str, CachedField] = {}
    if len(own) < len(options.outputs):
        models = fold_models(teacher, data.num_classes)
        found |= _Cache(teacher, models, view, accelerator, options).open([POSTERIOR])
    if own:
        found |= _Cache(teacher, [teacher.model], view, accelerator, options).open(own)
    return found


@dataclass
class _Cache:
    """Stores filled by the same models; with folds, each model predicts its held-out images."""

    teacher: TrainedTeacher
    models: Sequence[nn.Module]
    view: TeacherView
    accelerator: Accelerator
    options: CacheOptions

    def __post_init__(self) -> None:
        self.samples, self.grid = self.view.samples(), self.view.grid
        ids = self.view.image_ids
        folds = fold_of(ids, len(self.models)) if len(self.models) > 1 else np.zeros(len(ids))
        self.images = [ids[folds == number] for number in range(len(self.models))]

    def open(self, outputs: Sequence[str]) -> dict[str, CachedField]:
        """Return the outputs after computing what is missing."""
        stores = {name: Store(self._place(name)) for name in outputs}
        with _together():
            if self.accelerator.is_main_process:
                self._prepare(stores)
        with _together():
            self._fill(stores)
        return {
            name: CachedField(store, name, channels=self.view.data.num_classes)
            for name, store in stores.items()
        }

    def about(self, output: str) -> dict[str, Any]:
        """Describe everything that determines the stored values."""
        return {
            "out_of_fold": len(self.models) > 1,
            "teacher": self._weights,
            "output": output,
            **self._provenance,
            "precision": "int8" if self.options.int8 else "bf16" if self._autocast else "fp32",
            "dtype": self.options.dtype,
            "top_k": self._top_k(output),
            "mirrored": self.mirrored(output),
        }

    @cached_property
    def _provenance(self) -> dict[str, str]:
        return self.view.provenance  # hashes; slow

    @cached_property
    def _weights(self) -> str:
        """Hash of all models' weights; slow for large models."""
        hashes = "".join(weights_hash(model, str(model)) for model in self.models)
        return hashlib.sha256(hashes.encode()).hexdigest()[:16]

    def _top_k(self, output: str) -> int:
        """Number of classes to store; layers are always stored completely."""
        return 0 if layers_among([output], self.teacher.task) else self.options.top_k

    @property
    def _autocast(self) -> bool:
        return bool(self.accelerator.mixed_precision == "bf16")

    def mirrored(self, output: str) -> bool:
        """Return True if outputs of the mirrored image are stored, too."""
        return self.options.mirrored and output != POSTERIOR

    def _place(self, output: str) -> str:
        """Location of a store; a default name includes a hash of `about`."""
        name = f"{self.view.data.section.name}-{self.options.split}-{output}"
        name = re.sub(r"[^\w.-]+", "_", name).lstrip(".")
        if self.options.location is not None:
            return f"{self.options.location.rstrip('/')}/{name}"
        text = json.dumps(self.about(output), sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        return str(self.teacher.folder / "cache" / f"{name}-{key}")

    def _prepare(self, stores: Mapping[str, Store]) -> None:
        """Check existing stores, remove corrupt shards and create new stores."""
        new = []
        for output, store in stores.items():
            if store.manifest() is None:
                new.append(output)
                continue
            store.check_about(self.about(output))
            for name in store.remove_corrupt():
                _log.warning("%s/%s: corrupt shard, rebuilding", store.url, name)
        if not new:
            return
        # All outputs have the same images per shard, so that processes can share the work.
        each = min(MOST_IMAGES, max(1, int(SHARD_BYTES / max(self._image_bytes(stores, new)))))
        shards = sum(math.ceil(len(part) / each) for part in self.images)
        for output in new:
            stores[output].create(self.about(output), shards, images_per_shard=each)
            url = stores[output].url
            _log.info("computing %s of %s, cached in %s", output, self.teacher.folder, url)

    def _image_bytes(self, stores: Mapping[str, Store], outputs: Sequence[str]) -> list[float]:
        """Measure the bytes per image of each output on one image."""
        device = self.accelerator.device
        with self._live(self.models[0], layers_among(outputs, self.teacher.task), outputs) as live:
            self.models[0].to(device)
            with torch.no_grad():
                batch = to_device(collate([self.samples[0, 0]]), device, channels_last=False)
                given = in_one_shape(live(batch), self.grid, self.teacher.task)
        objects = self.view.records_per_image
        each = [self._writer(name, stores[name]).record_bytes(given) for name in outputs]
        sides = [2 if self.mirrored(name) else 1 for name in outputs]
        return [objects * count * size for count, size in zip(sides, each, strict=True)]

    def _writer(self, output: str, store: Store) -> ShardWriter:
        return ShardWriter(output, store, self.view, self.options.dtype, self._top_k(output))

    def _fill(self, stores: dict[str, Store]) -> None:
        """Compute this process's part of the missing shards."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        writers = []
        for name, store in stores.items():
            writer = self._writer(name, store)
            own = [number for number in store.missing() if number % world == rank]
            writer.expect(self.images, own)
            writers.append(writer)
        needed = set().union(*(writer.images for writer in writers))
        if not needed:
            return
        label, done = f"{', '.join(stores)} of {self.teacher.folder.name}", 0
        with ProgressBar(label, len(needed), 0, enabled=rank == 0) as advance:
            for model, images in zip(self.models, self.images, strict=True):
                mine = images[np.isin(images, list(needed))]
                if len(mine):
                    done = self._run(model, mine, writers, done, advance)

    def _run(
        self,
        model: nn.Module,
        images: NDArray[np.int64],
        writers: Sequence[ShardWriter],
        done: int,
        advance: Any,
    ) -> int:
        """Run one model over its images; returns `done` plus the number of images."""
        device = self.accelerator.device
        loader = SampleLoader(
            self.view.samples(images), batch_size=self.samples.together(IMAGES_A_BATCH), seed=0,
            shuffle=False, workers=self.view.data.section.workers,
        )  # fmt: skip
        loader.set_epoch(0)
        outputs, task = [writer.name for writer in writers], self.teacher.task
        layers = layers_among(outputs, task)
        both = any(self.mirrored(writer.name) for writer in writers)
        if not layers:
            model = fast_teacher(model, self.teacher.task, self.samples, int8=self.options.int8)
        with self._live(model.to(device), layers, outputs) as live:
            for batch in loader:
                moved = to_device(batch, device, channels_last=True)
                with torch.no_grad():
                    given = in_one_shape(live(moved), self.grid, task)
                    mirrored = None
                    if both:
                        mirrored = in_one_shape(live(self.view.mirrored(moved)), self.grid, task)
                for writer in writers:
                    writer.take(batch, given, mirrored if self.mirrored(writer.name) else None)
                done += len(batch["images"])
                advance(Progress(step=done), 0)
        return done

    def _live(self, model: nn.Module, layers: Sequence[str], outputs: Sequence[str]) -> LiveTeacher:
        return LiveTeacher(
            model, self.teacher.task, layers, autocast=self._autocast,
            posterior=POSTERIOR in outputs, called=self.teacher.called,
        )  # fmt: skip


@contextmanager
def _together() -> Iterator[None]:
    """Wait for all processes on exit; if one raised a UserError, raise it on all of them."""
    messages: list[str] = []
    try:
        yield
    except UserError as error:
        messages = [str(error)]
    if messages := gather_object(messages):
        raise UserError(messages[0])


def in_one_shape(
    given: Mapping[str, Tensor], grid: tuple[int, int] | None, task: Task
) -> Mapping[str, Tensor]:
    """Resample score maps to one grid, so that images of different sizes can be stored together.

    With a grid, layers are dropped; without one, `given` is returned unchanged.
    """
    if grid is None:
        return given
    return {
        name: F.interpolate(maps, grid, mode="bilinear", align_corners=False, antialias=True)
        for name, maps in given.items()
        if name in task.outputs
    }
