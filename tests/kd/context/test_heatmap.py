"""What is asked about regions, what is told of the rest, and how windows become a map."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kd.config.datasets import Split
from kd.config.recipes import Model, TaskSection, TeacherRecipe
from kd.context.heatmap import expect_classes, heat_maps, region_probabilities, spread
from kd.context.photo import Photograph
from kd.context.regions import Region, box_region, windows
from kd.problems.base import Batch
from kd.problems.objects.problem import PROBLEM
from kd.problems.objects.schema import ObjectsSection
from kd.runs.load_teacher import TrainedTeacher
from kd.utils.images import resize, scaled_size

CPU = torch.device("cpu")
SPLIT = Split(annotations="none.json", images="none")


def teacher(
    model: nn.Module | None = None, shape: Literal["box", "square"] = "box"
) -> TrainedTeacher:
    """A CNN at random weights that sees 32 pixels, or any model with its task."""
    data = ObjectsSection(name="none", train=SPLIT, val=SPLIT, size=32, shape=shape)
    name = Model(name="cnn", options={"width": 4, "downs": 2, "hidden": 8, "region": True})
    task = TaskSection(name="context", weights={})
    recipe = TeacherRecipe(data=data, task=task, teacher=name)
    model = (model or PROBLEM.build_teacher(name, 4)).eval()
    return TrainedTeacher(Path("."), recipe, model, PROBLEM.task(task, data, 4))


def photograph(
    size: tuple[int, int] = (48, 64), boxes: list[list[float]] | None = None,
    labels: list[int] | None = None,
) -> Photograph:  # fmt: skip
    pixels = torch.randint(256, (3, *size), dtype=torch.uint8)
    return Photograph(
        Path("a.jpg"),
        pixels,
        resize(pixels, scaled_size(*size, 32)),
        torch.tensor(boxes or []).reshape(-1, 4),
        torch.tensor(labels or [], dtype=torch.int64),
    )


class Company(nn.Module):
    """Names whatever class is told most; nothing told, class 0."""

    reads_labels = True

    def forward(self, labels: Tensor, image_of: Tensor, rows: Tensor) -> Tensor:
        counts = torch.tensor([[0.5, 0.0, 0.0, 0.0]]).repeat(int(image_of.max()) + 1, 1)
        for label, image in zip(labels.tolist(), image_of.tolist(), strict=True):
            if label >= 0:
                counts[image, label] += 1
        return 20 * counts[image_of[rows]]


@dataclasses.dataclass(frozen=True)
class CompanyTask:
    """Shows the model what it is told of each image."""

    num_classes: int = 4
    shape: str = "box"

    def outputs_per_region(self, size: int) -> int:
        return self.num_classes

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        return batch["labels"], batch["image_of"], batch["hidden"]

    def decode(self, output: Any, batch: Batch) -> Tensor:
        log_probs: Tensor = output["logits"].log_softmax(dim=1)
        return log_probs


def test_boxes_and_exact_regions_come_back_in_order() -> None:
    model, photo = teacher(), photograph()
    mask = np.zeros((48, 64), np.bool_)
    mask[10:20, 30:50] = True
    regions = [
        Region("mask", (30.0, 10.0, 50.0, 20.0), mask),
        box_region((30.0, 10.0, 50.0, 20.0), "a", photo.size),
        box_region((0.0, 0.0, 20.0, 30.0), "a", photo.size),
    ]
    first, second, third = expect_classes(model, photo, regions, CPU)
    assert [one.region.name for one in (first, second)] == ["mask", "box 30,10,50,20"]
    torch.testing.assert_close(first.probabilities, second.probabilities)
    assert not torch.allclose(second.probabilities, third.probabilities, atol=1e-6)
    wanted = torch.zeros(24, 32, dtype=torch.bool)
    wanted[5:10, 15:25] = True
    assert torch.equal(first.hidden, wanted) and torch.equal(second.hidden, wanted)
    assert torch.equal(first.image, photo.scaled)


def test_what_is_hidden_is_shown_in_the_teachers_shape() -> None:
    region = box_region((30.0, 10.0, 50.0, 20.0), "a", (48, 64))
    box, square = (
        expect_classes(one, photograph(), [region], CPU)[0].hidden
        for one in (teacher(), teacher(shape="square"))
    )
    assert (int(box.sum()), int(square.sum())) == (50, 100)


def test_objects_that_a_region_covers_are_not_told() -> None:
    task: Any = CompanyTask()
    told = dataclasses.replace(teacher(Company()), task=task)
    boxes = [[0.0, 0.0, 10.0, 10.0], [30.0, 30.0, 40.0, 40.0], [50.0, 0.0, 60.0, 10.0]]
    photo = photograph(boxes=boxes, labels=[1, 1, 2])
    asked = torch.tensor(
        [
            [20.0, 0.0, 28.0, 28.0],  # covers nothing
            [0.0, 0.0, 45.0, 45.0],  # both of class 1
            [0.0, 0.0, 10.0, 4.0],  # less than half of the first
            [0.0, 0.0, 64.0, 48.0],  # everything
        ]
    )
    assert region_probabilities(told, photo, asked, device=CPU).argmax(dim=1).tolist() == [
        1,
        2,
        1,
        0,
    ]
    regions = [Region("", tuple(box)) for box in asked.tolist()]
    answers = expect_classes(told, photo, regions, CPU)
    assert [one.labels.tolist() for one in answers if one.labels is not None] == [
        [1, 1, 2], [-1, -1, 2], [1, 1, 2], [-1, -1, -1],
    ]  # fmt: skip


def test_a_teacher_of_pixels_is_asked_in_one_pass_whatever_is_known() -> None:
    model = teacher()
    calls: list[int] = []
    model.model.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    photo = photograph(boxes=[[0.0, 0.0, 10.0, 10.0]], labels=[1])
    asked = torch.tensor([[0.0, 0.0, 12.0, 12.0], [20.0, 20.0, 30.0, 30.0]])
    known = region_probabilities(model, photo, asked, device=CPU)
    unknown = region_probabilities(
        model, dataclasses.replace(photo, labels=torch.tensor([-1])), asked, device=CPU
    )
    assert calls == [2, 2]
    torch.testing.assert_close(known, unknown)


def test_a_map_has_each_windows_value_at_its_middle() -> None:
    slid = windows((60, 80), (0.2, 0.3), 0.5)
    values = torch.rand(len(slid.boxes))
    fine = spread(values, slid, (60, 80), (600, 800))
    middles = 10 * (slid.boxes[:, :2] + slid.boxes[:, 2:]) / 2
    found = fine[middles[:, 1].long(), middles[:, 0].long()]
    torch.testing.assert_close(found, values, atol=0.02, rtol=0)
    assert values.min() <= fine.min() and fine.max() <= values.max()
    assert (fine[:90, :80] == fine[89, 79]).all()  # beyond the outermost middle nothing changes


def test_one_window_gives_a_flat_map() -> None:
    slid = windows((60, 80), (1.0, 1.0), 0.5)
    fine = spread(torch.tensor([0.3]), slid, (60, 80), (6, 8))
    torch.testing.assert_close(fine, torch.full((6, 8), 0.3))


class Bright(nn.Module):
    """Expects class 1 where the hidden region's middle is near (48, 12) of 64 x 48, never at 0."""

    def forward(self, images: Tensor) -> Tensor:
        hidden = images[:, 3]
        weight = hidden.sum(dim=(1, 2))
        x = (hidden.sum(dim=1) * (torch.arange(32) + 0.5)).sum(dim=1) / weight * 2
        y = (hidden.sum(dim=2) * (torch.arange(32) + 0.5)).sum(dim=1) / weight * 2
        logit = 3.0 - ((x - 48).square() + (y - 12).square()) / 100
        other = torch.zeros_like(logit)
        return torch.stack([other, logit, other, other], dim=1)


def test_a_heat_map_peaks_where_the_class_is_expected() -> None:
    scales = [(0.2, 0.2), (0.3, 0.4)]
    first, second = heat_maps(
        teacher(Bright()), photograph(), [1, 0], scales=scales, stride=0.25, device=CPU
    )
    best = first.places[0]
    assert (best.x, best.y) == pytest.approx((48, 12), abs=2.0)
    assert best.probability == pytest.approx(float(np.exp(3) / (np.exp(3) + 3)), abs=0.02)
    assert first.values.shape == (48, 64)
    sides = torch.tensor(first.sides)
    torch.testing.assert_close(sides, torch.tensor([[12.8, 9.6], [19.2, 19.2]]))
    assert second.places[0].probability == pytest.approx(float(second.values.max()))
    between = float(first.values[12, 48] + 3 * second.values[12, 48])
    assert between == pytest.approx(1.0, abs=1e-4)  # both are means over the same windows


def test_the_mean_over_sizes_is_drawn() -> None:
    model, photo = teacher(), photograph()
    both = heat_maps(model, photo, [2], scales=[(0.2, 0.2), (0.5, 0.4)], stride=0.5, device=CPU)
    alone = [
        heat_maps(model, photo, [2], scales=[scale], stride=0.5, device=CPU)[0].values
        for scale in [(0.2, 0.2), (0.5, 0.4)]
    ]
    torch.testing.assert_close(both[0].values, (alone[0] + alone[1]) / 2)


def test_the_best_places_are_apart_and_in_order() -> None:
    (heat,) = heat_maps(
        teacher(), photograph((64, 64)), [3], scales=[(0.2, 0.2)], stride=0.5, device=CPU
    )
    assert 1 <= len(heat.places) <= 5
    values = [place.probability for place in heat.places]
    assert values == sorted(values, reverse=True)
    spots = torch.tensor([[place.x, place.y] for place in heat.places])
    gaps = torch.cdist(spots, spots) + 100 * torch.eye(len(spots))
    assert float(gaps.min()) >= 12.8 - 1e-4
