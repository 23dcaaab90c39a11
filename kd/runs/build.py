"""Build datasets, loaders and devices from a recipe's sections."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from kd.config.datasets import DatasetSection
from kd.config.recipes import Model
from kd.data.loader import SampleLoader, Samples
from kd.errors import UserError
from kd.problems import problem_of_data, problem_of_task, spec_of_task
from kd.problems.base import Dataset
from kd.utils.malloc import keep_freed_memory


def make_loader(
    dataset: Samples,
    accelerator: Accelerator,
    *,
    batch_size: int,
    workers: int,
    seed: int = 0,
    train: bool = False,
) -> SampleLoader:
    """Build this process's loader, which yields its part of each batch.

    `batch_size` counts samples over all processes. `workers=0` loads in the main process. `train`
    shuffles the samples and drops an incomplete last batch.
    """
    return SampleLoader(
        dataset, batch_size=batch_size, seed=seed, shuffle=train, workers=workers,
        rank=accelerator.process_index, world=accelerator.num_processes,
        drop_last=train and len(dataset) > batch_size,
    )  # fmt: skip


def open_data(section: DatasetSection, task: str | None = None) -> Dataset:
    """Open a dataset for `task`, or for the first problem with this kind of data if None."""
    if task is not None:
        check_kind(task, section)
    problem = problem_of_data(section) if task is None else problem_of_task(task)
    data: Dataset = problem.open(section)
    return data


def check_kind(task: str, section: DatasetSection) -> None:
    """Raise a UserError if the task is unknown, or if it is for another kind of data."""
    spec = spec_of_task(task)
    if not isinstance(section, spec.data):
        raise UserError(
            f"data {section.name}: has {problem_of_data(section).spec.help}; task {task} is for "
            f"{spec.help}, such as --data {spec.example}"
        )


def without_weights(section: Model, **replaced: object) -> Model:
    """Return a model's config without initial weights, with the options in `replaced` changed.

    A trained run's weights are loaded afterwards, and the initial weights may no longer exist.
    Options that the model does not have are ignored.
    """
    replaced |= {"weights": None, "file": None}
    options = {key: replaced.get(key, value) for key, value in section.options.items()}
    return section.model_copy(update={"options": options})


def native_bf16(device: torch.device) -> bool:
    """Return whether the hardware multiplies bfloat16; if not, autocast would be slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in checks)


def make_accelerator(precision: str) -> Accelerator:
    """Set up devices, processes and precision; `precision` is auto, bf16 or fp32."""
    cpu = not torch.cuda.is_available()
    if cpu:
        keep_freed_memory()
    device = torch.device("cpu" if cpu else "cuda")
    bf16 = precision == "bf16" or (precision == "auto" and native_bf16(device))
    mixed = "bf16" if bf16 else "no"
    # accelerate fixes a process's precision at its first call; the demo's commands share a process.
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed:
        AcceleratorState._reset_state()
    return Accelerator(cpu=cpu, mixed_precision=mixed)
