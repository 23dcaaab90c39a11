"""CenterNet as a student: from random weights to the boxes of the pictures that it has seen."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_iou

import students
from kd.catalog import build
from kd.losses.center_targets import center_targets
from kd.losses.centernet import WEIGHTS, centernet_losses
from kd.nn.centernet import decode_centers


@pytest.mark.slow
def test_a_few_steps_learn_two_pictures_by_heart() -> None:
    options = {"trunk": "shufflenet_v2_x0_5", "widths": (32, 32, 32), "hidden": 32}
    model = build(students.STUDENTS, "centernet", options, what="student", num_classes=2)
    boxes = torch.tensor(
        [[6.0, 8.0, 30.0, 28.0], [36.0, 20.0, 60.0, 60.0], [10.0, 4.0, 50.0, 60.0]]
    )
    labels, image_of = torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1])
    images = torch.zeros(3, 3, 64, 64)  # nothing is on the last
    for image, label, (x1, y1, x2, y2) in zip(image_of, labels, boxes.int().tolist(), strict=True):
        images[image, label, y1:y2, x1:x2] = 1.0
    targets = center_targets(boxes, labels, image_of, 3, 2, (16, 16), 4)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        losses = centernet_losses(model(images), targets)
        total = torch.stack([WEIGHTS[name] * loss for name, loss in losses.items()]).sum()
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
    found = decode_centers(model(images)).by_image(0.5)
    for image, one in enumerate(found):
        own = image_of == image
        assert sorted(one["labels"].tolist()) == labels[own].tolist()
        if own.any():
            overlaps = box_iou(boxes[own], one["boxes"]).amax(dim=1)
            assert overlaps.min() > 0.8
