"""A teacher's outputs computed once and kept: made, gone on with, mended, refused.

One store for each output, so that a later recipe that wants fewer or more of them finds what is
there. All outputs that lack are made in one pass over the images.
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
from torch import Tensor

from kd.data.loader import build_loader, collate, to_device
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
    """What is to be kept.

    Args:
        outputs: `posterior`, what else the teacher gives by name, or its layers.
        split: Of the dataset.
        out_of_fold: Posteriors of each image by the fold model that did not train on it; layers and
            the rest are always the teacher's own.
        dtype: Of the numbers.
        top_k: Keep only so many of the most likely classes of posteriors and logits; 0 = all.
        mirrored: Also show the mirrored image, and keep what is said of it but for posteriors:
            a flipped sample then gets that, where else its map would only be mirrored.
        location: Folder or URL of the stores; the teacher's run folder where not given.
        int8: Compute posteriors in 8-bit integers, on a CPU; layers cannot be had then.
        size: Long side at which the teacher sees images of label maps or gaze; None: as in its
            training.
    """

    outputs: Sequence[str] = (POSTERIOR,)
    split: Literal["train", "val"] = "train"
    out_of_fold: bool = False
    dtype: Literal["float16", "float32"] = "float16"
    top_k: int = 0
    mirrored: bool = False
    location: str | None = None
    int8: bool = False
    size: int | None = None

    @property
    def settings(self) -> str:
        """What a recipe must say to mean this cache."""
        names = ("out_of_fold", "dtype", "top_k", "mirrored", "int8", "size")
        said = {**{name: getattr(self, name) for name in names}, "cache": self.location}
        return " ".join(f"--set soft_targets.{name}={json.dumps(said[name])}" for name in said)


def open_cache(
    teacher: TrainedTeacher, data: Dataset, accelerator: Accelerator, options: CacheOptions
) -> dict[str, CachedField]:
    """The outputs by name, read from where they are kept; what lacks is computed now.

    Raises:
        UserError: A cache of another teacher, dataset or transform; a teacher without folds; a
            layer that it has not; an output that is not finite.
    """
    if options.int8 and tuple(options.outputs) != (POSTERIOR,):
        raise UserError("int8: posteriors only; keep layers in float32, in a cache of their own")
    shown = data.problem.teacher_view(teacher, data, options.split, size=options.size)
    alone = [name for name in options.outputs if name != POSTERIOR or not options.out_of_fold]
    found: dict[str, CachedField] = {}
    if len(alone) < len(options.outputs):
        models = fold_models(teacher, data.num_classes)
        found |= _Cache(teacher, models, shown, accelerator, options).open([POSTERIOR])
    if alone:
        found |= _Cache(teacher, [teacher.model], shown, accelerator, options).open(alone)
    return found


@dataclass
class _Cache:
    """Stores that the same models fill, each with its own images."""

    teacher: TrainedTeacher
    models: Sequence[torch.nn.Module]
    shown: TeacherView
    accelerator: Accelerator
    options: CacheOptions

    def __post_init__(self) -> None:
        self.samples, self.grid = self.shown.samples(), self.shown.grid
        ids = self.shown.image_ids
        folds = fold_of(ids, len(self.models)) if len(self.models) > 1 else np.zeros(len(ids))
        self.images = [ids[folds == number] for number in range(len(self.models))]

    def open(self, outputs: Sequence[str]) -> dict[str, CachedField]:
        """The outputs, complete."""
        stores = {name: Store(self._place(name)) for name in outputs}
        with _together():
            if self.accelerator.is_main_process:
                self._prepare(stores)
        with _together():
            self._fill(stores)
        return {
            name: CachedField(store, name, channels=self.shown.data.num_classes)
            for name, store in stores.items()
        }

    def about(self, output: str) -> dict[str, Any]:
        """All that the stored numbers follow from."""
        return {
            "out_of_fold": len(self.models) > 1,
            "teacher": self._weights,
            "output": output,
            **self._shown_about,
            "precision": "int8" if self.options.int8 else "bf16" if self._autocast else "fp32",
            "dtype": self.options.dtype,
            "top_k": self._top_k(output),
            "mirrored": self.mirrored(output),
        }

    @cached_property
    def _weights(self) -> str:
        """A hash of all models; large ones take a while."""
        hashes = "".join(weights_hash(model, str(model)) for model in self.models)
        return hashlib.sha256(hashes.encode()).hexdigest()[:16]

    def _top_k(self, output: str) -> int:
        """How many classes are kept; layers are kept whole."""
        return 0 if layers_among([output], self.teacher.task) else self.options.top_k

    @property
    def _autocast(self) -> bool:
        return bool(self.accelerator.mixed_precision == "bf16")

    @cached_property
    def _shown_about(self) -> dict[str, str]:
        """What the numbers follow from beside the teacher; its hash takes a while."""
        return self.shown.provenance

    def mirrored(self, output: str) -> bool:
        """Whether the mirrored image's is kept too."""
        return self.options.mirrored and output != POSTERIOR

    def _place(self, output: str) -> str:
        """Where it is kept: told apart by its key where nobody named the place."""
        name = f"{self.shown.data.section.name}-{self.options.split}-{output}"
        name = re.sub(r"[^\w.-]+", "_", name).lstrip(".")
        if self.options.location is not None:
            return f"{self.options.location.rstrip('/')}/{name}"
        text = json.dumps(self.about(output), sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        return str(self.teacher.folder / "cache" / f"{name}-{key}")

    def _prepare(self, stores: Mapping[str, Store]) -> None:
        """Refuse what does not belong here, remove what is damaged, start what is new."""
        new = []
        for output, store in stores.items():
            if store.manifest() is None:
                new.append(output)
                continue
            store.check_about(self.about(output))
            for name in store.remove_corrupt():
                _log.warning("%s/%s: damaged; it is rebuilt", store.url, name)
        if not new:
            return
        # Outputs of one pass have the same images in a shard, so that processes can share them out.
        each = min(MOST_IMAGES, max(1, int(SHARD_BYTES / max(self._image_bytes(stores, new)))))
        shards = sum(math.ceil(len(part) / each) for part in self.images)
        for output in new:
            stores[output].create(self.about(output), shards, images_per_shard=each)
            _log.info("%s of %s is computed once, then kept in %s", output, self.teacher.folder,
                      stores[output].url)  # fmt: skip

    def _image_bytes(self, stores: Mapping[str, Store], outputs: Sequence[str]) -> list[float]:
        """Bytes that an image takes on average, of each output; found on one image."""
        device = self.accelerator.device
        with self._asked(self.models[0], layers_among(outputs, self.teacher.task), outputs) as live:
            self.models[0].to(device)
            with torch.no_grad():
                batch = to_device(collate([self.samples[0, 0]]), device, channels_last=False)
                given = in_one_shape(live(batch), self.grid, self.teacher.task)
        objects = self.shown.records_per_image
        each = [self._writer(name, stores[name]).record_bytes(given) for name in outputs]
        sides = [2 if self.mirrored(name) else 1 for name in outputs]
        return [objects * count * size for count, size in zip(sides, each, strict=True)]

    def _writer(self, output: str, store: Store) -> ShardWriter:
        return ShardWriter(output, store, self.shown, self.options.dtype, self._top_k(output))

    def _fill(self, stores: dict[str, Store]) -> None:
        """Compute this process's part of the shards that lack."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        writers = []
        for name, store in stores.items():
            writer = self._writer(name, store)
            lacking = [number for number in store.missing() if number % world == rank]
            writer.expect(self.images, lacking)
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
        model: torch.nn.Module,
        images: NDArray[np.int64],
        writers: Sequence[ShardWriter],
        done: int,
        advance: Any,
    ) -> int:
        """One model over its images; how many are done then."""
        device = self.accelerator.device
        loader = build_loader(
            self.shown.samples(images),
            batch_size=self.samples.together(IMAGES_A_BATCH),
            seed=0,
            shuffle=False,
            workers=self.shown.data.section.workers,
        )
        loader.set_epoch(0)
        outputs, task = [writer.name for writer in writers], self.teacher.task
        layers = layers_among(outputs, task)
        both = any(self.mirrored(writer.name) for writer in writers)
        if not layers:
            model = fast_teacher(model, self.teacher.task, self.samples, int8=self.options.int8)
        with self._asked(model.to(device), layers, outputs) as live:
            for batch in loader:
                moved = to_device(batch, device, channels_last=True)
                with torch.no_grad():
                    given = in_one_shape(live(moved), self.grid, task)
                    again = None
                    if both:
                        other = live(self.shown.mirrored(moved))
                        again = in_one_shape(other, self.grid, task)
                for writer in writers:
                    writer.take(batch, given, again if self.mirrored(writer.name) else None)
                done += len(batch["images"])
                advance(Progress(step=done), 0)
        return done

    def _asked(
        self, model: torch.nn.Module, layers: Sequence[str], outputs: Sequence[str]
    ) -> LiveTeacher:
        return LiveTeacher(
            model, self.teacher.task, layers, autocast=self._autocast,
            posterior=POSTERIOR in outputs, called=self.teacher.called,
        )  # fmt: skip


@contextmanager
def _together() -> Iterator[None]:
    """All processes wait for each other at the end; what one of them says, all raise.

    Raises:
        UserError: On all processes, the first one's.
    """
    said: list[str] = []
    try:
        yield
    except UserError as error:
        said = [str(error)]
    every = gather_object(said)
    if every:
        raise UserError(every[0])


def in_one_shape(
    given: Mapping[str, Tensor], grid: tuple[int, int] | None, task: Task
) -> Mapping[str, Tensor]:
    """Score maps of images of different sizes on one grid, so that they can be stored.

    Args:
        given: A teacher's outputs; layers are left out where there is a grid.
        grid: Of the result; None leaves all as it is.
        task: The teacher's.
    """
    if grid is None:
        return given
    return {
        name: F.interpolate(maps, grid, mode="bilinear", align_corners=False, antialias=True)
        for name, maps in given.items()
        if name in task.outputs
    }
