"""A student with its adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from kd.distillation.adapters import Conv3x3
from kd.distillation.student import AdaptedStudent
from kd.errors import UserError


class Student(nn.Module):
    """Two layers and a head, with a dotted path to a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1))
        self.head = nn.Linear(6, 2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.trunk(images).mean(dim=(2, 3)))
        return {"logits": logits, "context": -logits}


def test_outputs_and_adapted_features_come_out_of_one_forward() -> None:
    model = AdaptedStudent(Student(), ["trunk.0", "trunk"], {"trunk.0": nn.Conv2d(4, 8, 1)})
    outputs, features = model(torch.rand(2, 3, 5, 5))
    assert set(outputs) == {"logits", "context"}
    assert {name: tuple(f.shape) for name, f in features.items()} == {
        "trunk.0": (2, 8, 5, 5),
        "trunk": (2, 6, 5, 5),
    }


def test_an_adapter_may_leave_out_what_is_not_looked_at() -> None:
    adapters = {"trunk.0": Conv3x3(4, 8, relu=False), "trunk": nn.Conv2d(6, 8, 1)}
    model, images = (
        AdaptedStudent(Student(), ["trunk.0", "trunk"], adapters),
        torch.rand(2, 3, 6, 5),
    )
    asked: list[tuple[int, int]] = []

    def corner(grid: tuple[int, int]) -> Tensor:
        asked.append(grid)
        mask = torch.zeros(2, *grid, dtype=torch.bool)
        mask[:, 0, 0] = True
        return mask

    whole, part = (
        model(images, where=where)[1] for where in (None, dict.fromkeys(adapters, corner))
    )
    assert asked == [(6, 5)]  # of the one that can
    assert torch.equal(whole["trunk"], part["trunk"])
    torch.testing.assert_close(whole["trunk.0"][..., 0, 0], part["trunk.0"][..., 0, 0])
    assert whole["trunk.0"].all() and part["trunk.0"].count_nonzero() == 2 * 8


def test_gradients_reach_student_and_adapter_through_a_feature() -> None:
    model = AdaptedStudent(Student(), ["trunk.0"], {"trunk.0": nn.Conv2d(4, 8, 1)})
    model(torch.rand(2, 3, 5, 5))[1]["trunk.0"].sum().backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {
        "student.trunk.0.weight",
        "student.trunk.0.bias",
        "adapters.trunk/0.weight",
        "adapters.trunk/0.bias",
    }


def test_a_tensor_output_is_called_logits() -> None:
    outputs, features = AdaptedStudent(nn.Linear(3, 2))(torch.ones(1, 3))
    assert set(outputs) == {"logits"}
    assert features == {}


def test_the_student_leaves_without_its_adapters() -> None:
    model = AdaptedStudent(Student(), ["trunk"], {"trunk": nn.Conv2d(6, 8, 1)})
    assert isinstance(model.student, nn.Module)
    assert set(model.student.state_dict()) == set(Student().state_dict())
    assert any(name.startswith("adapters.") for name in model.state_dict())


def test_a_copy_has_features_of_its_own() -> None:
    model = AdaptedStudent(Student(), ["trunk"], {"trunk": nn.Conv2d(6, 8, 1)})
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.zero_()
    images = torch.rand(1, 3, 5, 5)
    ours, theirs = model(images)[1]["trunk"], average(images)[1]["trunk"]
    assert ours.abs().sum() > 0
    assert theirs.abs().sum() == 0
    assert torch.equal(model(images)[1]["trunk"], ours)


def test_taps_off_leaves_the_student_free_to_be_wrapped_again() -> None:
    student = Student()
    AdaptedStudent(student, ["trunk"]).taps_off()
    _, features = AdaptedStudent(student, ["trunk.0"])(torch.rand(1, 3, 5, 5))
    assert set(features) == {"trunk.0"}
    AdaptedStudent(student).taps_off()


def test_an_unknown_layer_is_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"unknown layer 'trunc'.*did you mean 'trunk'"):
        AdaptedStudent(Student(), ["trunc"])
