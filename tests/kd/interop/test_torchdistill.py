"""torchdistill's losses by name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT

from kd.config.recipes import TermSection
from kd.distillation.student import AdaptedStudent
from kd.distillation.terms import build_term, distillation_losses, draw_modules, modules_of
from kd.engine.optim import make_optimizer
from kd.errors import ConfigError, UserError
from kd.interop.torchdistill import Borrow
from kd.losses import kl_logits, pixel_wise
from kd.problems.objects.task import Classification

# Options that have no default there.
NEEDED: dict[str, dict[str, object]] = {
    "KDLoss": {"temperature": 4.0},
    "LogitStdKDLoss": {"temperature": 2.0},
    "AltActTransferLoss": {"margin": 1.0, "reduction": "mean"},
    "RKDLoss": {"dist_factor": 1.0, "angle_factor": 2.0, "reduction": "mean"},
    "SPKDLoss": {"reduction": "batchmean"},
    "CCKDLoss": {"kernel_config": {"type": "bilinear"}, "reduction": "batchmean"},
}
TASK = Classification(num_classes=4)
ROWS = ("KDLoss", "LogitStdKDLoss", "PKTLoss", "CCKDLoss", "DISTLoss")
# Since 1.1.5, which needs torch 2.12.
ROWS += tuple({"SKDInstanceLoss"} & MIDDLE_LEVEL_LOSS_DICT.keys())
MAPS = ("ATLoss", "RKDLoss", "SPKDLoss", "AffinityLoss", "ChSimLoss", "AltActTransferLoss")


@pytest.mark.parametrize("name", ROWS + MAPS)
def test_a_borrowed_loss_is_small_at_equality_and_has_a_gradient(name: str) -> None:
    shape = (5, 6) if name in ROWS else (5, 6, 8, 8)
    teacher = torch.randn(shape)
    loss = Borrow(name)
    student = torch.randn(shape, requires_grad=True)
    value = loss(student, teacher, **NEEDED.get(name, {}))
    value.backward()
    assert value.ndim == 0 and student.grad is not None and student.grad.isfinite().all()
    assert student.grad.abs().sum() > 0
    assert loss(teacher, teacher, **NEEDED.get(name, {})) <= value.detach()


def test_dist_is_the_papers() -> None:
    def correlation(a: Tensor, b: Tensor) -> float:
        a, b = a - a.mean(), b - b.mean()
        return float(a @ b / (a.norm() * b.norm()))

    student, teacher = torch.randn(2, 4, 6, dtype=torch.float64).unbind()
    p, q = (student / 2).softmax(dim=1), (teacher / 2).softmax(dim=1)
    inter = 1 - sum(correlation(p[i], q[i]) for i in range(4)) / 4
    intra = 1 - sum(correlation(p[:, j], q[:, j]) for j in range(6)) / 6
    value = Borrow("DISTLoss")(student, teacher, tau=2.0, gamma=0.5).item()
    assert value == pytest.approx(4 * (inter + 0.5 * intra), rel=1e-6)


def test_kdloss_is_ours_with_the_temperatures_square_and_over_pixels() -> None:
    loss = Borrow("KDLoss")
    student, teacher = torch.randn(2, 3, 5).unbind()
    expected = kl_logits(student, teacher, temperature=3.0)
    torch.testing.assert_close(loss(student, teacher, temperature=3.0), expected)
    student, teacher = torch.randn(2, 3, 5, 2, 4).unbind()
    expected = pixel_wise(student, teacher, temperature=3.0)
    torch.testing.assert_close(loss(student, teacher, temperature=3.0), expected)


def test_the_options_are_the_losss_own_without_paths_and_labels() -> None:
    names = set(inspect.signature(Borrow("KDLoss")).parameters)
    assert names == {"student", "teacher", "temperature", "reduction"}
    names = set(inspect.signature(Borrow("ATLoss")).parameters)
    assert names == {"student", "teacher", "mode"}


def test_a_term_takes_it_by_name() -> None:
    term = build_term(
        TermSection(
            name="torchdistill.DISTLoss",
            weight=1.0,
            student="logits",
            teacher="posterior",
            options={"tau": 2.0},
        )
    )
    rows, known = torch.randn(3, 4), torch.randn(3, 4)
    batch = {name: torch.arange(3) for name in ("hidden", "image_of", "labels")}
    losses = distillation_losses([term], {"logits": rows}, {"posterior": known}, TASK, batch, {})
    expected = Borrow("DISTLoss")(rows, known, tau=2.0)
    assert torch.equal(losses["torchdistill.DISTLoss"].value, expected)
    maps = build_term(
        TermSection(name="torchdistill.ATLoss", weight=1.0, student="layer4", teacher="neck")
    )
    assert maps.kind.maps and not term.kind.maps


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("torchdistill.DISTLos", {}, "did you mean 'DISTLoss'"),
        ("torchdistill.DISTLoss", {"teta": 1.0}, "unknown option 'teta'"),
        ("torchdistill.KDLoss", {}, "option 'temperature' is missing"),
        ("torchdistill.KDLoss", {"temperature": 1.0, "alpha": 0.5}, "unknown option 'alpha'"),
        ("torchdistill.SRDLoss", {}, "compares one tensor"),
        ("torchdistill.FTLoss", {}, "paraphraser_path, translator_path"),
        ("torchdistill.RegularizationLoss", {}, "compares one tensor"),
    ],
)
def test_what_cannot_be_borrowed_says_why(
    name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises((UserError, ConfigError), match=message):
        build_term(
            TermSection(name=name, weight=1.0, student="logits", teacher="logits", options=options)
        )


def test_a_borrowed_loss_refuses_whole_numbers_and_two_devices() -> None:
    loss, rows = Borrow("DISTLoss"), torch.zeros(2, 3)
    with pytest.raises(UserError, match=r"torchdistill.DISTLoss: teacher must be floating point"):
        loss(rows, rows.long())
    with pytest.raises(UserError, match=r"torchdistill.DISTLoss: expected one device, got student"):
        loss(rows, rows.to("meta"))


def test_every_loss_of_theirs_is_borrowed_or_refused_with_a_reason() -> None:
    refused = set()
    for name in MIDDLE_LEVEL_LOSS_DICT:
        try:
            Borrow(name)
        except UserError:
            refused.add(name)
    assert {"FTLoss", "KTALoss", "SSKDLoss", "SRDLoss", "VIDLoss", "FSPLoss"} <= refused
    assert set(ROWS + MAPS).isdisjoint(refused)


class Scaled(nn.Module):
    """A registered loss with a weight that learns and a counter that does not."""

    calls: Tensor

    def __init__(
        self, student_module_path: str, teacher_module_path: str, channels: int, slope: float = 2.0
    ) -> None:
        super().__init__()
        self.paths = student_module_path, teacher_module_path
        self.weight = nn.Parameter(torch.full((channels,), slope))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, student: Any, teacher: Any, *_: Any, **__: Any) -> Tensor:
        ours, theirs = student[self.paths[0]]["output"], teacher[self.paths[1]]["output"]
        if self.training:
            self.calls += 1
        value: Tensor = (ours * self.weight - theirs).square().mean()
        return value


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MIDDLE_LEVEL_LOSS_DICT, "Scaled", Scaled)


def test_a_loss_with_weights_is_drawn_trained_and_saved_with_the_student(scaled: None) -> None:
    term = build_term(
        TermSection(
            name="torchdistill.Scaled",
            label="scaled",
            weight=0.5,
            student="logits",
            teacher="posterior",
            options={"channels": 4, "slope": 3.0},
        )
    )
    drawn = draw_modules([term], {"posterior": torch.zeros(1, 4)})
    (loss,) = modules_of(drawn, trained="student").values()
    model = AdaptedStudent(nn.Linear(3, 4), losses={"scaled": loss})
    optimizer = make_optimizer(model, name="sgd", lr=0.1)
    rows, known = torch.randn(5, 3), torch.randn(5, 4)
    batch = {name: torch.arange(5) for name in ("hidden", "image_of", "labels")}
    outputs, _ = model.train()(rows)
    value = distillation_losses(drawn, outputs, {"posterior": known}, TASK, batch, {})[
        "scaled"
    ].value
    expected = (outputs["logits"] * 3.0 - known).square().mean()
    torch.testing.assert_close(value, expected)
    value.backward()
    optimizer.step()
    saved = model.state_dict()
    assert not torch.equal(saved["losses.scaled.module.weight"], torch.full((4,), 3.0))
    assert saved["losses.scaled.module.calls"] == 1


def test_a_loss_with_weights_asks_for_its_options(scaled: None) -> None:
    with pytest.raises((UserError, ConfigError), match="option 'channels' is missing"):
        build_term(
            TermSection(
                name="torchdistill.Scaled", weight=1.0, student="logits", teacher="posterior"
            )
        )
