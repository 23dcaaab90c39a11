"""A student on a teacher's trunk: the weights land, the run stands alone, mistakes are said."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kd.config.recipes import Model
from kd.errors import ConfigError, UserError
from kd.problems.objects.problem import PROBLEM
from kd.problems.objects.transfer_trunk import resolved
from students.classifiers import SceneClassifier
from teachers import TEACHERS

# Other classes than the teacher's 22.
CLASSES = 7


def transferred(**options: object) -> SceneClassifier:
    student = Model(name="transferred", options=options)
    model = PROBLEM.build_student(student, CLASSES, context=False)
    assert isinstance(model, SceneClassifier)
    return model


def test_the_teachers_weights_land_in_the_students_trunk(small_teacher: Path) -> None:
    state = load_file(small_teacher / "model.safetensors")
    for weights in (small_teacher, small_teacher / "model.safetensors"):
        model = transferred(weights=str(weights))
        own = model.trunk.trunk.state_dict()
        assert {name.removeprefix("path.") for name in own} == {
            name.removeprefix("features.") for name in state if name.startswith("features.")
        }
        for name, value in own.items():
            assert torch.equal(value, state[name.replace("path.", "features.", 1)]), name
    rois = torch.tensor([[0.0, 0, 0, 32, 32]])
    assert model(torch.zeros(1, 3, 32, 32), rois)["logits"].shape == (1, 7)


def test_starts_differ_in_the_trunk_alone(small_teacher: Path) -> None:
    states = []
    for weights in (None, str(small_teacher)):
        torch.manual_seed(4)
        states.append(transferred(like=str(small_teacher), weights=weights).state_dict())
    random, context = states
    differing = {name for name, value in random.items() if not torch.equal(value, context[name])}
    assert differing
    assert all(name.startswith("trunk.") for name in differing)
    assert torch.equal(random["appearance.1.weight"], context["appearance.1.weight"])


def test_a_resolved_student_needs_the_run_no_more(small_teacher: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_teacher, run)
    student = resolved(Model(name="transferred", options={"weights": str(run)}))
    assert student.options["like"]["name"] == "cnn"
    shutil.rmtree(run)
    later = student.model_copy(update={"options": {**student.options, "weights": None}})
    assert resolved(later) == later
    PROBLEM.build_student(later, CLASSES)
    other = Model(name="resnet18", options={"weights": None})
    assert resolved(other) is other


def test_a_torchvision_trunk_starts_from_its_file_too(tmp_path: Path) -> None:
    like = {
        "name": "trunk",
        "options": {"name": "shufflenet_v2_x0_5", "frozen": "all", "remember": True},
    }
    source = transferred(like=like).trunk.trunk
    assert all(parameter.requires_grad for parameter in source.parameters())
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    state = transferred(like=like, weights=str(tmp_path / "weights.pth")).trunk.trunk.state_dict()
    for name, value in source.state_dict().items():
        assert torch.equal(state[name], value), name


def test_mistakes_name_the_place_and_the_remedy(small_teacher: Path, tmp_path: Path) -> None:
    unfinished, pupil = tmp_path / "unfinished", tmp_path / "pupil"
    for folder in (unfinished, pupil):
        folder.mkdir()
    shutil.copy(small_teacher / "config.yaml", unfinished)
    (pupil / "config.yaml").write_text("student: {name: resnet18}\n")
    wide = {"name": "cnn", "options": {"width": 8, "downs": 3, "hidden": 8}}
    deep = {"name": "unet", "options": {"width": 4, "depth": 2}}
    run = str(small_teacher)
    for options, message in (
        ({}, "whose trunk? Name a teacher's run: student.options.weights=RUN"),
        ({"weights": "imagenet"}, "imagenet: no such run folder"),
        ({"weights": str(tmp_path / "none")}, "none: no such run folder"),
        ({"weights": str(unfinished)}, "not finished, it has no model.safetensors"),
        ({"weights": str(pupil)}, "a student's run; expected a teacher's run"),
        ({"weights": str(tmp_path)}, "not a teacher's run, it has no config.yaml"),
        ({"like": wide, "weights": run}, "has another trunk than the student: features.0.0.weight "
         "is (4, 4, 3, 3), expected (8, 4, 3, 3)"),
        ({"like": deep, "weights": run}, "has another trunk than the student: stem.0.weight"),
        ({"like": run, "weights": "imagenet"}, "does not accept torchvision's weights"),
        ({"like": run, "weights": "w.pth"}, "w.pth: no such run folder or file of weights"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=re.escape(message)):
            transferred(**options)
    with pytest.raises(UserError, match=r"its teacher; set student\.options\.stride=null"):
        transferred(weights=run, stride=16)
    with pytest.raises(ConfigError, match="unknown option 'levls'; did you mean 'levels'"):
        transferred(weights=run, levls=2)


def test_a_teacher_that_sees_no_image_has_no_trunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEACHERS, "blind", lambda num_classes: nn.Linear(4, num_classes))
    with pytest.raises(UserError, match="teacher 'blind' has no trunk"):
        transferred(like={"name": "blind", "options": {}})
