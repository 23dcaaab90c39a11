"""Draw scenes with one object covered, beside each model's predictions for the object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from kd.data.loader import Sample, collate
from kd.problems.objects.data import ObjectsDataset
from kd.problems.results import Predictor, spread
from kd.report.class_bars import bars
from kd.report.style import GREY, ORANGE

_CROP_MARGIN = 0.15  # width of the margin around the drawn object, as a fraction of its longer side


def hidden_scene_figure(
    image: Tensor, box: Tensor | Sequence[float], truth: str, beliefs: Mapping[str, Tensor],
    names: Sequence[str], *, size: tuple[int, int] | None = None, top: int = 5,
) -> Figure:  # fmt: skip
    """Draw the scene with an object covered, the object itself, and each model's top classes.

    Args:
        image: (3, H, W) uint8, with the object visible.
        box: xyxy pixels of the hidden object.
        truth: The object's class name.
        beliefs: Model name -> class probabilities (C,), drawn as bars.
        names: C class names.
        size: Height and width of the image without padding; None: (H, W).
        top: Number of most probable classes to draw.
    """
    height, width = size or (int(image.shape[1]), int(image.shape[2]))
    pixels = image[:, :height, :width].permute(1, 2, 0).cpu().numpy()
    corners = [float(corner) for corner in box]
    figure = Figure(figsize=(6.0 + 2.5 * len(beliefs), 3.2), layout="constrained")
    ratios = [max(0.8, width / height) * 1.9, 1.2, *[1.9] * len(beliefs)]
    panels = figure.subplots(1, 2 + len(beliefs), squeeze=False, width_ratios=ratios)[0]
    _scene(panels[0], pixels, corners)
    _object(panels[1], pixels, corners, truth)
    known = {model: belief.detach().double().cpu().numpy() for model, belief in beliefs.items()}
    # All panels have the same scale, so that bars of different models can be compared.
    reach = max([0.05, *(float(belief.max()) for belief in known.values())])
    for axes, (model, belief) in zip(panels[2:], known.items(), strict=True):
        bars(axes, belief, names, top, truth=truth)
        verb = "expects" if model == "teacher" else "predicts"  # a student sees the object
        axes.set_title(f"the {model} {verb}", fontsize=9)
        axes.set_xlim(0, 122 * reach)
    return figure


def _scene(axes: Axes, pixels: NDArray[Any], corners: Sequence[float]) -> None:
    axes.imshow(pixels)
    x1, y1, x2, y2 = corners
    place, across, down = (x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1
    axes.add_patch(Rectangle(place, across, down, facecolor=GREY, edgecolor="none"))
    axes.add_patch(Rectangle(place, across, down, fill=False, edgecolor=ORANGE, linewidth=1.8))
    height, width = pixels.shape[:2]
    size = 100 * min(across / width, down / height)
    if size > 6:  # because a letter in a smaller box would cover the outline
        middle = ((x1 + x2 - 1) / 2, (y1 + y2 - 1) / 2)
        axes.text(*middle, "?", color="white", ha="center", va="center", fontsize=min(size, 26))
    axes.set_title("the scene, object hidden", fontsize=9)
    axes.set_anchor("N")
    axes.set_axis_off()


def _object(axes: Axes, pixels: NDArray[Any], corners: Sequence[float], truth: str) -> None:
    x1, y1, x2, y2 = corners
    margin = _CROP_MARGIN * max(x2 - x1, y2 - y1)
    left, above = (max(0, int(start - margin)) for start in (x1, y1))
    right, below = (int(np.ceil(end + margin)) for end in (x2, y2))
    axes.imshow(pixels[above : max(below, above + 1), left : max(right, left + 1)])
    axes.set_title(f"hidden: {truth}", fontsize=9, weight="bold")
    axes.set_anchor("N")
    axes.set_axis_off()


def hidden_scenes(
    predictors: Mapping[str, Predictor], data: ObjectsDataset, *, count: int,
    accelerator: Accelerator,
) -> Iterator[Figure]:  # fmt: skip
    """Draw up to `count` hidden val objects, sampled evenly from the split, one figure each."""
    dataset = data.samples("val")
    names = list(data.val.class_names)
    for place in spread(count, len(dataset)):
        sample = collate([dataset[0, place]])
        for name in ("hidden", "hide_fraction", "segments"):
            if name in sample:
                sample[name] = sample[name][:1]
        beliefs = {
            name: one(_resized(sample, one.size), accelerator).exp()
            for name, one in predictors.items()
        }
        row = int(sample["hidden"][0])
        yield hidden_scene_figure(
            sample["images"][0], sample["boxes"][row], names[int(sample["labels"][row])], beliefs,
            names, size=(int(sample["sizes"][0, 0]), int(sample["sizes"][0, 1])),
        )  # fmt: skip


def _resized(sample: Sample, size: int | tuple[int, int] | None) -> Sample:
    """Resize a batch of square images, and their boxes, to a side of `size` pixels."""
    images = sample["images"]
    if size is None or images.shape[-1] == size:
        return sample
    assert isinstance(size, int)
    small = F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True)
    boxes = sample["boxes"] * (size / images.shape[-1])
    return {**sample, "images": small.round().to(torch.uint8), "boxes": boxes}
