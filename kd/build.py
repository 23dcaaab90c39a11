"""From a recipe's sections to the objects they describe; only here is a config unpacked."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from numpy.typing import NDArray
from torch import nn

from kd.catalog import build, check_options, look_up
from kd.config import Data, Model, TaskSection
from kd.data.class_maps import ClassMaps
from kd.data.coco import CocoIndex, check_images_decode, load_coco
from kd.data.dataset import SceneDataset
from kd.data.loader import SceneLoader, build_loader
from kd.data.scenes import categories, generate_scenes
from kd.data.stored import StoredField
from kd.errors import UserError
from kd.memory import keep_freed_memory
from kd.tasks import TASKS
from kd.tasks.base import Task
from kd.transferred import TRANSFERRED, take_trunk
from students import CLASSIFIERS
from students.classifiers import build_student as any_student
from teachers import TEACHERS

_log = logging.getLogger(__name__)
# Where data sets made here, and the small real one, are looked for below the working folder.
DATASETS = Path("datasets")
# Images of a split that are all decoded before training starts: two seconds for so many.
DECODED_FIRST = 2000


@dataclass(frozen=True)
class OpenData:
    """Both splits of a data set, opened."""

    section: Data
    train: CocoIndex
    val: CocoIndex

    @property
    def num_classes(self) -> int:
        """C."""
        return self.train.num_classes

    def prior(self, images: Collection[int] | None = None) -> NDArray[np.float64]:
        """Class shares, (C,), from `train_counts` with one added to each."""
        counts = self.train_counts(images) + 1.0
        return np.asarray(counts / counts.sum(), dtype=np.float64)

    def train_counts(self, images: Collection[int] | None = None) -> NDArray[np.int64]:
        """Usable train objects of each class, (C,), on the images with these ids or on all."""
        rows = make_dataset(self, "train", train=False, only=images).usable_rows()
        return np.bincount(self.train.labels[rows], minlength=self.num_classes)

    def shares(self, images: Collection[int] | None = None) -> dict[str, NDArray[np.float64]]:
        """How common each class is among the train pictures, for the weights of classes.

        Args:
            images: Only those with these ids.

        Returns:
            `pixel_shares` (1 + C,): of the pictures' area, background first, which has what the
            segments leave and at least 1 %; where they overlap both count. `image_shares` (C,): of
            the pictures, those with the class.
        """
        index, classes = self.train, self.num_classes
        owners = np.repeat(np.arange(len(index)), np.diff(index.first))
        taken = np.arange(len(index))
        if images is not None:
            taken = np.flatnonzero(np.isin(index.image_ids, np.asarray(list(images))))
        kept = np.isin(owners, taken)
        owners, labels = owners[kept], index.labels[kept].astype(np.int64)
        pictures = index.heights.astype(np.float64) * index.widths
        areas = np.bincount(labels, index.areas[kept] / pictures[owners], classes) / len(taken)
        shown = np.unique(np.stack([owners, labels]), axis=1)[1]
        return {
            "pixel_shares": np.concatenate([[max(0.01, 1 - areas.sum())], areas]),
            "image_shares": np.bincount(shown, minlength=classes) / len(taken),
        }

    def ceiling(self, split: Literal["train", "val"] = "val") -> dict[str, NDArray[Any]] | None:
        """Exact posteriors of the embedded scenes, None for other data."""
        index = self.train if split == "train" else self.val
        file = index.annotation_file.with_name(f"posteriors_{split}.npz")
        if self.section.generate is None or not file.is_file():
            return None
        with np.load(file) as stored:
            return {name: stored[name] for name in stored.files}


def open_data(section: Data) -> OpenData:
    """Open a data set; the embedded scenes are made where they are not there yet.

    Raises:
        UserError: What `load_coco` and `generate_scenes` raise, or no root.
    """
    root = _root(section)
    if section.generate is not None:
        made = section.generate
        generate_scenes(
            root, train=made.train, val=made.val, size=made.size, seed=made.seed,
            workers=os.cpu_count() or 1, progress=True,
        )  # fmt: skip
    train = load_coco(
        root / section.train.annotations, root / section.train.images, check_images=section.pictures
    )
    val = load_coco(
        root / section.val.annotations, root / section.val.images,
        check_images=section.pictures, categories_from=train,
    )  # fmt: skip
    if section.generate is None and section.pictures:  # what was made here is whole
        for index in (train, val):
            _check_decode(index)
    return OpenData(section, train, val)


def class_names(section: Data) -> tuple[str, ...]:
    """The class names of a data set, without its images.

    Raises:
        UserError: It is not there.
    """
    if section.generate is not None:
        return tuple(entry["name"] for entry in categories())
    root = _root(section)
    annotations, images = root / section.train.annotations, root / section.train.images
    return load_coco(annotations, images, check_images=False).class_names


def _check_decode(index: CocoIndex) -> None:
    """Decode every image of a small data set now, rather than stop in the middle of training."""
    if len(index) > DECODED_FIRST:
        return
    if broken := check_images_decode(index):
        more = f"\n... and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise UserError("\n".join(broken[:5]) + more)


def _root(section: Data) -> Path:
    if section.root is not None:
        return Path(os.path.expandvars(section.root)).expanduser()
    if section.generate is not None:
        made = section.generate
        return DATASETS / f"scenes-{made.size}px-{made.train}-{made.val}-seed{made.seed}"
    tried = [Path(os.environ["KD_DATA"])] if "KD_DATA" in os.environ else []
    tried += [DATASETS, Path("../shared/data")]
    for folder in tried:
        if (folder / section.name / section.train.annotations).is_file():
            return folder / section.name
    raise UserError(
        f"data set {section.name}: not found in {', '.join(map(str, tried))}; name its folder with "
        "--set data.root=DIR"
    )


def make_dataset(
    data: OpenData,
    split: Literal["train", "val"],
    *,
    train: bool,
    mode: Literal["one", "all"] = "all",
    labelled: Collection[int] | None = None,
    only: Collection[int] | None = None,
    seed: int = 0,
    epochs: int = 1,
    stored: Sequence[StoredField] = (),
    class_maps: bool = False,
) -> SceneDataset:
    """A split as samples."""
    section = data.section
    partial = section.partial
    index = data.train if split == "train" else data.val
    return SceneDataset(
        index,
        size=section.size,
        mode=mode,
        train=train,
        augment=section.augment,
        min_share=section.min_share,
        max_share=section.max_share,
        shape=section.shape,
        withhold=(section.withhold.start, section.withhold.end) if section.withhold else None,
        pictures=section.pictures,
        partial=(partial.start, partial.until) if partial and train else None,
        labelled=labelled,
        repeat_labelled=section.repeat_labelled if labelled is not None else 1,
        only=only,
        seed=seed,
        epochs=epochs,
        prepared=Path(section.prepared) / split if section.prepared else None,
        stored=stored,
        class_maps=ClassMaps(index, section.size) if class_maps else None,
    )


def make_loader(
    dataset: SceneDataset,
    accelerator: Accelerator,
    *,
    batch_size: int,
    workers: int,
    seed: int = 0,
    train: bool = False,
) -> SceneLoader:
    """Batches of this process: its slice of each whole batch."""
    return build_loader(
        dataset,
        batch_size=batch_size,
        seed=seed,
        shuffle=train,
        workers=workers,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        drop_last=train and len(dataset) > batch_size,
    )


def build_task(
    section: TaskSection,
    data: Data,
    num_classes: int,
    prior: NDArray[np.float64] | None = None,
    shares: Mapping[str, NDArray[np.float64]] | None = None,
    *,
    model: nn.Module | None = None,
) -> Task:
    """The task of a recipe, told the data's number of classes, hidden shape and class shares.

    A teacher that reads scenes as tokens says itself what it wants of the pictures.
    """
    builder = look_up(TASKS, section.name, what="task")
    known: dict[str, Any] = {"num_classes": num_classes, "shape": data.shape}
    if model is not None and hasattr(model, "pictures"):
        known["pictures"] = model.pictures
    known |= dict.fromkeys(("prior", "pixel_shares", "image_shares"))
    counted = {**(shares or {}), **({} if prior is None else {"prior": prior})}
    known |= {name: tuple(values.tolist()) for name, values in counted.items()}
    fields = {field.name for field in dataclasses.fields(builder)}
    given = {name: value for name, value in known.items() if name in fields}
    check_options(builder, section.options, what=f"task {section.name!r}", given=given)
    task: Task = builder(**given, **section.options)
    return task


def build_teacher(model: Model, num_classes: int) -> nn.Module:
    """A teacher of the catalogue, at random weights or those its options name."""
    return build(TEACHERS, model.name, model.options, what="teacher", num_classes=num_classes)


def build_student(model: Model, prior: NDArray[np.float64], *, context: bool = True) -> nn.Module:
    """A student classifier; `options` as `students.classifiers.build_student` lists them.

    A student `transferred` has the trunk of a teacher's run, see `kd.transferred`.
    """
    options = {**model.options, **({} if context else {"context": False})}
    given: dict[str, Any] = {"num_classes": len(prior), "prior": prior.tolist()}
    given |= {"trunk": None}
    if model.name in CLASSIFIERS:
        return build(CLASSIFIERS, model.name, options, what="student", **given)
    filled = {"name", *given}
    if model.name == TRANSFERRED:
        given["trunk"], options = take_trunk(model.model_copy(update={"options": options}))
        filled |= {"weights", "stride"}
    check_options(any_student, options, what=f"student {model.name!r}", given=filled)
    return any_student(model.name, **given, **options)


def native_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16; elsewhere autocast is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in checks)


def make_accelerator(precision: str) -> Accelerator:
    """Devices, processes and precision."""
    cpu = not torch.cuda.is_available()
    if cpu:
        keep_freed_memory()
    device = torch.device("cpu" if cpu else "cuda")
    bf16 = precision == "bf16" or (precision == "auto" and native_bf16(device))
    mixed = "bf16" if bf16 else "no"
    # accelerate keeps the first precision of a process for good; commands that share a process
    # (the demo's) may differ in it.
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed:
        AcceleratorState._reset_state()
    return Accelerator(cpu=cpu, mixed_precision=mixed)
