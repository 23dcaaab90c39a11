"""Load a trained model from its run or from one file, and predict images of any size."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor, nn

from kd.data.loader import Sample, collate, to_device
from kd.engine.checkpoint import read_metadata, save_model
from kd.errors import UserError
from kd.formats.splits import image_files
from kd.problems import problem_of_task
from kd.problems.base import Task, named
from kd.problems.inference import Inference, InputImage, Prediction, read_input
from kd.problems.recipes import teacher_recipe
from kd.runs.folder import class_names, model_metadata
from kd.runs.load_student import load_network, student_recipe
from kd.runs.load_teacher import load_teacher
from kd.runs.read import DistillRuns, Run, is_distill, read_distill, results_hint

Source: TypeAlias = str | Path | Image | NDArray[np.uint8] | Tensor


@dataclass(frozen=True)
class TrainedModel:
    """A trained student or teacher with its classes and preprocessing; `kd.load` returns it.

    Attributes:
        model: The network, in evaluation mode.
        task: Prepares the network's inputs and decodes its outputs.
        inference: Converts images to samples and decoded outputs to predictions.
        config: The recipe of the run; for a student also `variant` and `seed`.
        where: The file that the weights were loaded from.
    """

    model: nn.Module
    task: Task
    inference: Inference
    config: Mapping[str, Any]
    where: Path

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the outputs."""
        return self.inference.class_names

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        tensor: Tensor = next(iter(self.model.state_dict().values()))
        return tensor.device

    def to(self, device: str | torch.device) -> Self:
        """Move the network to a device."""
        self.model.to(device)
        return self

    def predict(
        self, images: Source | Sequence[Source], boxes: Any = None, *, batch_size: int = 16
    ) -> Any:
        """Predict one image, several, or all images of a folder.

        Args:
            images: Path of an image or of a folder of images, a PIL image, an array (H, W, 3) or a
                tensor (3, H, W) of uint8 RGB, or a list of these.
            boxes: For models that classify objects in given boxes: (K, 4) xyxy in pixels of the
                image, or a list with the boxes of each image.
            batch_size: Images in one pass of the network.

        Returns:
            A `Prediction` for one image, otherwise a list of them in order; the images of a folder
            are sorted by name.

        Raises:
            UserError: An image cannot be read, boxes are missing or outside of their image, or a
                prediction is not finite.
        """
        if isinstance(images, str | Path) and Path(images).is_dir():
            images = list(image_files(Path(images)))
        if isinstance(images, Sequence) and not isinstance(images, str):
            if boxes is not None and len(boxes) != len(images):
                raise UserError(f"boxes of {len(boxes)} images for {len(images)} images")
            each = [None] * len(images) if boxes is None else boxes
            return list(self.stream(zip(images, each, strict=True), batch_size=batch_size))
        return next(self.stream([(images, boxes)]))

    def stream(
        self, images: Iterable[tuple[Source, Any]], *, batch_size: int = 16
    ) -> Iterator[Prediction]:
        """Predict pairs of an image and its boxes (or None) one after the other; see `predict`."""
        read = (self._read(number, *pair) for number, pair in enumerate(images))
        pending: deque[_Pending] = deque()
        batch: list[tuple[_Pending, Sample]] = []
        for image in read:
            samples = self.inference.samples(image)
            pending.append(_Pending(image, len(samples)))
            for sample in samples:
                if batch and not self._fits(batch, pending[-1], sample, batch_size):
                    self._run(batch)
                batch.append((pending[-1], sample))
            yield from self._finished(pending)
        if batch:
            self._run(batch)
        yield from self._finished(pending)

    def _fits(
        self, batch: list[tuple[_Pending, Sample]], entry: _Pending, sample: Sample, most: int
    ) -> bool:
        first, one = batch[0]
        same = sample["images"].shape == one["images"].shape
        if self.inference.one_size:
            same = same and entry.image.size == first.image.size
        return same and len(batch) < most

    @torch.no_grad()  # not inference_mode: constants that are cached here may be trained with later
    def _run(self, batch: list[tuple[_Pending, Sample]]) -> None:
        """Predict the batch, give each image its rows, and empty the batch."""
        joined = to_device(
            collate([sample for _, sample in batch]), self.device, channels_last=False
        )
        output = named(self.model(*self.task.inputs(joined)))
        decoded = self.task.decode(output, joined).cpu()
        if decoded.is_floating_point() and decoded.isnan().any():
            raise UserError(f"{self.where}: its predictions are NaN; the weights are broken")
        rows = decoded.split([self.inference.rows(sample) for _, sample in batch])
        for (entry, _), part in zip(batch, rows, strict=True):
            entry.parts.append(part)
        batch.clear()

    def _finished(self, pending: deque[_Pending]) -> Iterator[Prediction]:
        while pending and len(pending[0].parts) == pending[0].samples:
            entry = pending.popleft()
            yield self.inference.prediction(torch.cat(entry.parts), entry.image)

    def _read(self, number: int, source: Source, boxes: Any) -> InputImage:
        if isinstance(source, str | Path):
            where, image = str(source), read_input(Path(source), self.inference.long_side)
        else:
            where = f"image {number}"
            pixels = _pixels(source, where)
            image = InputImage(pixels, (int(pixels.shape[1]), int(pixels.shape[2])))
        checked = self.inference.check_boxes(boxes, image.size, where)
        return InputImage(image.pixels, image.size, checked)

    def save(self, file: str | Path) -> Path:
        """Write weights, classes and preprocessing to one safetensors file for `kd.load`."""
        path = Path(file)
        save_model(path, self.model, model_metadata(self.config, self.class_names))
        return path


@dataclass(eq=False)
class _Pending:
    """An image whose samples have not all been predicted."""

    image: InputImage
    samples: int
    parts: list[Tensor] = field(default_factory=list)


def _pixels(source: Image | NDArray[np.uint8] | Tensor, where: str) -> Tensor:
    """Convert an image to (3, H, W) uint8."""
    if isinstance(source, Image):
        source = np.array(source.convert("RGB"))
    if isinstance(source, np.ndarray):
        if source.ndim != 3 or source.shape[2] != 3 or source.dtype != np.uint8:
            raise UserError(
                f"{where}: an array must be (H, W, 3) uint8 RGB, got {source.shape} {source.dtype}"
            )
        return torch.from_numpy(source).permute(2, 0, 1).contiguous()
    if not isinstance(source, Tensor):
        raise UserError(
            f"{where}: expected a path, PIL image, array or tensor, got {type(source).__name__}"
        )
    if source.ndim != 3 or source.shape[0] != 3 or source.dtype != torch.uint8:
        raise UserError(
            f"{where}: a tensor must be (3, H, W) uint8 RGB, got {tuple(source.shape)} "
            f"{str(source.dtype).removeprefix('torch.')}"
        )
    return source.cpu()


def load(
    run: str | Path, *, variant: str | None = None, seed: int | None = None,
    device: str | torch.device | None = None,
) -> TrainedModel:  # fmt: skip
    """Load a trained model, without its dataset and without its teacher.

    Args:
        run: Folder of a distillation, of one variant or of a teacher; or a file that
            `TrainedModel.save` or a run has written (`model.safetensors`).
        variant: Variant of a distillation; by default `distilled`.
        seed: Seed of a distillation; by default that with the best val score, in the first metric
            of the table.
        device: Where the model runs; by default the GPU if there is one, otherwise the CPU.

    Raises:
        UserError: There is no such run, variant or seed, or the run is not finished.
    """
    path = Path(run)
    if is_distill(path):
        path = _chosen(path, variant, seed)
    elif variant is not None or seed is not None:
        raise UserError(f"{path}: one run; only a distillation has variants and seeds to choose")
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file}: no such file; is the run finished?{results_hint(path)}")
    config, names = _described(file)
    if "variant" in config:
        recipe = student_recipe(config, file)
        model = load_network(file, recipe, config["variant"], len(names))
        problem = problem_of_task(recipe.task.name)
        task = problem.task(recipe.task, recipe.data, len(names), model=model)
        section, name = recipe.data, recipe.task.name
    else:
        own = teacher_recipe(config, file)
        trained = load_teacher(file, len(names), recipe=own)
        model, task, problem = trained.model, trained.task, trained.problem
        section, name = own.data, own.task.name
    inference = problem.inference(name, section, names)
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return TrainedModel(
        model.eval().requires_grad_(False).to(chosen), task, inference, config, file
    )


def _described(file: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Config and class names in a model's file; names in `classes.json` beside it replace these."""
    metadata = read_metadata(file)
    try:
        config: dict[str, Any] = json.loads(metadata["config"])
        names = tuple(json.loads(metadata["classes"]))
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{file}: not a model of this version of kd (its metadata have no {error})"
        ) from error
    return config, class_names(file.parent) or names


def best_run(runs: DistillRuns, variant: str | None = None) -> Run:
    """Choose the seed of a variant with the best val score, in the first metric of the table.

    The default variant is `distilled`, or if there is none the first that is not `plain`.
    """
    if variant is None:
        others = [name for name in runs.variants if name != "plain"]
        variant = "distilled" if "distilled" in others else next(iter(others), "plain")
    metric = runs.results.metric(runs.results.rows[0])
    sign = 1 if metric.higher_is_better else -1

    def score(run: Run) -> float:
        value = runs.results.value(run.records, metric.name)
        return -math.inf if value is None else sign * value

    return max(runs.variants[variant], key=score)


def _chosen(folder: Path, variant: str | None, seed: int | None) -> Path:
    """Folder of a distillation's variant and seed."""
    runs = read_distill(folder, None if variant is None else [variant])
    best = best_run(runs, variant)
    if seed is None:
        return best.folder
    if seed not in runs.seeds:
        known = ", ".join(map(str, runs.seeds))
        raise UserError(f"{folder}: no finished seed {seed}; there are {known}")
    return folder / f"seed{seed}" / best.name


def grey_sample(model: TrainedModel) -> Sample:
    """Sample of a grey image with two boxes, if the model needs boxes."""
    side = model.inference.long_side or 128
    image = torch.full((3, side, side), 128, dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0.0, side / 2, side / 2], [side / 4, side / 4, side, side]])
    given = InputImage(image, (side, side), boxes if model.inference.needs_boxes else None)
    return model.inference.samples(given)[0]
