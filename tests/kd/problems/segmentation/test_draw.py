"""Overlays of val images: only the images drawn are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from kd.distillation.student import AdaptedStudent
from kd.problems.results import Predictor
from kd.problems.segmentation.data import SegmentationDataset, SegmentationSamples, open_maps
from kd.problems.segmentation.evaluation import SegmentationResults
from kd.problems.segmentation.schema import SegmentationSection
from kd.problems.segmentation.task import Segmentation
from kd.runs.build import make_accelerator

CLASSES, IMAGES = 11, 6


@pytest.fixture
def data(tmp_path: Path) -> SegmentationDataset:
    for split in ("train", "val"):
        for folder, shape in ((split, (24, 32, 3)), (f"{split}annot", (24, 32))):
            (tmp_path / folder).mkdir()
            for number in range(IMAGES):
                pixels = np.full(shape, number, np.uint8)
                Image.fromarray(pixels).save(tmp_path / folder / f"{number}.png")
    values = {"root": str(tmp_path), "layout": "camvid", "crop": (24, 32), "workers": 0}
    return open_maps(SegmentationSection.model_validate(values))


class Brightness(nn.Module):
    """Says of the image of number n that it is class n."""

    def forward(self, images: Tensor) -> Tensor:
        grey = images[:, :1] * 0.229 * 255 + 0.485 * 255
        classes = torch.arange(CLASSES).view(1, -1, 1, 1)
        return -(grey - classes).square()


def test_each_image_is_asked_about_alone(
    data: SegmentationDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[int] = []
    sizes = SegmentationSamples.file_sizes

    def counted(samples: SegmentationSamples) -> list[tuple[int, int]]:
        looked_at.append(len(samples))
        return sizes(samples)

    monkeypatch.setattr(SegmentationSamples, "file_sizes", counted)
    model = AdaptedStudent(Brightness())
    asked = {"model": Predictor(model, Segmentation(num_classes=CLASSES), None)}
    accelerator = make_accelerator("fp32")
    figures = list(SegmentationResults().draw(data, asked, {}, count=3, accelerator=accelerator))
    titles = [[axes.get_title() for axes in figure.axes] for figure in figures]
    assert titles == [["image", "truth", "model, 100 % right"]] * 3
    assert looked_at == [1, 1, 1]
