"""A user's model or loss that does not fit is refused before a teacher runs, in a line."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from torch import Tensor, nn

from kd import distill, train_teacher
from kd.errors import UserError

MODULE = "students_of_this_test"


class Small(nn.Module):
    """A classifier without a context head; `rois` has a row for each object."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 4, 3, stride=4)
        self.head = nn.Linear(4, classes)

    def forward(self, images: Tensor, rois: Tensor | None = None) -> Tensor:
        features = self.trunk(images).mean(dim=(2, 3))
        scores: Tensor = self.head(features if rois is None else features[rois[:, 0].long()])
        return scores


class Hidden(Small):
    """A context teacher: images with the region as a fourth channel."""

    task = "context"

    def forward(self, images: Tensor, rois: Tensor | None = None) -> Tensor:
        return super().forward(images[:, :3])


def rows(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().mean(dim=1)


def products(student: Tensor, teacher: Tensor) -> Tensor:
    return (student * teacher).mean()


@pytest.fixture(autouse=True)
def _module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType(MODULE)
    module.__dict__.update(
        fits=lambda num_classes: Small(num_classes),
        one_more=lambda num_classes: Small(num_classes + 1),
        hidden=lambda num_classes: Hidden(num_classes + 1),
        maps=lambda num_classes: nn.Conv2d(3, num_classes + 1, 1),
        rows=rows,
        products=products,
    )
    monkeypatch.setitem(sys.modules, MODULE, module)


APPEARANCE = "task.options.appearance=true"
POSTERIOR = "losses=[{{name: '{}', unit: object, weight: 1.0, student: {}, teacher: posterior}}]"


@pytest.mark.parametrize(
    ("student", "settings", "message"),
    [
        ("one_more", [],
         r"student 'MODULE:one_more': gives logits \(\d+, 23\), but the dataset has 22 classes"),
        ("fits", [APPEARANCE],
         "student 'MODULE:fits': gives no output 'appearance', which the task's losses read; it "
         "gives: logits"),
        ("fits", ["variants=[no_context]"],
         "variants: no_context: sets the student's option `context` to false: .*unknown option"),
        ("fits", [POSTERIOR.format("MODULE:rows", "logits")],
         r"losses: MODULE:rows: a loss must return a scalar tensor, the mean over its objects; "
         r"got \(\d+,\)"),
        ("fits", ["losses=[{name: 'MODULE:products', unit: image, weight: 1.0, student: trunk, "
                  "teacher: features.3}]", "soft_targets.equivariance_error=9.0"],
         r"losses: MODULE:products: student \(.*\), teacher \(.*\): .*adapters: \{trunk: "
         r"\{kind: conv1x1, to: features.3\}\}"),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_classifier_is_one_line(
    small_data: list[str],
    small_teacher: Path,
    tmp_path: Path,
    student: str,
    settings: list[str],
    message: str,
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "data: scenes\n"
        "task: {name: classification, weights: {cross_entropy: 1.0}}\n"
        f"student: {{name: '{MODULE}:{student}'}}\n"
        f"losses: [{{name: output_kd, weight: 1.0}}]\n"
        "variants: [plain, distilled]\n"
    )
    flags = [text for one in settings for text in ("--set", one.replace("MODULE", MODULE))]
    with pytest.raises(UserError, match=message.replace("MODULE", MODULE)):
        distill.main(["--config", str(recipe), "--teacher", str(small_teacher),
                      "--out", str(tmp_path / "out"), *small_data, *flags])  # fmt: skip


@pytest.fixture
def maps(small_scenes: Path, tmp_path: Path) -> list[str]:
    """Flags for label maps of the small scenes."""
    settings = [f"data.root={small_scenes}", "data.generate={train: 24, val: 8, size: 64, seed: 0}",
                "data.size=32", "data.crop=[32, 32]", "data.workers=0"]  # fmt: skip
    flags = [text for one in settings for text in ("--set", one)]
    return ["--data", "scenes_maps", "--out", str(tmp_path / "out"), *flags]


def test_a_segmentation_student_with_another_number_of_classes_is_one_line(
    maps: list[str],
) -> None:
    with pytest.raises(UserError, match=r"gives logits \(2, 24, 32, 32\), but .* has 23 classes"):
        distill.main(["--student", "espnet_c", *maps, "--set", f"student={{name: '{MODULE}:maps'}}",
                      "--set", "variants=[plain]"])  # fmt: skip


def test_a_teacher_with_another_number_of_classes_is_one_line(
    small_data: list[str], tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "data: scenes\n"
        "task: {name: context, weights: {cross_entropy: 1.0}}\n"
        f"teacher: {{name: '{MODULE}:hidden'}}\n"
    )
    with pytest.raises(UserError, match=rf"teacher '{MODULE}:hidden': gives logits \(\d+, 23\)"):
        train_teacher.main([*small_data, "--out", str(tmp_path / "teacher"),
                            "--config", str(recipe)])  # fmt: skip


def test_a_recipe_without_a_teacher_is_not_told_to_train_one_of_another_problem(
    maps: list[str], tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "data: scenes_maps\n"
        "task: {name: segmentation, weights: {cross_entropy: 1.0}}\n"
        "student: {name: espnet_c}\n"
        "losses: [{name: pixel_wise, weight: 1.0}]\n"
    )
    with pytest.raises(UserError, match="names no teacher; choose a run with --teacher RUN"):
        distill.main(["--config", str(recipe), *maps])
