"""What terms need around a student: taps, adapters, losses with weights of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kd.config.recipes import Adapter, TermSection
from kd.distillation.student import adapt_student
from kd.distillation.targets import LiveTeacher
from kd.distillation.terms import build_term, modules_of, outputs_by_teacher
from kd.errors import UserError
from kd.nn.regions import roi_features
from kd.problems.objects.task import Classification, Context
from teachers.cnn import cnn


class Seer(nn.Module):
    """A student with a layer to tap, dropout and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 6, 3, stride=4, padding=1), nn.BatchNorm2d(6))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(6, 5)

    def forward(self, images: Tensor, rois: Tensor) -> dict[str, Tensor]:
        """Classify objects."""
        seen = roi_features(self.trunk(images), rois, 4).flatten(1)
        return {"logits": self.head(self.dropout(seen))}


def term(student: str, teacher: str) -> list[TermSection]:
    return [TermSection(name="context_features", weight=1.0, student=student, teacher=teacher)]


def teacher_of(layer: str) -> LiveTeacher:
    model = cnn(5, width=4, downs=3, hidden=8)
    return LiveTeacher(model, Context(num_classes=5), [layer])


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return {
        "images": torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8),
        "sizes": torch.tensor([[32, 32], [32, 32]]),
        "boxes": torch.tensor([[4.0, 4, 20, 20], [8, 8, 24, 30], [0, 0, 9, 9]]),
        "labels": torch.tensor([0, 1, 2]),
        "image_of": torch.tensor([0, 1, 1]),
        "hidden": torch.tensor([0, 1, 2]),
        "hide_fraction": torch.ones(3),
    }


def test_adapters_get_their_shapes_from_a_batch_and_nothing_else_changes(
    batch: dict[str, Tensor],
) -> None:
    student, task = Seer().train(), Classification(num_classes=5)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    teacher = LiveTeacher(
        cnn(5, width=4, downs=3, hidden=8), Context(num_classes=5), ["features.2"]
    )
    stream = torch.get_rng_state()
    adapters = {"trunk": Adapter(kind="conv1x1", to="features.2")}
    model, _ = adapt_student(
        student,
        [build_term(one) for one in term("trunk", "features.2")],
        adapters,
        teacher,
        task,
        batch,
    )
    adapter = model.adapters["trunk"]
    assert isinstance(adapter, nn.Conv2d)
    assert (adapter.in_channels, adapter.out_channels) == (6, 16)
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    assert all(module.training for module in student.modules())
    torch.set_rng_state(stream)
    expected = nn.Conv2d(6, 16, 1)  # nothing else was drawn
    assert torch.equal(adapter.weight, expected.weight)
    _, features = model(*task.inputs(batch))
    assert features["trunk"].shape == (2, 16, 8, 8)


def test_adapters_that_lead_nowhere_are_refused(batch: dict[str, Tensor]) -> None:
    task, terms = (
        Classification(num_classes=5),
        [build_term(one) for one in term("trunk", "features.2")],
    )
    teacher = LiveTeacher(
        cnn(5, width=4, downs=3, hidden=8), Context(num_classes=5), ["features.2"]
    )
    wrong = {"trunk": Adapter(to="features.1")}
    with pytest.raises(UserError, match=r"no term reads teacher layer 'features\.1'"):
        adapt_student(Seer(), terms, wrong, teacher, task, batch)
    student = Seer()
    with pytest.raises(UserError, match=r"trank.*trunk"):
        adapt_student(
            student,
            [build_term(one) for one in term("trank", "features.2")],
            {},
            teacher,
            task,
            batch,
        )
    assert not student.trunk._forward_hooks


def test_layers_are_sorted_by_teacher_and_outputs_are_no_layers() -> None:
    terms = [
        build_term(one)
        for one in [
            TermSection(
                name="hint", label="first", weight=1.0, student="trunk", teacher="features.2"
            ),
            TermSection(
                name="hint", label="second", weight=1.0, student="trunk", teacher="big.layer4.1"
            ),
            TermSection(
                name="hint", label="third", weight=1.0, student="head", teacher="big.layer4.1"
            ),
            TermSection(name="context_logits", weight=1.0),
            TermSection(name="output_kd", weight=1.0, teacher="mean.posterior"),
            TermSection(name="pixel_wise", weight=1.0, student="trunk", teacher="big.logits"),
        ]
    ]
    assert [term.name for term in terms[:3]] == ["first", "second", "third"]
    assert outputs_by_teacher(terms, ["big"]) == {
        "": ["features.2", "posterior"],
        "big": ["layer4.1", "posterior", "logits"],
    }


def test_a_critic_is_drawn_for_the_teachers_channels_and_anew_each_time(
    batch: dict[str, Tensor],
) -> None:
    task = Classification(num_classes=5)
    options = {"widths": [4, 8]}
    terms = [
        build_term(one)
        for one in [
            TermSection(
                name="holistic", weight=1.0, student="trunk", teacher="features.2", options=options
            )
        ]
    ]
    adapters = {"trunk": Adapter(kind="conv1x1", to="features.2")}
    teacher = teacher_of("features.2")
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model, made = adapt_student(Seer(), terms, adapters, teacher, task, batch)
        assert not list(model.losses.parameters())  # a critic has an optimiser of its own
        (critic,) = modules_of(made, trained="critic").values()
        drawn.append(torch.cat([p.detach().flatten() for p in critic.parameters()]))
        first = next(m for m in critic.modules() if isinstance(m, nn.Conv2d))
        assert first.in_channels == 16 + 3  # channels of the feature maps, and the image
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
