"""Detections without loops over images are torchvision's, and their graphs take any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim
from torchvision.ops import batched_nms

from kd.config.recipes import Model
from kd.nn.detectors.contract import Detector
from kd.nn.detectors.suppression import suppress
from kd.problems import problem

SIZES = torch.tensor([[128, 128], [100, 128], [128, 90]])
FEW = {"candidates": [200, 100], "proposals": [100, 50], "hidden": 64, "least_score": 0.13}
DETECTORS: dict[str, dict[str, Any]] = {
    "centernet": {},
    "retinanet": {},
    "fcos": {"least_score": 0.05},
    "fasterrcnn": FEW,
    "fasterrcnn_c4": {**FEW, "levels": [4]},
    "fasterrcnn_context": {**FEW, "context": True},
}


def built(name: str) -> Detector:
    """A detector of 7 classes whose scores differ."""
    options = {"trunk": "resnet18", **DETECTORS[name]}
    model = (
        problem("detection")
        .build_student(Model(name=name.split("_")[0], options=options), 7)
        .eval()
    )
    assert isinstance(model, Detector)
    heads = ("cls_logits", "cls_score", "heatmap.2")
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "rpn" in path:  # probabilities of proposals that are all 1 would be ties
                continue
            if any(f"{head}.weight" in path for head in heads):
                parameter.normal_(std=0.02 if "cls_score" in path else 0.5)
            elif any(f"{head}.bias" in path for head in heads):
                parameter.zero_()
            elif "bbox_pred" in path:  # boxes differ, so that no IoU is the threshold itself
                parameter.normal_(std=0.1)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_exported_detections_are_those_of_torchvision(name: str) -> None:
    model, images = built(name), torch.randn(3, 3, 128, 128)
    with torch.no_grad():
        expected = model(images, SIZES)["detections"]
        model.exported = True
        found = model(images, SIZES)["detections"]
    assert (expected[..., 4] > 0).sum() > 5
    # Equal scores may come in another order.
    torch.testing.assert_close(found[..., 4], expected[..., 4], atol=1e-6, rtol=0)
    same = (found - expected).abs().amax(dim=2) < 1e-3
    assert same.float().mean() > 0.98


class Graph(torch.nn.Module):
    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, sizes: Tensor) -> Tensor:
        detections: Tensor = self.model(images, sizes)["detections"]
        return detections


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`create_unbacked_symint`:FutureWarning")  # of torchvision
@pytest.mark.parametrize("name", DETECTORS)
def test_a_graph_traced_with_two_images_takes_three(name: str) -> None:
    model, images = built(name), torch.randn(3, 3, 128, 128)
    model.exported = True
    count = Dim("images")
    program = torch.export.export(
        Graph(model).eval(), (images[:2], SIZES[:2]), dynamic_shapes=({0: count}, {0: count})
    )
    with torch.no_grad():
        expected = model(images, SIZES)["detections"]
    torch.testing.assert_close(program.module()(images, SIZES), expected)


def test_suppression_is_batched_nms_of_each_image() -> None:
    corners = torch.rand(2, 60, 2) * 80
    boxes = torch.cat([corners, corners + 5 + torch.rand(2, 60, 2) * 30], dim=2)
    scores, groups = torch.rand(2, 60), torch.randint(3, (2, 60))
    values, rows = suppress(boxes, scores, groups, overlap=0.4, least=0.2, top=100)
    for image in range(2):
        some = (scores[image] > 0.2).nonzero()[:, 0]
        kept = some[batched_nms(boxes[image][some], scores[image][some], groups[image][some], 0.4)]
        count = int((values[image] >= 0).sum())
        assert count == len(kept) and torch.equal(rows[image][:count], kept)
        assert (values[image][count:] == -1).all()


def test_nothing_is_left_of_scores_that_are_too_low() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 4.0, 4.0], [1.0, 1.0, 5.0, 5.0]]])
    values, _ = suppress(
        boxes, torch.full((1, 2), 0.1), torch.zeros(1, 2).long(), overlap=0.5, least=0.2, top=5
    )
    assert values.tolist() == [[-1.0, -1.0]]
