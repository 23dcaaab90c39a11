"""From a recipe's sections to the objects they describe; only here is a config unpacked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from numpy.typing import NDArray
from torch import nn

from kd.config.recipes import AnyData, Data, Gaze, LabelMaps, Model, TaskSection
from kd.data.loader import SampleLoader, Samples, build_loader
from kd.errors import UserError
from kd.problems import TASKS
from kd.problems.base import Task
from kd.problems.detection.data import DetectionDataset
from kd.problems.detection.task import Detection
from kd.problems.objects.data import Dataset, open_objects
from kd.problems.saliency.data import open_fixations
from kd.problems.saliency.task import Saliency
from kd.problems.segmentation.data import SegmentationDataset, open_maps
from kd.problems.segmentation.task import Segmentation
from kd.registry import build, check_options, check_problem, look_up
from kd.runs.transfer_trunk import TRANSFERRED, take_trunk
from kd.utils.malloc import keep_freed_memory
from students import STUDENTS
from teachers import TEACHERS

# The data that tasks are for; all others are about objects.
_NEEDS: dict[Any, type[Data] | type[LabelMaps] | type[Gaze]] = {
    Segmentation: LabelMaps,
    Saliency: Gaze,
}
_ABOUT: dict[type, str] = {
    Data: "objects with boxes", LabelMaps: "label maps", Gaze: "fixations of people",
}  # fmt: skip
_SUCH: dict[type, str] = {Data: "scenes", LabelMaps: "scenes_maps", Gaze: "scenes_gaze"}


def make_loader(
    dataset: Samples,
    accelerator: Accelerator,
    *,
    batch_size: int,
    workers: int,
    seed: int = 0,
    train: bool = False,
) -> SampleLoader:
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


def check_kind(section: TaskSection, data: AnyData) -> None:
    """Refuse an unknown task, or one that is for data of another kind.

    Raises:
        UserError: Naming the kinds.
    """
    needs = _NEEDS.get(look_up(TASKS, section.name, what="task"), Data)
    if not isinstance(data, needs):
        raise UserError(
            f"data {data.name}: has {_ABOUT[type(data)]}; task {section.name} is for "
            f"{_ABOUT[needs]}, such as --data {_SUCH[needs]}"
        )


def build_task(
    section: TaskSection,
    data: AnyData,
    num_classes: int,
    prior: NDArray[np.float64] | None = None,
    shares: Mapping[str, NDArray[np.float64]] | None = None,
    *,
    model: nn.Module | None = None,
) -> Task:
    """The task of a recipe, told the data's number of classes, hidden shape and class shares.

    A teacher that reads scenes as tokens says itself what it wants of the pictures.

    Raises:
        UserError: An unknown task or option, or data of the other kind.
    """
    check_kind(section, data)
    builder = TASKS[section.name]
    known: dict[str, Any] = {"num_classes": num_classes}
    if isinstance(data, Data):
        known["shape"] = data.shape
    for name in ("pictures", "levels", "loss_units"):  # what some models say of themselves
        if model is not None and hasattr(model, name):
            known[name] = getattr(model, name)
    known |= dict.fromkeys(("prior", "pixel_shares", "image_shares"))
    counted = {**(shares or {}), **({} if prior is None else {"prior": prior})}
    known |= {name: tuple(values.tolist()) for name, values in counted.items()}
    fields = {field.name for field in dataclasses.fields(builder)}
    given = {name: value for name, value in known.items() if name in fields}
    check_options(builder, section.options, what=f"task {section.name!r}", given=given)
    task: Task = builder(**given, **section.options)
    return task


def segmentation_task(section: TaskSection, data: SegmentationDataset) -> Task:
    """The task of a training on label maps; pixels are counted where classes have weights."""
    shares = data.shares() if section.options.get("class_weights") else None
    return build_task(section, data.section, data.num_classes, shares=shares)


def build_teacher(model: Model, num_classes: int) -> nn.Module:
    """A teacher of the catalogue, at random weights or those its options name.

    One for saliency has no classes, and is not told how many there are.
    """
    teacher: nn.Module = build(
        TEACHERS, model.name, model.options, what="teacher", num_classes=num_classes
    )
    return teacher


def build_student(model: Model, prior: NDArray[np.float64], *, context: bool = True) -> nn.Module:
    """A student of objects by name; `options` are those of its builder.

    A student `transferred` has the trunk of a teacher's run, see `kd.runs.transfer_trunk`.
    """
    options = {**model.options, **({} if context else {"context": False})}
    given: dict[str, Any] = {"num_classes": len(prior), "prior": prior.tolist()}
    if model.name == TRANSFERRED:
        given["trunk"], options = take_trunk(model.model_copy(update={"options": options}))
        given |= dict.fromkeys(("weights", "stride"))
    return _student(model.name, "objects", options, **given)


def _student(name: str, problem: str, options: Mapping[str, Any], **given: Any) -> nn.Module:
    check_problem(STUDENTS, name, problem, what="student")
    student: nn.Module = build(STUDENTS, name, options, what="student", **given)
    return student


def build_segmenter(model: Model, num_classes: int) -> nn.Module:
    """A segmentation network of the catalogue.

    Raises:
        UserError: Another name, wrong options.
    """
    return _student(model.name, "segmentation", model.options, num_classes=num_classes)


def build_saliency(model: Model, *, branches: str | None = None) -> nn.Module:
    """A saliency student of the catalogue.

    Args:
        model: Name and options.
        branches: "a" or "b", whatever the options say: A is the plain variant beside B.

    Raises:
        UserError: Another name, wrong options.
    """
    options = {**model.options, **({} if branches is None else {"branches": branches})}
    return _student(model.name, "saliency", options)


def build_detector(
    model: Model,
    num_classes: int,
    prior: NDArray[np.float64] | None = None,
    *,
    context: bool = True,
) -> nn.Module:
    """A detector of the catalogue.

    Args:
        model: Name and options.
        num_classes: C.
        prior: Share of each class, for a context head, (C,).
        context: Whether it may have one; without, whatever the options say, it is the bare network.

    Raises:
        UserError: Another name, wrong options.
    """
    options = {**model.options, **({} if context else {"context": False})}
    given: dict[str, Any] = {"num_classes": num_classes}
    if prior is not None and options.get("context") and "prior" not in options:
        given["prior"] = prior.tolist()
    return _student(model.name, "detection", options, **given)


def open_data(section: AnyData, task: str | None = None) -> Dataset:
    """Open a data set of any kind.

    Args:
        section: Objects, label maps or gaze.
        task: Name of what is asked; detectors see objects otherwise than those who hide them.

    Raises:
        UserError: What `open_objects`, `open_maps` and `open_fixations` raise.
    """
    if isinstance(section, LabelMaps):
        return open_maps(section)
    if isinstance(section, Gaze):
        return open_fixations(section)
    objects = open_objects(section)
    return DetectionDataset(objects) if TASKS.get(task or "") is Detection else objects


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
